"""Reports as files: written whole or not at all, read strictly."""

import contextlib
import os
from pathlib import Path

from elastic_bench.records import Report, decode
from elastic_runtime.errors import UsageError


def refuse_clobber(path: Path, overwrite: bool) -> None:
    """Raise UsageError where a file cannot go to `path`."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another name, or replace it with --overwrite")


def write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name until it is whole; raise UsageError where that is not possible."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read(path: Path) -> Report:
    """The report in a file; raise UsageError where there is none or it is not one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): make it with elastic-export bench BUNDLE --json {path}") from None
    return decode(content, str(path))
