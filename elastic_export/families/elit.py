"""ELIT-SiT: an elastic latent interface around a SiT core (arXiv 2603.12245, CVPR 2026).

Legend: B batch, C channels, T spatial tokens, D width, G groups (windows), P latents a group, J kept latents a group,
K = G*J kept latents of a picture. The core runs on K tokens; everything else runs on T.

Between the patch embedding and the last layer tokens stand in window order: attention over all of them does not mind, and windows are
slices. Public code keeps them in raster order and turns them before Read and after Write; the numbers are the same.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.bricks import attention, cross_attention, dit_activation_values, dit_block, embedders
from elastic_export.families.family import Family, picture_feeds, picture_inputs, priced
from elastic_export.families.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    Modulation,
    PatchEmbed,
    TimestepEmbedder,
    initialize,
    layer_norm,
    merge_heads,
    modulate,
    sincos_2d,
    split_heads,
    unpatchify,
)
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.errors import ModelError


@dataclass(frozen=True)
class ElitParams:
    """Sizes of one ELIT-SiT. `depth` counts all blocks: `head_blocks`, then the core, then `tail_blocks`."""

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
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.grid % self.group_size:
            raise ValueError(f"a grid of {self.grid}x{self.grid} tokens does not divide into groups of {self.group_size}x{self.group_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4")
        if min(self.head_blocks, self.tail_blocks) < 0 or self.head_blocks + self.tail_blocks >= self.depth:
            raise ValueError(f"head_blocks {self.head_blocks} + tail_blocks {self.tail_blocks} must leave a core in depth {self.depth}")
        if not 1 <= self.hidden_size * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves no hidden layer of a finite size")
        if self.latent_positions < self.tokens:
            raise ValueError(f"latent_positions {self.latent_positions} is fewer than the {self.tokens} tokens")

    @property
    def grid(self) -> int:
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def group_latents(self) -> int:
        return self.group_size**2

    @property
    def groups(self) -> int:
        return self.tokens // self.group_latents


class RootMeanSquareNorm(nn.Module):
    """`x / (||x|| / sqrt(D) + 1e-5) * scale`: the epsilon is added to the root, not under it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return (wide / (root + 1e-5)).to(x.dtype) * self.scale


