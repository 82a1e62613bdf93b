"""What ELITs of SiT blocks have in common, whatever stands between their blocks: sizes, forward pass, checkpoint keys and facts.

Legend: B batch, C channels, T spatial tokens, D width, G groups (windows), P latents a group, J kept latents a group,
K = G*J kept latents of a picture. The core runs on K tokens; everything else runs on T.

Between the patch embedding and the last layer tokens stand in window order. Public code keeps them in raster order and turns them before
Read and after Write; the numbers are the same.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_export.families.bricks import check_hidden, dit_activation_values, dit_block, embedders, ratio
from elastic_export.families.elit import interface
from elastic_export.families.elit.interface import (
    LATENT_IDS,
    InterfaceParams,
    Read,
    Windows,
    Write,
    latent_ids,
    latents_axis,
    latents_cost,
    tail_drop,
)
from elastic_export.families.family import Family, demand, sample_feeds, sample_inputs, sample_outputs
from elastic_export.families.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    Sinusoids,
    TimestepEmbedder,
    initialize,
    sincos_2d,
    unpatchify,
)
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.errors import ModelError
from elastic_targets.weights import values


@dataclass(frozen=True)
class ElitParams:
    """Sizes of one ELIT of SiT blocks. `depth` counts all blocks: `head_blocks`, then the core, then `tail_blocks`."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    group_size: int
    head_blocks: int
    tail_blocks: int
    mlp_ratio: float = 4.0
    latent_positions: int = 4096

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4")
        if min(self.head_blocks, self.tail_blocks) < 0 or self.head_blocks + self.tail_blocks >= self.depth:
            raise ValueError(f"head_blocks {self.head_blocks} + tail_blocks {self.tail_blocks} must leave a core in depth {self.depth}")
        check_hidden(self.hidden_size, self.mlp_ratio)
        _ = self.interface  # whose parts check themselves

    @property
    def grid(self) -> int:
        return self.input_size // self.patch_size

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.input_size, self.input_size

    @property
    def windows(self) -> Windows:
        return Windows(self.grid, self.grid, self.group_size)

    @property
    def interface(self) -> InterfaceParams:
        return InterfaceParams(self.windows, self.hidden_size, self.num_heads, self.hidden_size, self.latent_positions)

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def group_latents(self) -> int:
        return self.group_size**2

    @property
    def groups(self) -> int:
        return self.tokens // self.group_latents

    @property
    def core(self) -> range:
        """The blocks that run on latents."""
        return range(self.head_blocks, self.depth - self.tail_blocks)


