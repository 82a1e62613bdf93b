"""The bundle: a folder with a manifest, `elastic.json`, and the artifacts that it lists.

Opening checks the size of every file, and hashes on request. Bundles are written by `elastic_runtime.files.folder`.
"""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import msgspec
import numpy as np

from elastic_runtime import hub
from elastic_runtime.contract import reference
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.errors import BundleError

MANIFEST = "elastic.json"


class Bundle:
    """An open bundle: its folder and its checked manifest.

    `stage` is a folder whose files come before those of `folder`: what is being written and not there yet. `text` is
    the manifest as it was read, by which a bundle that was replaced since is told. `name` is the folder's, or its repository's on the hub.
    """

    def __init__(self, folder: Path, manifest: Manifest, stage: Path | None = None, text: bytes | None = None, name: str | None = None):
        self.folder = folder
        self.name = name or folder.resolve().name
        self.manifest = manifest
        self.stage = stage
        self.text = text

    def __repr__(self) -> str:
        return f"Bundle.open({str(self.folder)!r})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], hashes: bool = False) -> "Bundle":
        """Open a folder; check its manifest, its files' sizes and, on request, their SHA-256.

        A bundle that is replaced in the meantime is opened as the new one. Where there is no folder `org/name`, it is the hub's repository
        of that name, whose listed files are downloaded where the cache does not have them (see `elastic_runtime.hub`).

        Raises: BundleError naming the field or file that is wrong, or cannot be read; for a name on the hub what `hub.snapshot` does.
        """
        repository = hub.named(folder)
        folder = _downloaded(repository) if repository else Path(folder)
        text = manifest_text(folder)
        while True:
            bundle = cls(folder, decode(text, str(folder / MANIFEST)), text=text, name=repository.name if repository else None)
            try:
                for entry in bundle.manifest.files():
                    bundle.check(entry, hashes)
            except BundleError:
                before, text = text, manifest_text(folder)
                if text == before:
                    raise
            else:
                return bundle

    def file(self, relative: str) -> Path:
        """Path of a listed file, or of a package's folder.

        Raises: BundleError for a name that leaves the folder, and for a file that is not there any more.
        """
        path = self._place(relative)
        if self._replaced(relative):
            raise BundleError(f"{self.folder} was replaced since it was opened, and {relative} with it: open it again.")
        if not path.exists():
            raise _missing(path)
        return path

    def check(self, entry: FileEntry, hashes: bool = False) -> None:
        """Check a listed file's size and, on request, its SHA-256.

        Raises: BundleError where it is missing, damaged, or cannot be read.
        """
        path = self._place(entry.path)
        with readable(path):
            if not path.is_file():
                raise _missing(path)
            size = path.stat().st_size
            if size != entry.bytes:
                raise BundleError(f"{path} is damaged: {size} bytes where the manifest says {entry.bytes}. Copy or export it again.")
            if hashes and sha256(path) != entry.sha256:
                raise BundleError(f"{path} is damaged: its SHA-256 is not the manifest's. Copy or export it again.")

    def reference(self) -> dict[str, np.ndarray]:
        """Arrays of the recorded reference run, named as in `elastic_runtime.contract.reference`.

        Raises: BundleError where there is none, or it is damaged, or cannot be read.
        """
        if self.manifest.reference is None:
            raise BundleError(f"{self.folder} holds no reference outputs: export it again")
        path = self.file(self.manifest.reference.path)
        try:
            with readable(path), np.load(path, allow_pickle=False) as arrays:
                recorded = dict(arrays)
            reference.check(recorded, self.manifest.graphs, self.manifest.axes)
        except BundleError:
            raise
        except Exception as error:  # whatever the readers of zips, of arrays' headers and of budgets raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise BundleError(f"{path} is damaged: {why}. Copy or export it again.") from None
        return recorded

    def _place(self, relative: str) -> Path:
        if not inside(relative):
            raise BundleError(f"{self.folder / MANIFEST} names a file outside the bundle: {relative!r}. Do not use this bundle.")
        if self.stage and (self.stage / relative).exists():
            return self.stage / relative
        return self.folder / relative

    def _replaced(self, relative: str) -> bool:
        """Whether the manifest that lies there now lists other files under this name than the one that was opened."""
        if self.text is None:
            return False
        try:
            text = manifest_text(self.folder)
            return text != self.text and not _listed(self.manifest, relative) <= _listed(decode(text, MANIFEST), relative)
        except BundleError:  # one that is not to be read lists nothing
            return True


def _downloaded(repository: hub.Repository) -> Path:
    """The hub's snapshot of a bundle."""
    folder = hub.snapshot(repository, [MANIFEST])
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{repository} is no bundle: it has no {MANIFEST}. Export it: elastic-export onnx {repository} -o {repository.name}"
        )
    manifest = decode(manifest_text(folder), f"{repository}'s {MANIFEST}")
    return hub.snapshot(repository.at(folder), [MANIFEST, *(glob.escape(entry.path) for entry in manifest.files())])


def manifest_text(folder: Path) -> bytes:
    """The content of a bundle's manifest.

    Raises: BundleError where the folder is no bundle, or its manifest cannot be read.
    """
    path = folder / MANIFEST
    with readable(path):
        if path.is_file():
            return path.read_bytes()
        what = "does not exist" if not folder.exists() else f"holds no {MANIFEST}"
        model = (folder / "model_index.json").is_file()
    make = f"It is a diffusers folder: elastic-export onnx {folder} -o BUNDLE" if model else f"elastic-export onnx -o {folder}"
    raise BundleError(f"{folder} is not a bundle: it {what}. {make if model else f'Make one with: {make}'}")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise BundleError where the block cannot read `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # numpy's, of what it read
            raise BundleError(f"{path} is damaged: {error}. Copy or export it again.") from None
        raise BundleError(f"cannot read {path}: {error.strerror}. Give yourself the right to read it, or copy it again.") from error


def _listed(manifest: Manifest, name: str) -> set[tuple[str, str]]:
    """Path and SHA-256 of the file of that name, or of those in the folder of that name."""
    return {(entry.path, entry.sha256) for entry in manifest.files() if f"{entry.path}/".startswith(f"{name}/")}


def _missing(path: Path) -> BundleError:
    return BundleError(f"{path} is missing: the bundle is incomplete. Copy it again, or export it again.")


def inside(name: str) -> bool:
    """Whether a listed name stays in its folder on every system.

    It is read as text: what is a link there is the owner's business, and model hubs keep their files as links into a
    store of their own.
    """
    pure = PurePosixPath(name)
    elsewhere = pure.is_absolute() or ".." in pure.parts or bool(PureWindowsPath(name).drive)
    return bool(pure.parts) and not elsewhere and not {"\\", "\0"} & set(name)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def entry(folder: Path, path: Path) -> FileEntry:
    """The manifest's entry for a file that lies in `folder`."""
    return FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))


def encode(manifest: Manifest) -> bytes:
    """The content of `elastic.json`, after checking that it reads back as the same manifest."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    if decode(text, MANIFEST) != manifest:
        raise BundleError("the manifest does not survive its own format; this is a bug, please report it")
    return text + b"\n"
