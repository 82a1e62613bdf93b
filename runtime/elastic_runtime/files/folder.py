"""Write a bundle in its folder as one transaction: a kill at any moment leaves the old bundle or the new one.

New files are made in a partial folder inside the bundle's, which may be a mount, and move to names that nothing has.
The manifest then takes the old one's place in one step: this is the moment at which the new bundle is there. Last, the
files go that the old manifest lists and the new one does not. A reader of the old manifest finds the old files until
then, and never another's under their names. What no manifest lists is the user's and is never touched.

    with writing(folder) as draft:
        ...  # make files in draft.stage
        bundle = draft.commit(manifest)
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.contract.bundle import MANIFEST, Bundle, encode, manifest_text, readable
from elastic_runtime.contract.manifest import SCHEMA_VERSION, Manifest
from elastic_runtime.errors import BundleError
from elastic_runtime.files import atomic, leftovers, placing
from elastic_runtime.files.names import apart, free, moving, records, renamed, variants
from elastic_runtime.files.place import foreign, holding, unwritable


@dataclass(frozen=True)
class Standing:
    """What stands in a folder: its manifest as read, the bundle if it is whole, and the files that are ours."""

    text: bytes | None = None
    bundle: Bundle | None = None
    files: tuple[FileEntry, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A bundle that is being written: files are made in `stage`, under the names that they are to have in `folder`.

    `old` is the whole bundle that stands in `folder`, to be extended or replaced.
    """

    folder: Path
    partial: Path
    standing: Standing

    @property
    def stage(self) -> Path:
        return self.partial / leftovers.FILES

    @property
    def old(self) -> Bundle | None:
        return self.standing.bundle

    def bundle(self, manifest: Manifest) -> Bundle:
        """The bundle as it would be now, to be proven before it is there."""
        return Bundle(self.folder, manifest, stage=self.stage)

    def copy(self, bundle: Bundle) -> None:
        """Copy another bundle's files into the stage; they share nothing with the originals.

        Raises: BundleError where one is missing or damaged.
        """
        for entry in bundle.manifest.files():
            target = self.stage / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            placing.copy(bundle, entry, target)

    def commit(self, manifest: Manifest) -> Bundle:
        """Make `manifest` the one of the folder, with the files that were made for it; return the new bundle, open.

        A file whose name is taken gets another one, and the manifest that is written says so.

        Raises: BundleError where another run changed the manifest meanwhile, or the folder cannot be written. On any
        error the folder is as it was.
        """
        made = {entry.path: entry for entry in manifest.files() if os.path.lexists(self.stage / entry.path)}
        draft = self.bundle(manifest)
        for entry in manifest.files():
            draft.check(entry)
        moves = self._places(manifest, made)
        final = renamed(manifest, moves, {name: entry.sha256 for name, entry in made.items()})
        text = encode(final)
        new = [msgspec.structs.replace(entry, path=moves[name]) for name, entry in made.items()]
        named = {entry.path for entry in final.files()}
        replaced = [entry for entry in self.standing.files if entry.path not in named]
        try:
            for name in moves:
                atomic.flush(self.stage / name)
            leftovers.note(self.partial, [*new, *replaced])
            try:
                self._move(moves)
                if self._text() != self.standing.text:
                    raise BundleError(f"another run changed {self.folder} meanwhile; nothing of it was touched. Try again.")
                atomic.write(self.folder / MANIFEST, text, beside=self.partial)
            finally:  # An interruption may come between any two instructions: what lies on the disk decides.
                if self._text() == text:
                    leftovers.discard(self.folder, replaced, kept=final.files())
                else:
                    moved = [entry for name, entry in zip(made, new, strict=True) if not (self.stage / name).exists()]
                    leftovers.discard(self.folder, moved, kept=self.standing.files)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return Bundle.open(self.folder)

    def _places(self, manifest: Manifest, made: Mapping[str, FileEntry]) -> dict[str, str]:
        """The name in the folder that each staged file moves to; those of one artifact stay beside each other."""
        places: dict[str, str] = {}
        for names in moving(manifest):
            staged = sorted(name for name in names if name in made)
            for candidates in zip(*map(variants, staged), strict=False):
                if all(free(self.folder, name) and apart(name, places.values()) for name in candidates):
                    places |= zip(staged, candidates, strict=True)
                    break
        return places

    def _move(self, moves: Mapping[str, str]) -> None:
        changed = {self.folder}
        for name, place in moves.items():
            target = self.folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if not free(self.folder, place):
                raise BundleError(f"{target} appeared while the bundle was written; nothing was changed. Try again.")
            os.rename(self.stage / name, target)
            changed |= {above for above in target.parents if above.is_relative_to(self.folder)}
        for above in changed:
            atomic.flush(above)

    def _text(self) -> bytes | None:
        try:
            return (self.folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def writing(folder: Path, overwrite: bool = False) -> Iterator[Draft]:
    """Yield a draft of the bundle in `folder`, which nobody else can write meanwhile.

    Without a commit nothing has changed.

    Raises: BundleError where another run writes there, something stands there that may not be replaced (see
    `standing`), the place cannot be written, or the disk is full; whatever the block raises. In each case `folder` is
    as it was.
    """
    with holding(folder, "bundle", lambda sole: standing(folder, overwrite)) as (partial, stands):
        yield Draft(folder, partial, stands)


def standing(folder: Path, overwrite: bool) -> Standing:
    """What stands in `folder`, if it may be extended, or with `overwrite` replaced. Nothing is changed.

    Raises: BundleError where something stands there that is not ours, or a bundle that is damaged and `overwrite` is
    not given.
    """
    with readable(folder):
        if not folder.exists():
            return Standing()
        if not (folder / MANIFEST).is_file():
            if not folder.is_dir() or not leftovers.empty(folder):
                raise foreign(folder, "bundle")
            return Standing()
    try:
        bundle = Bundle.open(folder, hashes=True)  # damage must not be carried into an extended bundle
        return Standing(bundle.text, bundle, tuple(bundle.manifest.files()))
    except BundleError:
        if not overwrite:
            raise
    text = manifest_text(folder)
    return Standing(text, None, tuple(records(_ours(text, folder / MANIFEST))))


def _ours(text: bytes, path: Path) -> dict[str, object]:
    """The JSON of a manifest that this version need not be able to read, but that it or an older one wrote."""
    try:
        content = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        content = None
    fields = (("schema_version", int), ("model", dict), ("graphs", dict))
    known = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in fields)
    if known and content["schema_version"] <= SCHEMA_VERSION:
        return content
    raise BundleError(f"{path} is not a manifest that this version may replace; it is left alone. Choose another -o/--output.")
