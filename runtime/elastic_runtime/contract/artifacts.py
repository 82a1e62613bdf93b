"""What a bundle holds, as records of its manifest: files, tensor specs, graphs, and each target's artifacts with what proved them."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from elastic_runtime.contract import precision as precisions
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.records import Large, Record, Share

# Times the original's own error: a right lowering adds in another order, and is off by as much again or a few times more (4.1 times in the
# decoder of FLUX at 512 pixels, whose convolutions ONNX Runtime adds up in one row of 4,608 and torch in blocks).
ROUNDINGS = 8
MOST_ROUNDING = 2.5e-4


class FileEntry(Record, frozen=True, kw_only=True):
    """One file of the bundle: `path` is relative, with forward slashes."""

    path: str
    bytes: Large
    sha256: str


class TensorSpec(Record, frozen=True, kw_only=True):
    """Name, dtype and shape of a graph's input or output; a text dimension is open (`B`, `J`), or a multiple of one
    (`8*h`)."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


def dimension(size: str) -> str:
    """The open dimension in `h` or `8*h`."""
    return size.rpartition("*")[2]


def factor(size: str) -> int:
    """How many times the open dimension is taken: 8 in `8*h`, 1 in `h`."""
    return int(size.rpartition("*")[0] or 1)


def measure(size: int | str, sizes: Mapping[str, int]) -> int:
    """A shape's entry as a number, where the open dimensions have `sizes`."""
    return size if isinstance(size, int) else factor(size) * sizes[dimension(size)]


