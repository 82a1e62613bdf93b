"""A folder that one writer at a time works in: made if need be, locked, cleared of what killed runs left, and with a partial folder to make
things in. What stands there and what may become of it is the writer's to say."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.errors import BundleError, ElasticError
from elastic_runtime.files import leftovers
from elastic_runtime.files.lock import locked

# A library that fails without a reason on a disk with less room than this has failed for want of it.
_NO_ROOM = 1 << 20


class Stands(Protocol):
    """What stands in a folder: the files that are ours."""

    @property
    def files(self) -> Sequence[FileEntry]: ...


Standing = TypeVar("Standing", bound=Stands)


@contextlib.contextmanager
def holding(folder: Path, kind: str, look: Callable[[bool], Standing]) -> Iterator[tuple[Path, Standing]]:
    """Yield a partial folder in `folder` and what `look` says stands there, while nobody else can write there.

    `kind` is what the folder is to hold, as its user calls it. `look(sole)` is told whether the lock is held, which some disks do not
    have. A folder that was not there, and that nothing is put into, goes again.

    Raises: BundleError where another run writes there, the place is no folder or cannot be written, or the disk is full; whatever `look`
    and the block raise.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_made(folder, kind))
            sole = stack.enter_context(locked(folder))
            stands = look(sole)
            if sole:
                leftovers.sweep(folder, stands.files)
            partial = leftovers.begin(folder)
            stack.callback(leftovers.clear, partial)
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            yield partial, stands
        except Exception as error:
            if _is_full(error, folder):
                raise unwritable(folder, OSError(errno.ENOSPC, "")) from error
            raise


def foreign(folder: Path, kind: str) -> BundleError:
    """The error for a folder that holds something else than `kind`."""
    return BundleError(f"{folder} exists and is not a {kind}; it is left alone. Choose another -o/--output.")


def unwritable(folder: Path, error: OSError) -> BundleError:
    """The error for a folder that the system does not let us write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BundleError(f"no space left on the disk of {folder}; nothing was changed. Free some space, then try again.")
    return BundleError(f"cannot write in {folder}: {error.strerror or error}; nothing was changed. Choose another -o/--output.")


@contextlib.contextmanager
def _made(folder: Path, kind: str) -> Iterator[None]:
    """Make `folder` for the block; if it was not there, it goes again unless the block puts something into it."""
    place = Path(os.path.realpath(folder))  # a link may point to a folder that is yet to be made
    missing = [path for path in (place, *place.parents) if not path.exists()]
    if missing:
        place.mkdir(parents=True, exist_ok=True)
    elif not place.is_dir():
        raise foreign(folder, kind)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error comes from a full disk, which libraries say in their own ways, or do not say."""
    link: BaseException | None = error
    while link:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # numpy's tofile says "100 requested and 0 written", with no number
        if isinstance(link, OSError) and link.errno is None and "written" in str(link):
            return True
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return not isinstance(error, ElasticError) and shutil.disk_usage(folder).free < _NO_ROOM
