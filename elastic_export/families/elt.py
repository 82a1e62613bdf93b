"""ELT: an elastic looped transformer, N blocks applied L times with the same weights (arXiv 2604.09168).

Legend: B batch, C channels, T tokens, D width, N unique blocks, L loops. A forward pass costs N*L blocks and holds the
weights of N; the output head can be put on after any loop. The blocks are those of DiT, with no word of the loop's index.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from elastic_export.families.bricks import check_hidden, dit_activation_values, dit_block, embedders, ratio
from elastic_export.families.family import Family, demand, priced, sample_feeds, sample_inputs, sample_outputs
from elastic_export.families.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    initialize,
    sincos_2d,
    unpatchify,
)
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.schedule import LinearBeta, RectifiedFlow, Schedule, ShiftedCosine

# Config value -> the manifest's word. `v` and `epsilon` go with the shifted cosine schedule, `flow` with straight paths, `ddpm` with
# DiT's own: linear betas, timesteps in [0, 1000) and a learned variance (`ddpm-v`: with v in place of the noise). One loop is a plain DiT.
PREDICTIONS = {"v": "v", "epsilon": "epsilon", "flow": "velocity", "ddpm": "epsilon", "ddpm-v": "v"}


@dataclass(frozen=True)
class EltParams:
    """Sizes of one ELT. `loops` is the count that it was trained to (L_max), `max_loops` the largest that it offers."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    num_heads: int
    num_classes: int
    unique_blocks: int
    loops: int
    max_loops: int
    prelude_blocks: int = 0
    coda_blocks: int = 0
    mlp_ratio: float = 4.0
    prediction: str = "v"

    def __post_init__(self) -> None:
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "num_classes", "unique_blocks", "loops")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4")
        if self.max_loops < self.loops:
            raise ValueError(f"max_loops {self.max_loops} is fewer than the {self.loops} loops of training")
        if min(self.prelude_blocks, self.coda_blocks) < 0:
            raise ValueError(f"prelude_blocks and coda_blocks must be 0 or more, got {self.prelude_blocks} and {self.coda_blocks}")
        check_hidden(self.hidden_size, self.mlp_ratio)
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be {', '.join(PREDICTIONS)}, got {self.prediction!r}")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.input_size, self.input_size

    @property
    def grid(self) -> int:
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def schedule(self) -> Schedule:
        if self.learned_variance:
            return LinearBeta()
        return RectifiedFlow() if self.prediction == "flow" else ShiftedCosine.at(self.input_size)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def learned_variance(self) -> bool:
        return self.prediction in ("ddpm", "ddpm-v")


