"""The user's cache folder, and files in it that are whole or not there."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path


def folder(name: str) -> Path:
    """Where `name` is cached: under XDG_CACHE_HOME if it is set, else the system's place for caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        place = Path(base)
    elif sys.platform == "darwin":
        place = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        place = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        place = Path.home() / ".cache"
    return place / "elastic-export" / name


def write(path: Path, content: bytes) -> None:
    """Write a file in one step: another process sees the old content or the new one, and the last writer wins.

    Raises: OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
