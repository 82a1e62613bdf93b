"""The manifest, `elastic.json`: what a bundle says about itself.

It is strict: a missing or unknown field is an error that names it, so a reader never guesses.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from elastic_runtime.contract import precision
from elastic_runtime.contract.artifacts import Artifact, FileEntry, Graph
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.records import Count, Finite, Large, Natural, Record, Share
from elastic_runtime.contract.schedule import Ancestral, Edm, Schedule
from elastic_runtime.errors import BundleError

SCHEMA_VERSION = 3
MOST_UPSCALE = 1024  # pixels a side of a latent pixel, or latent pixels of a patch
LEAST_SCALE = 1e-12
# Steps by stage that a plan of this name has where none are said: the presets'.
OWN_STEPS = {"4x": (5, 6, 7), "7x": (2, 3, 5)}
# Where `img_ids` and `txt_ids` put tokens (see `Patches`), and how many columns they have.
Layout = Literal["origin", "centred", "sequence", "after_text"]
COLUMNS = {"origin": 3, "centred": 3, "sequence": 4, "after_text": 3}


class Vae(Record, frozen=True, kw_only=True):
    """How latents become the decoder's input: `latent / scaling_factor + shift_factor`; `upscale` pixels a latent."""

    scaling_factor: Finite
    shift_factor: Finite
    upscale: int

    def __post_init__(self) -> None:
        if not 1 <= self.upscale <= MOST_UPSCALE or not abs(self.scaling_factor) > LEAST_SCALE:
            raise ValueError(
                f"`upscale` is 1 to {MOST_UPSCALE} and `scaling_factor` is not 0, got {self.upscale} and {self.scaling_factor}"
            )


