"""The user's cache folder. `atomic` writes its files: the last writer wins, and no reader sees half of one. What another user could have
put there is not read."""

import os
import stat
import sys
from pathlib import Path

from elastic_runtime.errors import MissingError


def folder(name: str) -> Path:
    """Where `name` is cached: under XDG_CACHE_HOME if it is set, else the system's place for caches.

    Raises: MissingError for a user who has no home folder, as in a container that runs under a bare number.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        place = Path(base)
    elif sys.platform == "darwin":
        place = _home() / "Library" / "Caches"
    elif sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        place = Path(local) if local else _home() / "AppData" / "Local"
    else:
        place = _home() / ".cache"
    return place / "elastic-export" / name


def guard(path: Path) -> None:
    """Raise PermissionError for a file or folder that another user owns or may write, as in a cache under a shared folder.

    Raises: OSError where there is none.
    """
    status = path.lstat()
    mine = not hasattr(os, "geteuid") or status.st_uid in (os.geteuid(), 0)
    if not mine or stat.S_ISLNK(status.st_mode) or (os.name != "nt" and status.st_mode & stat.S_IWOTH):
        raise PermissionError(f"{path} is a link, or another user owns it or may write it")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise MissingError("this user has no home folder to keep caches in: set XDG_CACHE_HOME to a folder that can be written") from None