class Elt(nn.Module):
    """ELT denoiser: `(sample, timestep, class_labels, loops) -> prediction`."""

    pos_embed: Tensor

    def __init__(self, params: EltParams):
        super().__init__()
        self.params = params
        width = params.hidden_size
        self.x_embedder = PatchEmbed(params.patch_size, params.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(params.num_classes, width)
        self.register_buffer("pos_embed", sincos_2d(width, params.grid))
        self.prelude = self._blocks(params.prelude_blocks)
        self.blocks = self._blocks(params.unique_blocks)
        self.coda = self._blocks(params.coda_blocks)
        self.final_layer = FinalLayer(width, params.patch_size**2 * params.out_channels)
        every = [*self.prelude, *self.blocks, *self.coda]
        initialize(self, zero=(*(block.modulation for block in every), self.final_layer))

    def _blocks(self, count: int) -> nn.ModuleList:
        return nn.ModuleList(DiTBlock(self.params.hidden_size, self.params.num_heads, self.params.mlp_ratio) for _ in range(count))

    def embed(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the loop starts from: tokens after the prelude, and the conditioning."""
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)  # (B, D)
        x = self.x_embedder(sample.to(c.dtype)) + self.pos_embed  # (B, T, D)
        for block in self.prelude:
            x = block(x, c)
        return x, c

    def once(self, x: Tensor, c: Tensor) -> Tensor:
        """One loop: the N blocks."""
        for block in self.blocks:
            x = block(x, c)
        return x  # (B, T, D)

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """The prediction from the tokens of any loop."""
        for block in self.coda:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c).float(), self.params.patch_size, self.params.grid)  # (B, C, H, W)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, loops: Tensor | int) -> Tensor:
        """Predict `v`, `epsilon` (of `ddpm` and `ddpm-v` with the variance) or the flow's velocity, as `params.prediction` says.

        Shapes: sample (B, C, H, W); timestep (B,) in the schedule's unit; class_labels (B,) int64, `num_classes` for no label;
        loops () int64.
        """
        x, c = self.embed(sample, timestep, class_labels)
        return self.head(looped(lambda x: self.once(x, c), x, loops), c)

    def exits(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, loops: Sequence[int]) -> list[Tensor]:
        """Predictions after each of the rising counts `loops`, all from one pass of the last of them: for training."""
        x, c = self.embed(sample, timestep, class_labels)
        return [self.head(state, c) for state in prefixes(lambda x: self.once(x, c), x, loops)]


def prefixes(once: Callable[[Tensor], Tensor], x: Tensor, loops: Sequence[int]) -> Iterator[Tensor]:
    """What applying `once` to `x` leaves after each of the rising counts `loops`, in one pass of the last of them."""
    done = 0
    for count in loops:
        for _ in range(done, count):
            x = once(x)
        done = count
        yield x


def looped(once: Callable[[Tensor], Tensor], x: Tensor, loops: Tensor | int) -> Tensor:
    """Apply `once` to `x` as often as the 0-d int64 `loops` says; an int is a count that the graph is made for.

    Exported, it is one loop that ends on its condition, so that the weights stand once in the graph and any count can be asked
    for. Elsewhere it is Python's: `while_loop` would compile, and the graph is proven against something other than itself.
    """
    if isinstance(loops, int) or not torch.compiler.is_exporting():
        for _ in range(int(loops)):
            x = once(x)
        return x
    start = torch.zeros((), dtype=torch.int64)
    _, x = while_loop(lambda i, x: i < loops, lambda i, x: (i + 1, once(x)), (start, x))
    return x


def rename_key(key: str) -> str | None:
    """Name in this file of a checkpoint's key: DiT's names, with `prelude`, `blocks` and `coda`."""
    return re.sub(r"\badaLN_modulation\.1\.", "modulation.linear.", key)


# Widths, depths and token counts are the paper's; heads of 128 channels and the loops offered past L_max are ours.
_WIDE = EltParams(
    input_size=32, patch_size=1, in_channels=4, hidden_size=2048, num_heads=16, num_classes=1000, unique_blocks=4, loops=8, max_loops=10,
)  # fmt: skip
PRESETS = {
    "elt-1x32-256": replace(_WIDE, unique_blocks=1, loops=32, max_loops=40),
    "elt-4x8-256": _WIDE,
    "elt-8x4-256": replace(_WIDE, unique_blocks=8, loops=4, max_loops=5),
    "elt-16x2-256": replace(_WIDE, unique_blocks=16, loops=2, max_loops=3),
    "elt-s-3x4-256": replace(_WIDE, patch_size=2, hidden_size=384, num_heads=6, unique_blocks=3, loops=4, max_loops=5),
}


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of EltParams that a checkpoint's shapes and training arguments tell.

    Raises: ModelError for a checkpoint that is not an ELT.
    """
    named = {rename_key(key): tuple(value.shape) for key, value in weights.items()}
    ranks = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "blocks.0.mlp.fc1.weight": 2}
    demand("an ELT", named, ranks)
    width, channels, patch_size, _ = named["x_embedder.proj.weight"]
    shapes = {
        "input_size": math.isqrt(named["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "num_classes": named["y_embedder.embedding_table.weight"][0] - 1,
        "mlp_ratio": ratio(named["blocks.0.mlp.fc1.weight"][0], width),
    }
    for field, stack in (("prelude_blocks", "prelude"), ("unique_blocks", "blocks"), ("coda_blocks", "coda")):
        shapes[field] = len({match[1] for key in named if key and (match := re.match(rf"{stack}\.(\d+)\.", key))})
    arguments = {name: args[name] for name in ("num_heads", "loops", "max_loops", "prediction") if args.get(name) is not None}
    return {"the checkpoint's shapes": shapes, "the checkpoint's args": arguments}


def from_presets(presets: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and loops, which no shape tells, from the preset with the width and the blocks that are known."""
    for preset in presets.values():
        if (known.get("hidden_size"), known.get("unique_blocks")) == (preset.hidden_size, preset.unique_blocks):
            return {"num_heads": preset.num_heads, "loops": preset.loops, "max_loops": preset.max_loops}
    return {}


def assumed(known: Mapping[str, Any]) -> dict[str, Any]:
    return from_presets(PRESETS, known)


def axes(params: Any) -> tuple[Axis, ...]:
    """`loops`: L itself, in a 0-d input; its default is the count of training. The masked form's too."""
    return (Axis(name="loops", min=1, max=params.max_loops, step=1, default=params.loops, input="loops", carrier="value"),)


def inputs(params: EltParams) -> tuple[TensorSpec, ...]:
    return (*sample_inputs(params.sample_shape), TensorSpec(name="loops", dtype="int64", shape=()))


def outputs(params: EltParams) -> tuple[TensorSpec, ...]:
    return sample_outputs((params.out_channels, params.input_size, params.input_size))


def feeds(params: EltParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, times and labels, the same for every budget, and the loops."""
    loops = np.array(budget["loops"], dtype=np.int64)
    return sample_feeds(params.sample_shape, params.num_classes, batch) | {"loops": loops}


def flops(params: EltParams, loops: int) -> int:
    """FLOPs of one ELT forward pass at batch 1: prelude, `loops` times the shared blocks, coda."""
    values, out = (params.patch_size**2 * channels for channels in (params.in_channels, params.out_channels))
    depth = params.prelude_blocks + params.unique_blocks * loops + params.coda_blocks
    block = dit_block(params.tokens, params.hidden_size, params.mlp_ratio)
    return embedders(params.tokens, params.hidden_size, values, out) + depth * block


def cost(params: EltParams, budget: Budget, weights: int) -> Cost:
    """Cost of one sample's forward pass; `weights` is the number of parameters, each held once whatever the loops."""
    values = dit_activation_values(params.tokens, params.hidden_size, params.num_heads, params.mlp_ratio)
    return priced(budget, flops(params, budget["loops"]), weights, values)


def facts(params: EltParams) -> dict[str, Any]:
    return {
        "prediction": PREDICTIONS[params.prediction],
        "schedule": params.schedule,
        "learned_variance": params.learned_variance,
        "sample_shape": params.sample_shape,
        "num_classes": params.num_classes,
        "null_label": params.num_classes,
    }


FAMILY = Family(
    name="elt", params=EltParams, build=Elt, presets=PRESETS, rename_key=rename_key, sources=sources, assumed=assumed,
    axes=axes, inputs=inputs, outputs=outputs, feeds=feeds, cost=cost, facts=facts,
)  # fmt: skip