class CrossAttention(nn.Module):
    """Attention inside each window, with q and k normalised over the full width before the head split.

    `x` (P, D) stands for the same queries in every window, which are then computed once.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.q_norm = RootMeanSquareNorm(width)
        self.k_norm = RootMeanSquareNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv_proj(context).chunk(2, dim=-1)
        q = self.q_norm(self.q_proj(x)).expand_as(k)
        # Windows join the batch: fused attention kernels and ONNX's Attention take three or four dimensions.
        q, k, v = (split_heads(part.flatten(0, 1), self.heads) for part in (q, self.k_norm(k), v))  # (B*G, H, P, D/H)
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v))  # (B*G, P, D)
        return self.proj(attended.unflatten(0, context.shape[:2]))  # (B, G, P, D)


class Read(nn.Module):
    """Latents read the spatial tokens of their window (paper, section 3.2)."""

    def __init__(self, params: ElitParams):
        super().__init__()
        width = params.hidden_size
        self.learned_query_embed = nn.Parameter(torch.randn(params.group_latents, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(params.group_latents, width) * 0.02)
        self.latent_pos_embed = nn.Parameter(torch.randn(params.latent_positions, width) * 0.02)
        self.modulation = Modulation(width, 7)
        self.attention = CrossAttention(width, params.num_heads)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, spatial: Tensor, c: Tensor, latent_positions: Tensor) -> Tensor:
        # The seventh part is in the checkpoints and unused by the public forward.
        shift_p, scale_p, gate_a, shift_m, scale_m, gate_m, _ = (part[:, None] for part in self.modulation(c))  # (B, 1, 1, D)
        latents = self.learned_query_embed  # (P, D), of every window
        latents = latents + gate_a * self.attention(latents, modulate(layer_norm(spatial), shift_p, scale_p))
        latents = latents + gate_m * self.mlp(modulate(layer_norm(latents), shift_m, scale_m))
        return latents + latent_positions  # (B, G, P, D)


class Write(nn.Module):
    """Spatial tokens read back from all the latents of their window, updated and dropped ones alike."""

    def __init__(self, params: ElitParams):
        super().__init__()
        width = params.hidden_size
        self.pos_embed = nn.Parameter(torch.randn(params.group_latents, width) * 0.02)
        self.attention = CrossAttention(width, params.num_heads)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, spatial: Tensor, latents: Tensor) -> Tensor:
        spatial = spatial + self.pos_embed
        spatial = spatial + self.attention(spatial, latents)
        return spatial + self.mlp(spatial)  # (B, G, P, D)


class Elit(nn.Module):
    """ELIT-SiT denoiser: `(sample, timestep, class_labels, latent_ids) -> velocity`."""

    pos_embed: Tensor

    def __init__(self, params: ElitParams):
        super().__init__()
        self.params = params
        width = params.hidden_size
        self.x_embedder = PatchEmbed(params.patch_size, params.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(params.num_classes, width)
        self.register_buffer("pos_embed", sincos_2d(width, params.grid))
        self.blocks = nn.ModuleList(DiTBlock(width, params.num_heads, params.mlp_ratio) for _ in range(params.depth))
        self.read = Read(params)
        self.write = Write(params)
        self.final_layer = FinalLayer(width, params.patch_size**2 * params.in_channels)
        gates: list[Any] = [block.modulation for block in self.blocks]
        initialize(self, zero=(*gates, self.read.modulation, self.write.attention.proj, self.write.mlp.fc2, self.final_layer))

    def to_windows(self, x: Tensor) -> Tensor:
        side = self.params.group_size
        grid = x.unflatten(1, (self.params.grid // side, side, self.params.grid // side, side))  # (B, Gh, s, Gw, s, D)
        return grid.transpose(2, 3).flatten(1, 4)  # (B, T, D), window after window

    def to_raster(self, x: Tensor) -> Tensor:
        side, rows = self.params.group_size, self.params.grid // self.params.group_size
        return x.unflatten(1, (rows, rows, side, side)).transpose(2, 3).flatten(1, 4)  # (B, T, D)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, latent_ids: Tensor) -> Tensor:
        """Predict the velocity `eps - x_0`.

        Shapes: sample (B, C, H, W); timestep (B,) in [0, 1]; class_labels (B,) int64, `num_classes` for no label;
        latent_ids (J,) int64, always `arange(J)`: only its length is read, since kept latents are a prefix.
        """
        params, kept = self.params, latent_ids.shape[0]
        core = slice(params.head_blocks, params.depth - params.tail_blocks)
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)  # (B, D)
        x = self.to_windows(self.x_embedder(sample.to(c.dtype)) + self.pos_embed)  # (B, T, D)
        for block in self.blocks[: core.start]:
            x = block(x, c)

        spatial = x.unflatten(1, (params.groups, -1)) + self.read.pos_embed  # (B, G, P, D)
        positions = self.to_windows(self.read.latent_pos_embed[None, : params.tokens]).unflatten(1, (params.groups, -1))
        latents = self.read(spatial, c, positions)
        z = latents[:, :, :kept].flatten(1, 2)  # (B, K, D)
        for block in self.blocks[core]:
            z = block(z, c)
        z = z.unflatten(1, (params.groups, -1))  # (B, G, J, D)
        x = self.write(spatial, torch.cat([z, latents[:, :, kept:]], dim=2)).flatten(1, 2)  # (B, T, D)

        for block in self.blocks[core.stop :]:
            x = block(x, c)
        patches = self.to_raster(self.final_layer(x, c).float())
        return unpatchify(patches, params.patch_size, params.grid)  # (B, C, H, W)


_RENAMES = (
    (r"^input_token_editor\.adapters\.0\.fit_layer\.latents_attend_to_patches\.0\.", "read.attention."),
    (r"^input_token_editor\.adapters\.0\.fit_layer\.read_ff\.0\.", "read.mlp."),
    (r"^input_token_editor\.adapters\.0\.fit_layer\.", "read."),
    (r"^input_token_editor\.adapters\.0\.", "read."),
    (r"^output_token_editor\.adapters\.0\.patches_attend_to_latents\.0\.", "write.attention."),
    (r"^output_token_editor\.adapters\.0\.write_ff\.0\.", "write.mlp."),
    (r"^output_token_editor\.adapters\.0\.", "write."),
    (r"\badaLN_modulation\.1\.", "modulation.linear."),
)


def rename_key(key: str) -> str | None:
    """Name in this file of a public checkpoint's key; None for training-only weights (`projectors.*`)."""
    if key.startswith("projectors."):
        return None
    for pattern, name in _RENAMES:
        key = re.sub(pattern, name, key)
    return key