class Backbone(nn.Module, ABC):
    """A denoiser of SiT blocks around the interface: `(sample, timestep, class_labels, latent_ids) -> velocity`.

    doubled: blocks of twice the width and heads, whose condition keeps its own width.
    """

    pos_embed: Tensor

    def __init__(self, params: ElitParams, doubled: range = range(0)):
        super().__init__()
        self.params = params
        width = params.hidden_size
        self.x_embedder = PatchEmbed(params.patch_size, params.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(params.num_classes, width)
        self.register_buffer("pos_embed", sincos_2d(width, params.grid))
        scales = [2 if index in doubled else 1 for index in range(params.depth)]
        self.blocks = nn.ModuleList(DiTBlock(scale * width, scale * params.num_heads, params.mlp_ratio, width) for scale in scales)
        self.read = Read(params.interface)
        self.write = Write(params.interface)
        self.final_layer = FinalLayer(width, params.patch_size**2 * params.in_channels)
        gates: list[Any] = [block.modulation for block in self.blocks]
        initialize(self, zero=(*gates, self.read.modulation, self.write.attention.proj, self.write.mlp.fc2, self.final_layer))

    @abstractmethod
    def step(self, index: int, x: Tensor, c: Tensor, waiting: list[Tensor]) -> Tensor:
        """Block `index` and what stands before and after it, on tokens (B, N, D); `waiting` holds what later blocks take, last in first
        out."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, latent_ids: Tensor) -> Tensor:
        """Predict the velocity `eps - x_0`.

        Shapes: sample (B, C, H, W); timestep (B,) in [0, 1]; class_labels (B,) int64, `num_classes` for no label;
        latent_ids (J,) int64, always `arange(J)`: only its length is read, since kept latents are a prefix.
        """
        params, kept = self.params, latent_ids.shape[0]
        waiting: list[Tensor] = []
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)  # (B, D)
        x = params.windows.from_raster(self.x_embedder(sample.to(c.dtype)) + self.pos_embed)  # (B, T, D)
        for index in range(params.core.start):
            x = self.step(index, x, c, waiting)

        spatial, latents = self.read(x, c)  # (B, G, P, D)
        z = tail_drop(latents, kept)  # (B, K, D)
        for index in params.core:
            z = self.step(index, z, c, waiting)
        x = self.write(spatial, latents, z, kept)  # (B, T, D)

        for index in range(params.core.stop, params.depth):
            x = self.step(index, x, c, waiting)
        patches = params.windows.to_raster(self.final_layer(x, c).float())
        return unpatchify(patches, params.patch_size, params.grid)  # (B, C, H, W)


_RENAMES = (
    (r"^blocks\.(\d+)\.skip_linear\.", r"skips.\1."),
    (r"^merges\.0\.", "merge."),
    (r"^splits\.0\.", "split."),
)
# Weights that one family alone has: by the first words of our names, and in a user's words.
_MARKS = {
    "elit-uvit": (("skips.",), "skips (blocks.N.skip_linear)"),
    "elit-hdit": (("merge", "split"), "merge and split (merges, splits)"),
}


# Dimensions of the weights that tell sizes.
_RANKS = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "blocks.0.mlp.fc1.weight": 2}


def rename_key(key: str) -> str | None:
    """Name in a Backbone of a public checkpoint's key; None for training-only weights (`projectors.*`)."""
    if key.startswith("projectors."):
        return None
    return interface.renamed(key, *_RENAMES)


# Depth, width and heads of the published sizes.
SIZES = {
    size: {"depth": depth, "hidden_size": width, "num_heads": heads}
    for size, depth, width, heads in (("xl", 28, 1152, 16), ("l", 24, 1024, 16), ("b", 12, 768, 12), ("s", 12, 384, 6))
}


def presets(name: str, params: type, splits: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Params by preset: the published sizes with these `splits` into blocks, at 256 and 512 pixels of SD's VAE."""
    common = {"patch_size": 2, "in_channels": 4, "num_classes": 1000}
    resolutions = {256: {"input_size": 32, "group_size": 4}, 512: {"input_size": 64, "group_size": 8}}
    return {
        f"{name}-{size}-{pixels}": params(**common, **SIZES[size], **resolution, **split)
        for pixels, resolution in resolutions.items()
        for size, split in splits.items()
    }


def shapes_of(name: str, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by our names of what a checkpoint of the family `name` holds.

    Raises: ModelError for a checkpoint that is not an ELIT, or one of another family.
    """
    named = {key: tuple(value.shape) for public, value in weights.items() if (key := rename_key(public))}
    demand("an ELIT", named, _RANKS | {"read.pos_embed": 2, "read.latent_pos_embed": 2})
    marked = {family: words for family, (marks, words) in _MARKS.items() if any(key.startswith(marks) for key in named)}
    if len(marked) > 1:
        raise ModelError(f"this checkpoint has {' and '.join(marked.values())} at once: no family has both, so it cannot be exported")
    family = next(iter(marked), "elit-sit")
    if family != name:
        has = f"has {marked[family]}" if marked else f"has no {_MARKS[name][1]}"
        raise ModelError(f"this checkpoint {has}, so it is an {family}, not an {name}: export it as {family}")
    return named


def sources(name: str, weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of ElitParams that the shapes and training arguments of a checkpoint of the family `name` tell.

    Raises: ModelError as `shapes_of`, and for one that was trained in a way that this package does not implement.
    """
    named = shapes_of(name, weights)
    sizes = _read_sizes(named, args)
    sizes["the checkpoint's shapes"] |= {
        "group_size": math.isqrt(named["read.pos_embed"][0]),
        "latent_positions": named["read.latent_pos_embed"][0],
    }
    return sizes


def plain_sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of a SiT without an interface: nothing tells group_size, head_blocks and tail_blocks."""
    named = {key: tuple(value.shape) for public, value in weights.items() if (key := rename_key(public))}
    demand("a SiT", named, _RANKS)
    words = {"velocity": "v", "Linear": "linear"}  # SiT's own for what ELIT's code calls otherwise
    own = {name: words.get(value, value) if isinstance(value, str) else value for name, value in args.items()}
    sizes = _read_sizes(named, {name: value for name, value in own.items() if name not in ("encoder_depth", "elit_group_size")})
    sizes["the checkpoint's shapes"]["latent_positions"] = named["pos_embed"][1]
    return sizes


def without_variance(weights: Mapping[str, Tensor], params: ElitParams) -> dict[str, Tensor]:
    """The last layer of a SiT that was trained with `learn_sigma`, whose second half of channels sampling leaves aside: the first half."""
    area, channels = params.patch_size**2, params.in_channels
    kept = {}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in weights and len(weights[key]) == 2 * area * channels:
            whole = values(weights[key]).unflatten(0, (area, 2, channels))  # (p p, 2, C, ...): a patch is laid out (p, p, 2C)
            kept[key] = whole[:, 0].flatten(0, 1).contiguous()
    return kept


# Words of trainers for a velocity on a straight path -> whether their time goes from noise at 0 to the picture at 1.
_FROM_NOISE = {"velocity": True, "Linear": True, "v": False, "linear": False}


def from_noise(weights: Mapping[str, Tensor], args: Mapping[str, Any], params: ElitParams, prediction: Any = None) -> bool:
    """Whether a SiT's time goes from noise to the picture, as in its own public code, and not from the picture to noise, as in REPA's and
    ELIT's. `prediction` is what a config says: "velocity" of the former, "v" of the latter.

    Raises: ModelError where nothing tells, or two words contradict each other.
    """
    if prediction not in (None, "velocity", "v"):
        raise ModelError(f"a config's prediction is 'velocity' (SiT's own code) or 'v' (REPA's and ELIT's), got {prediction!r}")
    words = {"its config's prediction": prediction} | {f"its args' {name}": args.get(name) for name in ("prediction", "path_type")}
    ways = {f"{word!r} by {where}": _FROM_NOISE[word] for where, word in words.items() if isinstance(word, str) and word in _FROM_NOISE}
    if len(set(ways.values())) > 1:
        raise ModelError(f"this SiT is {' and '.join(ways)}, whose times go opposite ways: 'velocity' and 'Linear' are SiT's own words")
    if ways:
        return next(iter(ways.values()))
    if any(key.startswith("projectors.") for key in weights):  # REPA's
        return False
    if len(weights["final_layer.linear.weight"]) == 2 * params.patch_size**2 * params.in_channels:  # learn_sigma, in SiT's own code alone
        return True
    raise ModelError(
        'nothing tells which way the time of this SiT goes: write "prediction" in its config, "velocity" of SiT\'s own code (noise at 0) '
        "or \"v\" of REPA's and ELIT's (the picture at 0)"
    )


def turned(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of a SiT whose time goes from noise to the picture, as ELIT has them: `-v(x, 1 - t)` is the velocity at t.

    Features at 1 - t are `cos(w - wt) = cos w cos wt + sin w sin wt` and `sin(w - wt) = sin w cos wt - cos w sin wt`.
    """
    made = {key: -values(weights[key]) for key in ("final_layer.linear.weight", "final_layer.linear.bias")}
    key, angles = "t_embedder.mlp.0.weight", Sinusoids().frequencies.double()
    of_cos, of_sin = values(weights[key]).double().chunk(2, dim=1)  # (D, 128)
    cos, sin = angles.cos(), angles.sin()
    return made | {key: torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).float()}


def _read_sizes(named: Mapping[str, tuple[int, ...]], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of ElitParams that shapes by our names and training arguments tell, whether or not there is an interface."""
    for argument, supported in (("qk_norm", False), ("prediction", "v"), ("path_type", "linear")):
        if args.get(argument, supported) != supported:
            raise ModelError(f"the checkpoint was trained with {argument}={args[argument]!r}; only {argument}={supported!r} is supported")
    width, channels, patch_size, _ = named["x_embedder.proj.weight"]
    hidden, narrow = named["blocks.0.mlp.fc1.weight"]
    shapes = {
        "input_size": math.isqrt(named["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len({match[1] for key in named if (match := re.match(r"blocks\.(\d+)\.", key))}),
        "num_classes": named["y_embedder.embedding_table.weight"][0] - 1,
        "mlp_ratio": ratio(hidden, narrow),
    }
    renames = {"encoder_depth": "head_blocks", "elit_group_size": "group_size", "num_classes": "num_classes"}
    arguments = {ours: args[theirs] for theirs, ours in renames.items() if args.get(theirs) is not None}
    if size := re.fullmatch(r"ELIT-\w+-(XL|L|B|S)/(\d+)", str(args.get("model"))):
        arguments |= SIZES[size[1].lower()] | {"patch_size": int(size[2])}
    return {"the checkpoint's shapes": shapes, "the checkpoint's args": arguments}


def axes(params: ElitParams) -> tuple[Axis, ...]:
    return (latents_axis(params.windows),)


def inputs(params: ElitParams) -> tuple[TensorSpec, ...]:
    return (*sample_inputs(params.sample_shape), LATENT_IDS)


def outputs(params: ElitParams) -> tuple[TensorSpec, ...]:
    return sample_outputs(params.sample_shape)


def feeds(params: ElitParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, times and labels, the same for every budget, and the kept latents."""
    return sample_feeds(params.sample_shape, params.num_classes, batch) | latent_ids(params.windows, budget)


def facts(params: ElitParams) -> dict[str, Any]:
    return {
        "prediction": "velocity",
        "schedule": RectifiedFlow(),
        "sample_shape": params.sample_shape,
        "num_classes": params.num_classes,
        "null_label": params.num_classes,
    }


def outer_flops(params: ElitParams) -> int:
    """FLOPs at batch 1 of all but the core, its blocks of head and tail plain ones."""
    width, patch_values = params.hidden_size, params.patch_size**2 * params.in_channels
    blocks = (params.head_blocks + params.tail_blocks) * dit_block(params.tokens, width, params.mlp_ratio)
    return embedders(params.tokens, width, patch_values, patch_values) + blocks + interface.flops(params.interface)


def block_values(params: ElitParams, tokens: int, scale: int = 1) -> int:
    """Most values alive at once in a block at batch 1, of `scale` times the width."""
    return dit_activation_values(tokens, scale * params.hidden_size, scale * params.num_heads, params.mlp_ratio)


def family(
    name: str,
    params: type,
    build: Callable[[Any], nn.Module],
    splits: Mapping[str, Mapping[str, int]],
    own_sources: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, dict[str, Any]]],
    flops: Callable[[Any, int], int],
    activation_values: Callable[[Any, int], int],
    yields: tuple[str, ...] = (),
) -> Family:
    """The row in the zoo of a Backbone: `splits` of its presets, `own_sources` its `sources`; flops and values of (params, latents)."""

    def assumed(known: Mapping[str, Any]) -> dict[str, Any]:
        """What no shape tells, from the published size with this depth and width."""
        for size, split in splits.items():
            published = SIZES[size]
            if (known.get("depth"), known.get("hidden_size")) == (published["depth"], published["hidden_size"]):
                return {"num_heads": published["num_heads"]} | dict(split)
        return {}

    return Family(
        name=name, params=params, build=build, presets=presets(name, params, splits), rename_key=rename_key, sources=own_sources,
        assumed=assumed, axes=axes, inputs=inputs, outputs=outputs, feeds=feeds, cost=latents_cost(flops, activation_values), facts=facts,
        yields=("head_blocks", "num_heads", "tail_blocks", "latent_positions", "num_classes", *yields), options=("head_blocks",),
    )  # fmt: skip