class Patches(Record, frozen=True, kw_only=True):
    """How a transformer over patches takes a latent: row-major patches of `size` x `size`, packed (c, ph, pw), in and
    out alike.

    `positions` is the input that places each token: `pos_ids` (row, column) in the coordinates of a table of `table` x
    `table` places, in which a picture lies centred; or `img_ids`, beside `txt_ids` for the text, by `layout`, for token
    k of a text of T tokens:
        origin: image (0, row, column), text (0, 0, 0). FLUX.1, Krea 2.
        centred: image (0, row, column) counted from the middle of the stage's picture, text (k', k', k') going on beyond
        its edge. Qwen-Image.
        sequence: image (0, row, column, 0), text (0, 0, 0, k), reference picture i (10 + 10 i, row, column, 0). FLUX.2.
        after_text: text (1 + k, 0, 0), image (T + 1, row, column). Z-Image.
    A row or a column is one patch, halves are allowed. With `guidance_embeds` there is an input `guidance`, the scale
    that the model was distilled with. With `multiple` the graph takes that many tokens or a multiple of it, of the image
    and of the text alike, and inputs `img_pad` (B, S) and `txt_pad` (B, T): 1 where a row fills up, which come last and,
    of the image, at place 0.
    """

    size: int
    positions: Literal["img_ids", "pos_ids"]
    table: Count | None = None
    guidance_embeds: bool = False
    layout: Layout = "origin"
    multiple: Count | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MOST_UPSCALE:
            raise ValueError(f"a patch has a `size` of 1 to {MOST_UPSCALE}, got {self.size}")
        if (self.positions == "pos_ids") != (self.table is not None):
            raise ValueError(f"`pos_ids` have a `table` and `img_ids` have none, got {self.positions} and {self.table}")
        if self.layout != "origin" and self.table is not None:
            raise ValueError(f"a `layout` is of `img_ids`, got {self.layout} of {self.positions}")
        if self.multiple is not None and self.table is not None:
            raise ValueError(f"a `multiple` is of `img_ids`, got {self.multiple} of {self.positions}")

    @property
    def columns(self) -> int:
        """How many numbers place a token."""
        return COLUMNS[self.layout] if self.table is None else 2

    @property
    def references(self) -> bool:
        """Whether tokens of pictures to edit after may stand beside those of the one that is drawn; S counts both."""
        return self.layout == "sequence"

    def filled(self, count: int) -> int:
        """How many tokens the graph takes for so many of the image or of the text."""
        return count if self.multiple is None else -(-count // self.multiple) * self.multiple

    def filled_all(self, counts: Iterable[int]) -> tuple[int, ...]:
        """The same of each of `counts`."""
        return tuple(self.filled(int(count)) for count in counts)


class Template(Record, frozen=True, kw_only=True):
    """What a language model is told around a prompt: `before` and `after` it, as text that the tokenizer reads together
    with the prompt or, where `apart`, `after` by itself. The first `drop` tokens give no embeddings. What `without` lists
    is taken out of a prompt first."""

    before: str
    after: str
    drop: Natural = 0
    apart: bool = False
    without: tuple[str, ...] = ()


class TextEncoder(Record, frozen=True, kw_only=True):
    """A graph from `input_ids` (B, N) int64, and its tokenizer, a file that the tokenizers package reads.

    Where it is `padded`, prompts are padded with `pad_token_id` on their `padding_side` to N = `max_length`, a graph that takes an
    `attention_mask` (B, N) int64 is told which tokens are the prompt's (1), and the padding gives embeddings like the
    rest. Where it is not, the graph is causal, N is open or the longest, and the prompt's own tokens alone give
    embeddings. A `template` adds `drop` tokens to N that give none. `gives` names the graph's outputs: see `Text`.
    """

    graph: str
    tokenizer: FileEntry
    max_length: Count
    pad_token_id: Natural
    gives: tuple[Literal["pooled", "penultimate_hidden_state", "last_hidden_state", "hidden_states"], ...]
    template: Template | None = None
    padded: bool = True
    padding_side: Literal["left", "right"] = "right"

    @property
    def longest(self) -> int:
        """Tokens that the graph takes at most."""
        return self.max_length + (self.template.drop if self.template else 0)


class Text(Record, frozen=True, kw_only=True):
    """How prompts become a model's `encoder_hidden_states` (B, `length`, `width`) and `pooled_projections` (B,
    `pooled`), which it has none of where `pooled` is 0.

    In the order of `encoders`: their `pooled` are joined by features. Their `penultimate_hidden_state` are joined by
    features too and padded with zeros to `width`; each `last_hidden_state` or `hidden_states` follows as further tokens;
    what then lacks to `length` are zeros. Where an encoder is not `padded`, texts are as long as their prompts, `length`
    at most. Without encoders the embeddings come from elsewhere. Where there are `layers`, an embedding has so many rows
    of `width` a token, and the graph `text_fusion` makes one of them: `tapped` (B, T, layers, width) -> `fused` (B, T,
    width).
    """

    encoders: tuple[TextEncoder, ...]
    length: Count
    width: Count
    pooled: Natural
    layers: Count | None = None


class Model(Record, frozen=True, kw_only=True):
    """What the runtime must know to sample. `sample_shape` is (C, H, W); `null_label` stands for "no label".

    Where `patches` tells how tokens are made of the sample, its size is a default and others are allowed. `text` models
    take prompts and have no classes. `tokens` says what a masked model's token ids are: grey levels from black to
    white, or codes of a decoder that is not here. Where `packed` is set, the graph takes and gives a sample as tokens,
    row-major patches of `packed` x `packed` laid out (c, ph, pw), and its size is the only one.

    Of guidance: with `guidance_rescale` "norm" a prediction that it led has, token by token, the length of the one
    without. `guidance_off` is the largest `guidance_scale` that is none, in the words of the model's pipeline: 1 where a
    scale g gives `weak + g (strong - weak)`, 0 where it gives `strong + g (strong - weak)`. A `distilled` one draws
    without guidance of its own, and `few_steps` are those that it was distilled to draw in.
    """

    name: str
    family: str
    config: dict[str, Any]
    prediction: Literal["velocity", "v", "epsilon", "edm", "logits"]
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
    guidance_rescale: Literal["norm"] | None = None
    guidance_off: Literal[0, 1] = 1
    distilled: bool = False
    packed: Count | None = None
    few_steps: Count | None = None

    def __post_init__(self) -> None:
        if self.learned_variance and not isinstance(self.schedule, Ancestral):
            raise ValueError(f"`learned_variance` is for schedules that ddpm draws from, not {self.schedule.__struct_config__.tag}")
        if (self.prediction == "edm") != isinstance(self.schedule, Edm):
            raise ValueError(f"the prediction and the schedule are both edm or neither, got {self.prediction} and {self.schedule}")
        if self.guided_channels is not None and not 1 <= self.guided_channels <= self.sample_shape[0]:
            raise ValueError(f"`guided_channels` must be 1 to {self.sample_shape[0]}, the sample's, got {self.guided_channels}")

    def guidance_scale(self, scale: float) -> float:
        """What its pipeline calls the scale s of `weak + s (strong - weak)`."""
        return scale - (1 - self.guidance_off)

    @property
    def unconditional(self) -> bool:
        """Whether it draws from noise alone, with no class and no text."""
        return not self.num_classes and self.text is None and self.patches is None

    @property
    def pixels(self) -> bool:
        """Whether a sample is a picture as it is, with values in [-1, 1]."""
        return self.vae is None and self.tokens is None and self.sample_shape[0] in (1, 3)


class Cost(Record, frozen=True, kw_only=True):
    """Cost of one forward pass of one sample at a budget: FLOPs (2 a multiply-add), bytes of weights and activations in
    float32."""

    budget: dict[str, int]
    flops: Large
    weight_bytes: Large
    activation_bytes: Large


class Quality(Record, frozen=True, kw_only=True):
    """What the model card measured at a budget, or along a plan of `steps` by stage (see the card for the protocol)."""

    budget: dict[str, int]
    accuracy: Share
    frechet_distance: Finite
    plan: str | None = None
    steps: tuple[Count, ...] | None = None

    def __post_init__(self) -> None:
        if self.frechet_distance < 0 or (self.steps is not None and not self.steps):
            raise ValueError(f"`frechet_distance` is 0 or more and `steps` are some, got {self.frechet_distance} and {self.steps}")
        if self.steps is not None and self.plan is None:
            raise ValueError(f"`steps` are a plan's, got {list(self.steps)} without `plan`")

    @property
    def where(self) -> str:
        """The plan, with its steps unless they are the preset's own, or the budget as in `budget.key`."""
        return key(self.budget) if self.plan is None else plan_label(self.plan, self.steps)


class Rounded(Quality, frozen=True, kw_only=True):
    """What the card measured in one precision: rows of one protocol, all precisions from the same noise, float32 among them.

    `psnr_db` is that of its pictures against float32's, None where they are the same.
    """

    precision: precision.Name
    psnr_db: Finite | None = None


def plan_label(name: str, steps: Sequence[int] | None) -> str:
    """What users call a plan in so many steps by stage: `full, 20 steps`, and `4x` where they are the preset's own."""
    return name if steps is None or tuple(steps) == OWN_STEPS.get(name) else f"{name}, {'+'.join(map(str, steps))} steps"


class Adapter(Record, frozen=True, kw_only=True):
    """A LoRA file that was fused into the weights, `scale` times."""

    name: str
    sha256: str
    scale: Finite


class Provenance(Record, frozen=True, kw_only=True):
    """Where the bundle came from. `checkpoint_sha256` is the transformer's, `weights_sha256` are those of all components, as their files
    were read, before `adapters` changed them."""

    command: str
    created: str
    versions: dict[str, str]
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    ignored_weights: tuple[str, ...] = ()
    weights_sha256: dict[str, str] = msgspec.field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()


class Manifest(Record, frozen=True, kw_only=True):
    """The content of `elastic.json`."""

    schema_version: int
    model: Model
    axes: tuple[Axis, ...]
    graphs: dict[str, Graph]
    cost: tuple[Cost, ...]
    provenance: Provenance
    quality: tuple[Quality, ...] = ()
    precisions: tuple[Rounded, ...] = ()
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
        standing = [new.pop(artifact.slot, artifact) for artifact in self.graphs[graph].artifacts]
        whole = msgspec.structs.replace(self.graphs[graph], artifacts=(*standing, *new.values()))
        return msgspec.structs.replace(self, graphs=self.graphs | {graph: whole})

    def rounded(self, graph: str, rounding: float | None) -> "Manifest":
        """This manifest with the original's rounding of a graph, the largest that was measured."""
        known = [each for each in (self.graphs[graph].rounding, rounding) if each is not None]
        whole = msgspec.structs.replace(self.graphs[graph], rounding=min(max(known), 1.0) if known else None)
        return msgspec.structs.replace(self, graphs=self.graphs | {graph: whole})

    def left(self, graph: str, unproven: Iterable[dict[str, int]]) -> "Manifest":
        """This manifest with the budgets of a graph that were not to be proven."""
        whole = msgspec.structs.replace(self.graphs[graph], unproven=tuple(unproven))
        return msgspec.structs.replace(self, graphs=self.graphs | {graph: whole})

    def axis(self, name: str) -> Axis:
        """The axis of that name; raises BundleError naming the ones that exist."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise BundleError(f"this bundle has no axis {name!r}; it has {', '.join(axis.name for axis in self.axes) or 'none'}")
