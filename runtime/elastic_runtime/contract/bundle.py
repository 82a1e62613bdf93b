"""The bundle: a folder with a manifest, `elastic.json`, and the artifacts that it lists.

Opening checks the size of every file, and hashes on request. Writing happens in a folder beside the bundle that takes its place
in one step when it is complete.
"""

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np

from elastic_runtime.contract.manifest import FileEntry, Manifest, decode
from elastic_runtime.errors import BundleError
from elastic_runtime.swap import staging

MANIFEST = "elastic.json"


class Bundle:
    """An open bundle: its folder and its checked manifest."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle.open({str(self.folder)!r})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], hashes: bool = False) -> "Bundle":
        """Open a folder; check its manifest, its files' sizes and, on request, their SHA-256.

        Raises: BundleError naming the field or file that is wrong.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            what = "does not exist" if not folder.exists() else f"holds no {MANIFEST}"
            model = (folder / "model_index.json").is_file()
            make = f"It is a diffusers folder: elastic-export onnx {folder} -o BUNDLE" if model else f"elastic-export onnx -o {folder}"
            raise BundleError(f"{folder} is not a bundle: it {what}. {make if model else f'Make one with: {make}'}")
        bundle = cls(folder, decode(path.read_bytes(), str(path)))
        for entry in bundle.manifest.files():
            bundle._check(entry, hashes)
        return bundle

    def file(self, relative: str) -> Path:
        """Path of a listed file; a name that leaves the folder is refused."""
        pure = PurePosixPath(relative)
        path = self.folder / pure
        odd = "\\" in relative or "\0" in relative
        if odd or pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{self.folder / MANIFEST} names a file outside the bundle: {relative!r}. Do not use this bundle.")
        return path

    def _check(self, entry: FileEntry, hashes: bool) -> None:
        path = self.file(entry.path)
        if not path.is_file():
            raise BundleError(f"{path} is missing: the bundle is incomplete. Copy it again, or export it again.")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(f"{path} is damaged: {size} bytes where the manifest says {entry.bytes}. Copy or export it again.")
        if hashes and sha256(path) != entry.sha256:
            raise BundleError(f"{path} is damaged: its SHA-256 is not the manifest's. Copy or export it again.")

    def reference(self) -> dict[str, np.ndarray]:
        """Arrays of the recorded reference run, `graph/feed/name` and `graph/budget/name` (see `elastic_runtime.contract.reference`)."""
        if self.manifest.reference is None:
            raise BundleError(f"{self.folder} holds no reference outputs: export it again")
        path = self.file(self.manifest.reference.path)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} is damaged: {error}. Copy or export it again.") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def entry(folder: Path, path: Path) -> FileEntry:
    """The manifest's entry for a file that lies in `folder`."""
    return FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))


@contextlib.contextmanager
def writing(folder: Path, extend: Bundle | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `folder` (with `extend`'s files linked into it) that replaces it on success.

    The caller writes the artifacts and, last, the manifest with `write_manifest`. On any error nothing of `folder`
    has changed.
    """
    with staging(folder) as stage:
        if extend:
            for old in extend.manifest.files():
                target = stage / old.path
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(extend.file(old.path), target)
                except OSError:  # another file system, or one without hard links
                    shutil.copy2(extend.file(old.path), target)
        yield stage


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `elastic.json`, after checking that what was written reads back as the same manifest."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    if decode(text, MANIFEST) != manifest:
        raise BundleError("the manifest does not survive its own format; this is a bug, please report it")
    (folder / MANIFEST).write_bytes(text + b"\n")
