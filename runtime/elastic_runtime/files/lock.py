"""A folder's lock: one writer at a time, whichever process, container or host it runs in.

It is the system's lock on a file in the folder. The system gives it back when its holder dies, however it dies, so that
no process number has to tell who is alive.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from elastic_runtime.errors import BundleError
from elastic_runtime.files.atomic import NO_LINK

NAME = ".elastic.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder` in the block, which learns whether this file system has locks at all.

    Raises: BundleError where another run holds it; OSError where the folder cannot be written.
    """
    handle, sole = _take(folder)
    try:
        yield sole
    finally:
        # Taken away while it is still held: whoever opened it meanwhile will see that it is not the folder's any more.
        if os.name != "nt":
            _remove(folder)
        os.close(handle)
        if os.name == "nt":  # there, an open file stays
            _remove(folder)


def _take(folder: Path) -> tuple[int, bool]:
    path = folder / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        try:
            sole = _lock(handle, folder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(handle), os.stat(path, follow_symlinks=False)):
                    return handle, sole
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder took it away between our opening and our locking


def _lock(handle: int, folder: Path) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BundleError(f"{folder} is being written by another run; wait for it, or choose another -o/--output") from None
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
            raise
        return False
    return True


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(folder / NAME)
