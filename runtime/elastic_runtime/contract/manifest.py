"""The manifest, `elastic.json`: what a bundle says about itself.

It is strict: a missing or unknown field is an error that names it, so a reader never guesses.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from elastic_runtime.contract import precision as precisions
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.records import read_record
from elastic_runtime.contract.schedule import LinearBeta, Schedule, ShiftedCosine
from elastic_runtime.errors import BundleError

SCHEMA_VERSION = 2
# Steps by stage that a plan of this name has where none are said: the presets'.
OWN_STEPS = {"4x": (5, 6, 7), "7x": (2, 3, 5)}


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the manifest."""


class FileEntry(_Record, frozen=True, kw_only=True):
    """One file of the bundle: `path` is relative, with forward slashes."""

    path: str
    bytes: int
    sha256: str


class TensorSpec(_Record, frozen=True, kw_only=True):
    """Name, dtype and shape of a graph's input or output; a text dimension is open (`B`, `J`), or a multiple of one
    (`8*h`)."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


def dimension(size: str) -> str:
    """The open dimension in `h` or `8*h`."""
    return size.rpartition("*")[2]


def measure(size: int | str, sizes: Mapping[str, int]) -> int:
    """A shape's entry as a number, where the open dimensions have `sizes`."""
    return size if isinstance(size, int) else int(size.rpartition("*")[0] or 1) * sizes[dimension(size)]


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

    precision: precisions.Name
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
    def _compression(self) -> precisions.Compression | None:
        return None


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
        sizes = {name: getattr(size, end) for name, size in self.dimensions.items()}
        return tuple(measure(size, sizes) for size in spec.shape)


class Network(_Record, frozen=True, kw_only=True):
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


class CoremlCall(_Record, frozen=True, kw_only=True):
    """One call that a package takes: a function and the `sizes` of open dimensions (and values of 0-d inputs) that it
    takes.

    No sizes: one function takes every size in the graph's spans (and the artifact's batch).
    """

    function: str
    budget: dict[str, int]
    sizes: dict[str, int]


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


class Graph(_Record, frozen=True, kw_only=True):
    """One graph and its artifacts. `dimensions` are the spans of its open dimensions, batch `B` among them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: dict[str, Span]
    artifacts: tuple[OnnxArtifact | TrtArtifact | CoremlArtifact, ...]

    def __post_init__(self) -> None:
        letters = {dimension(size) for spec in (*self.inputs, *self.outputs) for size in spec.shape if isinstance(size, str)}
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

    def __post_init__(self) -> None:
        if self.upscale < 1 or not self.scaling_factor:
            raise ValueError(f"`upscale` is 1 or more and `scaling_factor` is not 0, got {self.upscale} and {self.scaling_factor}")


class Patches(_Record, frozen=True, kw_only=True):
    """How a transformer over patches takes a latent: row-major patches of `size` x `size`, packed (c, ph, pw), in and
    out alike.

    `positions` is the input that places each token: `img_ids` (0, row, column), with rows and columns as they are;
    `pos_ids` (row, column) in the coordinates of a table of `table` x `table` places, in which a picture lies centred.
    A row or a column is one patch, halves are allowed. With `guidance_embeds` there is an input `guidance`, the scale
    that the model was distilled with.
    """

    size: int
    positions: Literal["img_ids", "pos_ids"]
    table: int | None = None
    guidance_embeds: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a patch has a `size` of 1 or more, got {self.size}")
        if (self.positions == "pos_ids") != (self.table is not None):
            raise ValueError(f"`pos_ids` have a `table` and `img_ids` have none, got {self.positions} and {self.table}")


class TextEncoder(_Record, frozen=True, kw_only=True):
    """A graph from `input_ids` (B, max_length) int64, and its tokenizer, a file that the tokenizers package reads.

    Prompts are padded with `pad_token_id` to `max_length`; there is no mask. `gives` names the graph's outputs: see
    `Text`.
    """

    graph: str
    tokenizer: FileEntry
    max_length: int
    pad_token_id: int
    gives: tuple[Literal["pooled", "penultimate_hidden_state", "last_hidden_state"], ...]


class Text(_Record, frozen=True, kw_only=True):
    """How prompts become a model's `encoder_hidden_states` (B, `length`, `width`) and `pooled_projections` (B,
    `pooled`).

    In the order of `encoders`: their `pooled` are joined by features. Their `penultimate_hidden_state` are joined by
    features too and padded with zeros to `width`; each `last_hidden_state` follows as further tokens; what then lacks
    to `length` are zeros. Without encoders the embeddings come from elsewhere.
    """

    encoders: tuple[TextEncoder, ...]
    length: int
    width: int
    pooled: int


class Model(_Record, frozen=True, kw_only=True):
    """What the runtime must know to sample. `sample_shape` is (C, H, W); `null_label` stands for "no label".

    Where `patches` tells how tokens are made of the sample, its size is a default and others are allowed. `text` models
    take prompts and have no classes. `tokens` says what a masked model's token ids are: grey levels from black to
    white, or codes of a decoder that is not here.
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
    patches: Patches | None = None
    text: Text | None = None
    learned_variance: bool = False
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        if self.learned_variance and not isinstance(self.schedule, LinearBeta | ShiftedCosine):
            raise ValueError(f"`learned_variance` is for schedules that ddpm draws from, not {self.schedule.__struct_config__.tag}")
        if self.guided_channels is not None and not 1 <= self.guided_channels <= self.sample_shape[0]:
            raise ValueError(f"`guided_channels` must be 1 to {self.sample_shape[0]}, the sample's, got {self.guided_channels}")

    @property
    def pixels(self) -> bool:
        """Whether a sample is a picture as it is, with values in [-1, 1]."""
        return self.vae is None and self.tokens is None and self.sample_shape[0] in (1, 3)


