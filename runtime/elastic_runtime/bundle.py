"""The bundle: a folder with a manifest, `elastic.json`, and the artifacts that it lists.

The manifest is strict: a missing or unknown field is an error that names it. Opening checks the size of every file, and
hashes on request. Writing happens in a folder beside the bundle that takes its place in one step when it is complete.
"""

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
import numpy as np

from elastic_runtime.axis import Axis, Span
from elastic_runtime.budget import Budget
from elastic_runtime.errors import BundleError
from elastic_runtime.schedule import Schedule
from elastic_runtime.swap import staging

SCHEMA_VERSION = 1
MANIFEST = "elastic.json"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the manifest."""


class FileEntry(_Record, frozen=True, kw_only=True):
    """One file of the bundle: `path` is relative, with forward slashes."""

    path: str
    bytes: int
    sha256: str


class TensorSpec(_Record, frozen=True, kw_only=True):
    """Name, dtype and shape of a graph's input or output; a text dimension is open (`B`, `J`)."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class Verification(_Record, frozen=True, kw_only=True):
    """What running an artifact at one budget gave against the reference outputs.

    `tolerance` bounds `max_abs` in units of max(1, |reference|); `where` says what ran it.
    """

    budget: dict[str, int]
    max_abs: float
    cosine: float
    psnr_db: float
    finite: bool
    tolerance: float
    passed: bool
    where: str


class Artifact(_Record, frozen=True, kw_only=True, tag_field="target"):
    """One compiled file or folder. `unverified` says why an artifact without `verified` rows could not be run."""

    precision: Literal["fp32", "fp16", "bf16"]
    files: tuple[FileEntry, ...]
    toolchain: dict[str, str]
    verified: tuple[Verification, ...] = ()
    unverified: str | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("an artifact needs at least one of `files`")

    @property
    def path(self) -> str:
        """The file that a backend opens; the others lie where it expects them."""
        return self.files[0].path

    @property
    def target(self) -> str:
        return str(self.__struct_config__.tag)


class OnnxArtifact(Artifact, frozen=True, kw_only=True, tag="onnx"):
    """An ONNX file; weights above 2 GB lie beside it."""

    opset: int


class Range(_Record, frozen=True):
    """Smallest, preferred and largest size of an open dimension in a TensorRT profile."""

    min: int
    opt: int
    max: int


