"""Replace a folder in one step, so that a kill at any moment leaves either the old one or the new one."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_runtime.errors import BundleError


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; when the block ends without an error, it takes the place of `folder`.

    Raises: BundleError if the place cannot be written or the disk is full; whatever the block raises. In each case
    `folder` is as it was.
    """
    folder = folder.resolve()  # where `folder` is a link, what it points to is replaced
    stage = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        stage.mkdir()
    except OSError as error:
        raise BundleError(f"cannot write beside {folder}: {error.strerror or error}. Choose another -o/--output.") from error
    try:
        yield stage
        _flush(stage)
        if folder.exists():
            exchange(stage, folder)
        else:
            stage.rename(folder)
    except OSError as error:
        # numpy's tofile says "100 requested and 0 written", with no number
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not (error.errno is None and "written" in str(error)):
            raise
        raise BundleError(f"no space left on the disk of {folder}; nothing was changed. Free some space, then try again.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # the unfinished new folder, or the replaced old one


def exchange(left: Path, right: Path) -> None:
    """Swap two folders' names in one step where the system can (Linux, macOS), else in two renames."""
    libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
        if libc.renameat2(at_cwd, os.fsencode(left), at_cwd, os.fsencode(right), swap) == 0:
            return
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        swap = 2  # RENAME_SWAP of renamex_np(2)
        if libc.renamex_np(os.fsencode(left), os.fsencode(right), swap) == 0:
            return
    # A file system without an exchange: for a moment the old folder goes by another name.
    aside = left.with_name(left.name + ".old")
    right.rename(aside)
    try:
        left.rename(right)
    except OSError:
        aside.rename(right)
        raise
    aside.rename(left)


def recover(folder: Path) -> None:
    """Give `folder` its name back where a killed run had taken it and not yet given it to the new one (see `exchange`)."""
    folder = folder.resolve()
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*.old"):
        if not folder.exists() and not _alive(left):
            left.rename(folder)


def _flush(folder: Path) -> None:
    """Ask the disk to keep what was written before the folder takes its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            # Windows flushes only what is open for writing; elsewhere a file that may only be read is flushed too.
            with path.open("rb+" if os.name == "nt" else "rb") as stream:
                os.fsync(stream.fileno())


def _sweep(folder: Path) -> None:
    """Clear what killed runs left beside `folder`; a run that is still alive keeps its own."""
    recover(folder)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if not _alive(left):
            shutil.rmtree(left, ignore_errors=True)


def _alive(left: Path) -> bool:
    """Whether the run that made this folder may still be at it."""
    name = left.name.rsplit("-", 1)[1].removesuffix(".old")
    if not name.isdigit():
        return True
    pid = int(name)
    if pid == os.getpid():
        return False
    if os.name == "nt":  # there, os.kill(pid, 0) would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
