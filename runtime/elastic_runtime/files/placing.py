"""Folders that are put among others' in one step each, such as the models of a Triton repository.

What is to be placed is made in a partial folder beside the places, on the same disk. A place that is taken by what is not ours is never
touched.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.contract.bundle import MANIFEST, Bundle, readable, sha256
from elastic_runtime.errors import BundleError, UsageError
from elastic_runtime.files import atomic, leftovers
from elastic_runtime.files.place import holding

BEFORE = "before-"  # what stood in a place, until the new one is there
# ours(path): whether what stands there was written by us, and nothing beside it
Ours = Callable[[Path], bool]


def copy(bundle: Bundle, entry: FileEntry, target: Path) -> None:
    """Copy a bundle's file; the copy shares nothing with it.

    Raises: BundleError where it is missing or damaged; OSError where it cannot be written.
    """
    source = bundle.file(entry.path)
    with readable(source):
        content = source.open("rb")
    with content, target.open("wb") as stream:
        shutil.copyfileobj(content, stream, 1 << 20)
    if sha256(target) != entry.sha256:
        bundle.check(entry, hashes=True)
        raise BundleError(f"{source} changed while it was copied: wait for the run that writes it, then try again.")


def link(bundle: Bundle, entry: FileEntry, target: Path) -> None:
    """Give a bundle's file a second name, which takes no room; a copy where the disk has no such names, or is another one.

    A bundle's files are never written where they stand, so that both names keep what they have.

    Raises: as `copy`.
    """
    try:
        os.link(bundle.file(entry.path).resolve(), target)  # the file itself: a hub keeps links into a store of its own
    except OSError:
        copy(bundle, entry, target)


@dataclass(frozen=True)
class Standing:
    """What stands in a folder of others' things: no file that a killed run's journal may tell of."""

    files: tuple[FileEntry, ...] = ()


@dataclass(frozen=True)
class Placing:
    """What is made in `stage`, by name, to have its place in `folder`."""

    folder: Path
    partial: Path

    @property
    def stage(self) -> Path:
        return self.partial / leftovers.FILES

    def commit(self) -> None:
        """Move all that is staged to its place, one after the other; what stood there goes when the new one has its place.

        Raises: BundleError where the folder cannot be written; what was in the way is then back.
        """
        try:
            self._move()
        except OSError as error:
            raise BundleError(
                f"cannot write in {self.folder}: {error.strerror or error}; what is not replaced is as it was. Choose another "
                "-o/--output, or make room for it."
            ) from error

    def _move(self) -> None:
        for staged in sorted(self.stage.iterdir()):
            for path in (*staged.rglob("*"), staged):
                atomic.flush(path)
            place, before = self.folder / staged.name, self.partial / f"{BEFORE}{staged.name}"
            try:
                if os.path.lexists(place):
                    os.rename(place, before)
                os.rename(staged, place)
            except BaseException:
                if os.path.lexists(before) and not os.path.lexists(place):
                    os.rename(before, place)
                raise
            if before.is_dir():
                shutil.rmtree(before)
            elif os.path.lexists(before):
                before.unlink()
        atomic.flush(self.folder)


@contextlib.contextmanager
def placing(folder: Path, places: Mapping[str, Ours], overwrite: bool = False) -> Iterator[Placing]:
    """Yield what puts things under the names of `places` into `folder`, which is made if need be.

    Without a commit nothing has changed.

    Raises: UsageError where a place is taken and `overwrite` is not given, or what stands there is not ours; BundleError where another run
    writes there, the place cannot be written, or the disk is full; whatever the block raises.
    """

    def look(sole: bool) -> Standing:
        if os.path.lexists(folder / MANIFEST):
            raise UsageError(f"{folder} is a bundle, which has its own files: choose another -o/--output")
        if sole:
            _settle(folder)
        for name, ours in places.items():
            if os.path.lexists(folder / name):
                _check(folder / name, ours, overwrite)
        return Standing()

    with holding(folder, "repository of models", look) as (partial, _):
        yield Placing(folder, partial)


def _settle(folder: Path) -> None:
    """Put back what a killed run had moved aside and not yet replaced."""
    for before in folder.glob(f"{leftovers.PREFIX}*/{BEFORE}*"):
        place = folder / before.name.removeprefix(BEFORE)
        if (before.parent / leftovers.JOURNAL).is_file() and not before.parent.is_symlink():
            if not os.path.lexists(place):
                os.rename(before, place)
            elif before.is_dir() and not before.is_symlink():
                shutil.rmtree(before)


def _check(path: Path, ours: Ours, overwrite: bool) -> None:
    if path.is_symlink() or not ours(path):
        raise UsageError(f"{path} exists and holds what this command did not write; it is left alone. Choose another -o/--output.")
    if not overwrite:
        raise UsageError(f"{path} exists: choose another -o/--output, or replace it with --overwrite")