class Profile(_Record, frozen=True, kw_only=True):
    """One TensorRT optimization profile: the range of every open dimension of the graph."""

    dimensions: dict[str, Range]

    def contains(self, sizes: Mapping[str, int]) -> bool:
        """Whether the profile takes inputs whose open dimensions have these sizes."""
        return all(self.dimensions[name].min <= size <= self.dimensions[name].max for name, size in sizes.items())

    def shape(self, spec: TensorSpec, end: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """Shape of an input or output at one end of the profile."""
        return tuple(getattr(self.dimensions[size], end) if isinstance(size, str) else size for size in spec.shape)


class Network(_Record, frozen=True, kw_only=True):
    """What the TensorRT parser made of the graph: layers in all and of the kinds that matter, as seen while building."""

    layers: int
    attentions: int
    loops: int


class TrtArtifact(Artifact, frozen=True, kw_only=True, tag="trt"):
    """A TensorRT engine. It belongs to one builder, one version of it and the GPU generations `sms` (89 for 8.9).

    `source` is the ONNX file that it was built from; `stripped` engines need it to be opened, since it holds their weights.
    """

    builder: Literal["tensorrt", "tensorrt_rtx"]
    builder_version: str
    sms: tuple[int, ...]
    source: str
    source_sha256: str
    profiles: tuple[Profile, ...]
    network: Network
    refit: bool = False
    stripped: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False


class CoremlCall(_Record, frozen=True, kw_only=True):
    """One call that a package takes: a function and the `sizes` of the graph's open dimensions that it takes.

    No sizes: one function takes every size in the graph's spans (and the artifact's batch).
    """

    function: str
    budget: dict[str, int]
    sizes: dict[str, int]


class CoremlArtifact(Artifact, frozen=True, kw_only=True, tag="coreml"):
    """A Core ML package, which is a folder. Where the graph says int64, it takes int32.

    `calls` lists what it takes: one static function a budget (`functions`), one function with a list of sizes (`enumerated`) or with
    open ones (`range`). `deployment_target` is the oldest system that opens it. `reductions` is the precision of its norms.
    """

    package: str
    deployment_target: str
    shapes: Literal["functions", "enumerated", "range"]
    batch: Span
    calls: tuple[CoremlCall, ...]
    reductions: Literal["fp32", "fp16"]
    compression: Literal["palette8", "palette6", "palette4", "int8"] | None = None

    @property
    def path(self) -> str:
        return self.package


class Graph(_Record, frozen=True, kw_only=True):
    """One graph and its artifacts. `dimensions` are the spans of its open dimensions, batch `B` among them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: dict[str, Span]
    artifacts: tuple[OnnxArtifact | TrtArtifact | CoremlArtifact, ...]

    def __post_init__(self) -> None:
        letters = {size for spec in (*self.inputs, *self.outputs) for size in spec.shape if isinstance(size, str)}
        if unknown := sorted((letters | {"B"}) - self.dimensions.keys()):
            raise ValueError(f"`dimensions` lacks {', '.join(unknown)}")

    @property
    def batch(self) -> Span:
        """Batches that one run takes."""
        return self.dimensions["B"]


class Vae(_Record, frozen=True, kw_only=True):
    """How latents become the decoder's input: `latent / scaling_factor + shift_factor`; `upscale` pixels a latent."""

    scaling_factor: float
    shift_factor: float
    upscale: int


class Model(_Record, frozen=True, kw_only=True):
    """What the runtime must know to sample. `sample_shape` is (C, H, W); `null_label` stands for "no label".

    `tokens` says what a masked model's token ids are: grey levels from black to white, or codes of a decoder that is not here.
    """

    name: str
    family: str
    config: dict[str, Any]
    prediction: Literal["velocity", "v", "epsilon", "logits"]
    schedule: Schedule
    sample_shape: tuple[int, int, int]
    num_classes: int
    null_label: int
    weights: Literal["checkpoint", "random"]
    vae: Vae | None = None
    tokens: Literal["grey", "code"] | None = None

    @property
    def pixels(self) -> bool:
        """Whether a sample is a picture as it is, with values in [-1, 1]."""
        return self.vae is None and self.tokens is None and self.sample_shape[0] in (1, 3)


class Cost(_Record, frozen=True, kw_only=True):
    """Cost of one forward pass of one sample at a budget: FLOPs (2 a multiply-add), bytes of weights and activations."""

    budget: dict[str, int]
    flops: int
    weight_bytes: int
    activation_bytes: int


class Quality(_Record, frozen=True, kw_only=True):
    """What the model card measured at a budget (see the card for the protocol)."""

    budget: dict[str, int]
    accuracy: float
    frechet_distance: float


class Provenance(_Record, frozen=True, kw_only=True):
    """Where the bundle came from."""

    command: str
    created: str
    versions: dict[str, str]
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    ignored_weights: tuple[str, ...] = ()


class Manifest(_Record, frozen=True, kw_only=True):
    """The content of `elastic.json`."""

    schema_version: int
    model: Model
    axes: tuple[Axis, ...]
    graphs: dict[str, Graph]
    cost: tuple[Cost, ...]
    provenance: Provenance
    quality: tuple[Quality, ...] = ()
    reference: FileEntry | None = None

    def files(self) -> Iterator[FileEntry]:
        """Every file that the manifest lists."""
        for graph in self.graphs.values():
            for artifact in graph.artifacts:
                yield from artifact.files
        if self.reference:
            yield self.reference

    def joined(self, graph: str, artifacts: Iterable[Artifact]) -> "Manifest":
        """This manifest with `artifacts` added to a graph; one at the same path takes the old one's place."""
        new = {artifact.path: artifact for artifact in artifacts}
        kept = tuple(artifact for artifact in self.graphs[graph].artifacts if artifact.path not in new)
        whole = msgspec.structs.replace(self.graphs[graph], artifacts=(*kept, *new.values()))
        return msgspec.structs.replace(self, graphs=self.graphs | {graph: whole})

    def axis(self, name: str) -> Axis:
        """The axis of that name; raises BundleError naming the ones that exist."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise BundleError(f"this bundle has no axis {name!r}; it has {', '.join(axis.name for axis in self.axes) or 'none'}")


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
            raise BundleError(f"{folder} is not a bundle: it {what}. Make one with: elastic-export onnx -o {folder}")
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
        """Arrays of the recorded reference run, `graph/feed/name` and `graph/budget/name` (see `elastic_runtime.reference`)."""
        if self.manifest.reference is None:
            raise BundleError(f"{self.folder} holds no reference outputs: export it again")
        path = self.file(self.manifest.reference.path)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} is damaged: {error}. Copy or export it again.") from None


def decode(text: bytes, where: str) -> Manifest:
    """Read a manifest; raise BundleError naming the field, the schema or the place that is wrong."""
    try:
        version = msgspec.json.decode(text).get("schema_version")
    except (msgspec.DecodeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not a manifest: {error}. Copy or export the bundle again.") from None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade with: pip install -U elastic-export" if newer else "export the bundle again"
        raise BundleError(f"{where} has schema_version {version!r}; this version reads {SCHEMA_VERSION}: {advice}")
    try:
        return msgspec.json.decode(text, type=Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{where} is not a valid manifest: {error}. Export the bundle again.") from None


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


def key(budget: Mapping[str, int]) -> str:
    """Text form of a budget for file and array names: `latents=64`."""
    return ",".join(f"{name}={value}" for name, value in sorted(budget.items())) or "fixed"


def parse_key(text: str) -> Budget:
    """Inverse of `key`."""
    return Budget(**{name: int(value) for name, value in (pair.split("=") for pair in text.split(",") if pair != "fixed")})