def open_sizes(specs: Iterable["TensorSpec"], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes of the open dimensions of `specs`, by the shapes of their arrays."""
    return {
        dimension(size): length // factor(size)
        for spec in specs
        for size, length in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(size, str)
    }


def batched(specs: Iterable["TensorSpec"]) -> tuple[str, ...]:
    """Those that have a row for each sample, by name."""
    return tuple(spec.name for spec in specs if spec.shape[:1] == ("B",))


def sized(size: int | str, sizes: Mapping[str, int]) -> int | None:
    """As `measure`; None where nothing says how large the open dimension is."""
    return measure(size, sizes) if isinstance(size, int) or dimension(size) in sizes else None


class Verification(Record, frozen=True, kw_only=True):
    """What running an artifact at one budget gave against the reference outputs.

    `tolerance` bounds `max_abs` in units of max(1, max |reference|), and `bound` is that product (None in files of before, and where
    nothing is finite); `where` says what ran it.
    """

    budget: dict[str, int]
    max_abs: float
    cosine: float
    psnr_db: float
    finite: bool
    tolerance: float
    passed: bool
    where: str
    bound: float | None = None

    @property
    def bounded(self) -> str:
        """What `max_abs` may be, to be shown beside it."""
        return f"{self.tolerance:.0e} of the largest" if self.bound is None else f"{self.bound:.1e}"

    @property
    def figure(self) -> str:
        """What an error says of it."""
        if self.bound is None:
            return f"max abs error {self.max_abs:.2e}" if self.finite else "values that are not finite"
        return f"max abs error {self.max_abs:.2e} of at most {self.bound:.2e}"

    @property
    def share(self) -> float:
        """`max_abs` in units of what it may be."""
        return self.max_abs / self.bound if self.bound else self.max_abs


class CoremlCall(Record, frozen=True, kw_only=True):
    """One call that a package takes: a function and the `sizes` of open dimensions (and values of 0-d inputs) that it
    takes.

    No sizes: one function takes every size in the graph's spans (and the artifact's batch).
    """

    function: str
    budget: dict[str, int]
    sizes: dict[str, int]


class Apart(Record, frozen=True, kw_only=True):
    """A file of its own for what a run computes of a sample's conditions alone (time, class, pooled text), which is the same whatever is
    drawn: it is run once for all steps of a picture.

    `path` is the file. It takes those `inputs` of the graph and gives `outputs`, a row for each sample. The artifact's own file takes
    these beside the graph's inputs, without those that are `gone`.

    A Core ML package is both: `path` is the artifact's own, and `call` the function of it, for runs of as many rows as it says of `B`.
    """

    path: str
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    gone: tuple[str, ...]
    call: CoremlCall | None = None

    def own(self, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """What the file takes, of a graph's `inputs`."""
        return tuple(spec for spec in inputs if spec.name in self.inputs)

    def rest(self, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """What the artifact's own file takes instead of a graph's `inputs`."""
        return (*(spec for spec in inputs if spec.name not in self.gone), *self.outputs)


class Artifact(Record, frozen=True, kw_only=True, tag_field="target"):
    """One compiled file or folder. `unverified` says why an artifact without `verified` rows could not be run. With `conditions` it is a
    part of the graph, and that file is the other."""

    precision: precisions.Name
    files: tuple[FileEntry, ...]
    toolchain: dict[str, str]
    verified: tuple[Verification, ...] = ()
    unverified: str | None = None
    conditions: Apart | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("an artifact needs at least one of `files`")

    @property
    def path(self) -> str:
        """The file that a backend opens; the others lie where it expects them."""
        return self.files[0].path

    @property
    def slot(self) -> str:
        """The path without the number that its first folder got where the name stood already: what `path` takes the place of."""
        return re.sub(r"^([^/]+)-\d+/", r"\1/", self.path)

    @property
    def target(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def tolerance(self) -> float:
        """The bound that it is held to, in units of max(1, max |reference|)."""
        return precisions.tolerance(self.precision, self._compression)

    @property
    def rank(self) -> tuple[int, int]:
        """How exact it is: less is more exact."""
        return precisions.rank(self.precision, self._compression)

    @property
    def held(self) -> str:
        """Its precision for people to read, and after a comma how its weights came to their bits where that is not as usual."""
        return ", ".join(filter(None, (self.precision, self._compression)))

    @property
    def _compression(self) -> precisions.Compression | None:
        return None


class OnnxArtifact(Artifact, frozen=True, kw_only=True, tag="onnx"):
    """An ONNX file; weights of 256 MB and more lie beside it.

    `weight_rounding` is how matrices that tokens pass came to blocks of few bits: each weight to the nearest step, or by what the matrix
    multiplies (`gptq`). `float_matrices` are those of a precision of few bits that keep their floats, the one first that it would have cost
    most to round. Neither changes a name or a tolerance, so that one artifact takes the other's place.
    """

    opset: int
    weight_rounding: Literal["nearest", "gptq"] = "nearest"
    float_matrices: tuple[str, ...] = ()

    @property
    def held(self) -> str:
        rounding = "" if self.weight_rounding == "nearest" else self.weight_rounding
        kept = f"{len(self.float_matrices)} in floats" if self.float_matrices else ""
        return ", ".join(filter(None, (self.precision, rounding, kept)))


class Range(Record, frozen=True):
    """Smallest, preferred and largest size of an open dimension in a TensorRT profile."""

    min: int
    opt: int
    max: int


class Profile(Record, frozen=True, kw_only=True):
    """One TensorRT optimization profile: the range of every open dimension of the graph."""

    dimensions: dict[str, Range]

    def contains(self, sizes: Mapping[str, int]) -> bool:
        """Whether the profile takes inputs whose open dimensions have these sizes."""
        return all(self.dimensions[name].min <= size <= self.dimensions[name].max for name, size in sizes.items())

    def shape(self, spec: TensorSpec, end: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """Shape of an input or output at one end of the profile."""
        sizes = {name: getattr(size, end) for name, size in self.dimensions.items()}
        return tuple(measure(size, sizes) for size in spec.shape)


class Network(Record, frozen=True, kw_only=True):
    """What the TensorRT parser made of the graph: layers in all and of the kinds that matter, as seen while
    building."""

    layers: int
    attentions: int
    loops: int


class TrtArtifact(Artifact, frozen=True, kw_only=True, tag="trt"):
    """A TensorRT engine. It belongs to one builder, one version of it and the GPU generations `sms` (89 for 8.9).

    `source` is the ONNX file that it was built from; `stripped` engines need it to be opened, since it holds their
    weights.
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


class CoremlArtifact(Artifact, frozen=True, kw_only=True, tag="coreml"):
    """A Core ML package, which is a folder. Where the graph says int64, it takes int32.

    `calls` lists what it takes: one static function a budget (`functions`), one function with a list of sizes
    (`enumerated`) or with open ones (`range`). `deployment_target` is the oldest system that opens it. `reductions` is
    the precision of its norms.
    """

    package: str
    deployment_target: str
    shapes: Literal["functions", "enumerated", "range"]
    batch: Span
    calls: tuple[CoremlCall, ...]
    reductions: Literal["fp32", "fp16"]
    compression: precisions.Compression | None = None

    @property
    def path(self) -> str:
        return self.package

    @property
    def _compression(self) -> precisions.Compression | None:
        return self.compression


class Graph(Record, frozen=True, kw_only=True):
    """One graph and its artifacts. `dimensions` are the spans of its open dimensions, batch `B` among them.

    `rounding` is the original's own error in float32, against float64 on the recorded feeds, in units of max(1, |reference|); None
    where it was not measured. `unproven` are budgets that the export was told not to prove.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: dict[str, Span]
    artifacts: tuple[OnnxArtifact | TrtArtifact | CoremlArtifact, ...]
    rounding: Share | None = None
    unproven: tuple[dict[str, int], ...] = ()

    def __post_init__(self) -> None:
        letters = {dimension(size) for spec in (*self.inputs, *self.outputs) for size in spec.shape if isinstance(size, str)}
        if unknown := sorted((letters | {"B"}) - self.dimensions.keys()):
            raise ValueError(f"`dimensions` lacks {', '.join(unknown)}")

    def tolerance(self, artifact: Artifact | None = None, precision: str = precisions.EXACT) -> float:
        """The bound that an artifact of this graph (None: one of `precision`) is held to, in units of max(1, |reference|): its
        precision's, or `ROUNDINGS` times the original's own error where that is more. A larger error than `MOST_ROUNDING` is that of a
        model that decides by thresholds, which float64 decided otherwise: it says nothing of rounding."""
        own = self.rounding if self.rounding is not None and self.rounding <= MOST_ROUNDING else 0.0
        return max(artifact.tolerance if artifact else precisions.tolerance(precision), ROUNDINGS * own)

    @property
    def batch(self) -> Span:
        """Batches that one run takes."""
        return self.dimensions["B"]

    @property
    def batched(self) -> tuple[str, ...]:
        """Inputs that have a row for each sample."""
        return batched(self.inputs)
