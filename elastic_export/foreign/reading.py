"""Files of a model folder."""

import json
from pathlib import Path
from typing import Any

from elastic_runtime.errors import ModelError


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """A JSON object from a file, which is UTF-8 whatever the locale says; `what` is how a message calls it.

    Raises: ModelError saying what is wrong with it.
    """
    name, hint = (f"{what} {path}", "Write it anew") if what else (str(path), "Download or copy it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ModelError(f"{name} is not JSON: {error}. {hint}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{name} must hold a JSON object, got {type(content).__name__}")
    return content


def is_pointer(file: Path) -> bool:
    """Whether git-lfs has put a pointer in a file's place."""
    with file.open("rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs")


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