_XL = ElitParams(
    input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
    num_classes=1000, group_size=4, head_blocks=8, tail_blocks=4,
)  # fmt: skip
_SIZES = {
    "xl": _XL,
    "l": replace(_XL, depth=24, hidden_size=1024),
    "b": replace(_XL, depth=12, hidden_size=768, num_heads=12, tail_blocks=2),
    "s": replace(_XL, depth=12, hidden_size=384, num_heads=6, tail_blocks=2),
}
# The shipped configs start the core at encoder_depth 8; the paper's own split of XL is 4-20-4 (head_blocks=4).
PRESETS = {f"elit-sit-{size}-256": params for size, params in _SIZES.items()} | {
    f"elit-sit-{size}-512": replace(params, input_size=64, group_size=8) for size, params in _SIZES.items()
}


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of ElitParams that a public checkpoint's shapes and training arguments tell.

    Raises: ModelError for a checkpoint that is not an ELIT, or one of a kind that this file does not implement.
    """
    for name, supported in (("qk_norm", False), ("prediction", "v"), ("path_type", "linear")):
        if args.get(name, supported) != supported:
            raise ModelError(f"the checkpoint was trained with {name}={args[name]!r}; only {name}={supported!r} is supported")
    named = {rename_key(key): tuple(value.shape) for key, value in weights.items()}
    ranks = {
        "x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2,
        "read.pos_embed": 2, "read.latent_pos_embed": 2, "blocks.0.mlp.fc1.weight": 2,
    }  # fmt: skip
    if lacking := [name for name in ranks if name not in named]:
        raise ModelError(f"this is not an ELIT checkpoint: it lacks {', '.join(lacking)}")
    if odd := [name for name, rank in ranks.items() if len(named[name]) != rank]:
        raise ModelError(f"this is not an ELIT checkpoint: its {odd[0]} has shape {named[odd[0]]}, not {ranks[odd[0]]} dimensions")
    width, channels, patch_size, _ = named["x_embedder.proj.weight"]
    blocks = {int(match[1]) for key in named if key and (match := re.match(r"blocks\.(\d+)\.", key))}
    shapes = {
        "input_size": math.isqrt(named["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(blocks),
        "num_classes": named["y_embedder.embedding_table.weight"][0] - 1,
        "group_size": math.isqrt(named["read.pos_embed"][0]),
        "latent_positions": named["read.latent_pos_embed"][0],
        "mlp_ratio": named["blocks.0.mlp.fc1.weight"][0] / width,
    }
    renames = {"encoder_depth": "head_blocks", "elit_group_size": "group_size", "num_classes": "num_classes"}
    arguments = {ours: args[theirs] for theirs, ours in renames.items() if args.get(theirs) is not None}
    if size := re.fullmatch(r"ELIT-SiT-(XL|L|B|S)/(\d+)", str(args.get("model"))):
        preset = _SIZES[size[1].lower()]
        arguments |= {"depth": preset.depth, "hidden_size": preset.hidden_size, "num_heads": preset.num_heads, "patch_size": int(size[2])}
    return {"the checkpoint's shapes": shapes, "the checkpoint's args": arguments}


def assumed(known: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape tells, from the published size with this depth and width."""
    for preset in _SIZES.values():
        if (known.get("depth"), known.get("hidden_size")) == (preset.depth, preset.hidden_size):
            return {"num_heads": preset.num_heads, "head_blocks": preset.head_blocks, "tail_blocks": preset.tail_blocks}
    return {}


