"""One file, written whole or not at all."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from elastic_runtime.errors import UsageError

# Windows has no links of this kind to be led astray by, and opens as text unless told.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def create(folder: Path, prefix: str) -> tuple[int, Path]:
    """A new file under a name that nobody can foresee, open for writing.

    What stands under the name, a link included, is never opened. Unlike `tempfile`'s, which only its owner may read,
    the file has the rights that files get here: it is what others will read.

    Raises: OSError where the folder cannot be written.
    """
    while True:
        path = folder / f"{prefix}{secrets.token_hex(8)}"
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), path


@contextlib.contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a stream whose content takes the place of `path` in one step when the block ends.

    On any error nothing has changed. Until then it lies under another name in `path`'s folder, or in `beside` on the
    same file system. A link at `path` is replaced, what it points to is not.

    Raises: OSError where it cannot be written.
    """
    handle, partial = create(beside or path.parent, f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    flush(path.parent)


def write(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Write `content` as `replacing` does, in a folder that is made if need be.

    Raises: OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, beside) as stream:
        stream.write(content)


def save(path: Path, content: bytes) -> None:
    """`write` for a file that the user named: what is in the way is one sentence.

    Raises: UsageError where it cannot be written.
    """
    try:
        write(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}. Choose another name, or make room for it.") from error


def refuse_clobber(path: Path, overwrite: bool, option: str = "-o/--output") -> None:
    """Refuse at once what `save` would refuse after minutes of work.

    Raises: UsageError where something stands at `path` that may not be replaced, or its folder cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no ordinary file: choose another {option}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another {option}, or replace it with --overwrite")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"cannot write {path}: {above} is {'not writable' if above.is_dir() else 'a file'}; choose another {option}")


def flush(path: Path) -> None:
    """Ask the disk to keep a file's content, or a folder's names, before anything relies on it.

    Raises: OSError where the disk says that it cannot, a full one for instance.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":  # there, a folder cannot be opened
        return
    # Windows flushes only what is open for writing; elsewhere a file that may only be read is flushed too.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems keep no folders
            raise
    finally:
        os.close(handle)