class Cost(_Record, frozen=True, kw_only=True):
    """Cost of one forward pass of one sample at a budget: FLOPs (2 a multiply-add), bytes of weights and activations in
    float32."""

    budget: dict[str, int]
    flops: int
    weight_bytes: int
    activation_bytes: int


class Quality(_Record, frozen=True, kw_only=True):
    """What the model card measured at a budget, or along a plan of `steps` by stage (see the card for the protocol)."""

    budget: dict[str, int]
    accuracy: float
    frechet_distance: float
    plan: str | None = None
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.plan is None:
            raise ValueError(f"`steps` are a plan's, got {list(self.steps)} without `plan`")

    @property
    def where(self) -> str:
        """The plan, with its steps unless they are the preset's own, or the budget as in `budget.key`."""
        return key(self.budget) if self.plan is None else plan_label(self.plan, self.steps)


def plan_label(name: str, steps: Sequence[int] | None) -> str:
    """What users call a plan in so many steps by stage: `full, 20 steps`, and `4x` where they are the preset's own."""
    return name if steps is None or tuple(steps) == OWN_STEPS.get(name) else f"{name}, {'+'.join(map(str, steps))} steps"


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

    def __post_init__(self) -> None:
        for encoder in self.model.text.encoders if self.model.text else ():
            graph = self.graphs.get(encoder.graph)
            if graph is None or {spec.name for spec in graph.outputs} != set(encoder.gives):
                raise ValueError(f"the text encoder {encoder.graph!r} gives {', '.join(encoder.gives)}, but no graph of that name does")

    def files(self) -> Iterator[FileEntry]:
        """Every file that the manifest lists."""
        for graph in self.graphs.values():
            for artifact in graph.artifacts:
                yield from artifact.files
        if self.model.text:
            for encoder in self.model.text.encoders:
                yield encoder.tokenizer
        if self.reference:
            yield self.reference

    def joined(self, graph: str, artifacts: Iterable[Artifact]) -> "Manifest":
        """This manifest with `artifacts` added to a graph; one in the same slot takes the old one's place."""
        new = {artifact.slot: artifact for artifact in artifacts}
        kept = tuple(artifact for artifact in self.graphs[graph].artifacts if artifact.slot not in new)
        whole = msgspec.structs.replace(self.graphs[graph], artifacts=(*kept, *new.values()))
        return msgspec.structs.replace(self, graphs=self.graphs | {graph: whole})

    def axis(self, name: str) -> Axis:
        """The axis of that name; raises BundleError naming the ones that exist."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise BundleError(f"this bundle has no axis {name!r}; it has {', '.join(axis.name for axis in self.axes) or 'none'}")


def decode(text: bytes, where: str) -> Manifest:
    """Read a manifest; raise BundleError naming the field, the schema or the place that is wrong.

    One of version 1 is one of this version without a word changed, unless its model draws from patches: it lacks their
    axis.
    """
    again = "export the bundle again"
    manifest = read_record(text, where, Manifest, SCHEMA_VERSION, "manifest", again, BundleError, older=(1,))
    if manifest.schema_version != SCHEMA_VERSION and manifest.model.patches:
        raise BundleError(
            f"{where} has schema_version {manifest.schema_version}, in which {manifest.model.name} has no axis `tokens` yet: {again}"
        )
    return msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION)