def axes(params: ElitParams) -> tuple[Axis, ...]:
    """`latents`: K = G*J, carried by the length J of `latent_ids`."""
    return (
        Axis(
            name="latents", min=params.groups, max=params.tokens, step=params.groups, default=params.tokens,
            input="latent_ids", carrier="length", unit=params.groups, dimension="J",
        ),
    )  # fmt: skip


def inputs(params: ElitParams) -> tuple[TensorSpec, ...]:
    return (*picture_inputs(params.in_channels, params.input_size), TensorSpec(name="latent_ids", dtype="int64", shape=("J",)))


def outputs(params: ElitParams) -> tuple[TensorSpec, ...]:
    side = params.input_size
    return (TensorSpec(name="prediction", dtype="float32", shape=("B", params.in_channels, side, side)),)


def feeds(params: ElitParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, times and labels, the same for every budget, and the kept latents."""
    kept = np.arange(budget["latents"] // params.groups, dtype=np.int64)
    return picture_feeds(params.in_channels, params.input_size, params.num_classes, batch) | {"latent_ids": kept}


def flops(params: ElitParams, latents: int) -> int:
    """FLOPs of one ELIT forward pass at batch 1 with `latents` kept latents, as published; Read and Write run at full P whatever it is.

    What is counted and not computed is Read's query projection of all windows but one: they have the same queries.
    """
    width, tokens, per_group = params.hidden_size, params.tokens, params.group_latents
    patch_values = params.patch_size**2 * params.in_channels
    core = params.depth - params.head_blocks - params.tail_blocks
    windows = params.groups * attention(per_group, per_group, width)
    feed_forward = 2 * tokens * 2 * width**2  # MLP of ratio 1
    read = 2 * 7 * width**2 + cross_attention(tokens, tokens, width) + windows + feed_forward
    write = cross_attention(tokens, tokens, width) + windows + feed_forward
    outer = (params.head_blocks + params.tail_blocks) * dit_block(tokens, width, params.mlp_ratio)
    return embedders(tokens, width, patch_values, patch_values) + outer + read + core * dit_block(latents, width, params.mlp_ratio) + write


def activation_values(params: ElitParams, latents: int) -> int:
    """Most values alive at once in an ELIT forward pass at batch 1. While the core runs, the spatial tokens and all latents wait."""
    outer = dit_activation_values(params.tokens, params.hidden_size, params.num_heads, params.mlp_ratio)
    core = dit_activation_values(latents, params.hidden_size, params.num_heads, params.mlp_ratio)
    waiting = 2 * params.tokens * params.hidden_size
    return max(outer if params.head_blocks + params.tail_blocks else 0, core + waiting)


def cost(params: ElitParams, budget: Budget, weights: int) -> Cost:
    """Cost of one sample's forward pass; `weights` is the number of parameters."""
    latents = budget["latents"]
    return priced(budget, flops(params, latents), weights, activation_values(params, latents))


def facts(params: ElitParams) -> dict[str, Any]:
    return {
        "prediction": "velocity",
        "schedule": RectifiedFlow(),
        "sample_shape": (params.in_channels, params.input_size, params.input_size),
        "num_classes": params.num_classes,
        "null_label": params.num_classes,
    }


FAMILY = Family(
    name="elit-sit", params=ElitParams, build=Elit, presets=PRESETS, rename_key=rename_key, sources=sources, assumed=assumed,
    axes=axes, inputs=inputs, outputs=outputs, feeds=feeds, cost=cost, facts=facts,
    yields=("head_blocks", "num_heads", "tail_blocks", "latent_positions", "num_classes"), options=("head_blocks",),
)  # fmt: skip
