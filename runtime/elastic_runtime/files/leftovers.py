"""What runs leave in a bundle's folder when they are killed, and how files are taken away: only those that are ours.

A run works in a partial folder of its own, `.partial-<random>`: what it makes lies in `files`, and its journal lists
the files that have no place in the bundle if it does not end well: those that it moves to their places, if the manifest
does not come to list them; and those that the new manifest does not list any more.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.contract.bundle import MANIFEST, sha256
from elastic_runtime.files import atomic, lock
from elastic_runtime.files.names import records

PREFIX = ".partial-"
JOURNAL = "elastic-export.journal"
FILES = "files"
# An empty disk that was just mounted has this.
_SYSTEM = "lost+found"
# ours(folder, entry): whether the file there is the one that the entry tells of
Ours = Callable[[Path, FileEntry], bool]


def begin(folder: Path) -> Path:
    """A partial folder in `folder`, with an empty journal, which says that it is ours."""
    partial = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    (partial / JOURNAL).touch()
    (partial / FILES).mkdir()
    return partial


def note(partial: Path, entries: Iterable[FileEntry]) -> None:
    """Write the journal, before anything that it tells of is done."""
    atomic.write(partial / JOURNAL, msgspec.json.encode(list(entries)), beside=partial)


def clear(partial: Path) -> None:
    """Take a partial folder away. The journal goes last: until then, another run can see whose folder it is."""
    with contextlib.suppress(OSError):
        for path in partial.iterdir():
            if path.name == FILES and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != JOURNAL:
                path.unlink()
        (partial / JOURNAL).unlink(missing_ok=True)
        partial.rmdir()


def sweep(folder: Path, listed: Iterable[FileEntry]) -> None:
    """Clear up after killed runs; the files that the manifest lists stay. Only for the holder of the folder's lock."""
    kept = list(listed)
    for partial, entries in _partials(folder):
        if discard(folder, entries, kept, _is_as_noted):
            clear(partial)


def empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what killed runs left there, and what is there on every disk."""
    partials = _partials(folder)
    ours = {folder / entry.path for _, entries in partials for entry in entries if _is_as_noted(folder, entry)}
    ours |= {folder / lock.NAME, folder / _SYSTEM, *(partial for partial, _ in partials)}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(place, name) not in ours]
        others = [Path(place, name) for name in files] + [path for name in folders if (path := Path(place, name)).is_symlink()]
        if not ours.issuperset(others):
            return False
    return True


def discard(folder: Path, entries: Iterable[FileEntry], kept: Iterable[FileEntry], ours: Ours = lambda *_: True) -> bool:
    """Delete files of a bundle that are `ours`, and folders that are empty then; of a file that is a link, the link.

    Never one of `kept` or the manifest, by whichever name it is listed; never through a link to another folder, never a
    folder that holds anything. False where a file could not be deleted.
    """
    stays = set(_identities(folder, [MANIFEST, *(entry.path for entry in kept)]))
    whole = True
    for entry in entries:
        if not _in_real_folders(folder, entry.path):
            continue
        path = folder / entry.path
        try:
            is_file = path.is_symlink() or path.is_file()
            if is_file and not stays.intersection(_identities(folder, [entry.path])) and ours(folder, entry):
                path.unlink()
        except OSError:  # on Windows, a file that somebody has open
            whole = False
        for above in path.parents:
            if above == folder:
                break
            with contextlib.suppress(OSError):
                above.rmdir()
    return whole


def _partials(folder: Path) -> list[tuple[Path, list[FileEntry]]]:
    """Partial folders that are ours, by name and by what is in them, and what their journals list."""
    return [(path, entries) for path in sorted(folder.glob(f"{PREFIX}*")) if (entries := _journal(path)) is not None]


def _journal(partial: Path) -> list[FileEntry] | None:
    """What a partial folder's journal lists; None where the folder is not ours."""
    path = partial / JOURNAL
    try:
        if partial.is_symlink() or not partial.is_dir():
            return None
        if path.is_symlink() or not path.is_file():
            return None if any(partial.iterdir()) else []  # a run that was killed before it could make its journal
        return list(records(msgspec.json.decode(path.read_bytes())))
    except OSError:  # another user's, of which nothing is to be seen
        return None
    except (ValueError, RecursionError):  # it is still empty: nothing was moved
        return []


def _is_as_noted(folder: Path, entry: FileEntry) -> bool:
    path = folder / entry.path
    if not _in_real_folders(folder, entry.path) or not path.is_file():
        return False
    return path.stat().st_size == entry.bytes and sha256(path) == entry.sha256


def _in_real_folders(folder: Path, name: str) -> bool:
    """Whether no link stands in for a folder on the way to a file."""
    above = list(Path(name).parents)[:-1]  # the last is the bundle's own
    return not any((folder / each).is_symlink() for each in above)


def _identities(folder: Path, names: Iterable[str]) -> Iterator[tuple[int, int]]:
    """What a name means to the file system, where case or a second name for the same file may count for nothing."""
    for name in names:
        with contextlib.suppress(OSError):
            status = (folder / name).lstat()
            yield status.st_dev, status.st_ino
