"""DC-DiT: a diffusion transformer whose core sees only the tokens that a router keeps (arXiv 2603.06351).

Legend: B batch, C channels, T tokens, one a latent pixel, s grid side, D core width, b = D / enc_dec_dim_factor, K slots.
Convolutions lead from pixels to tokens and back at full T; a router, chunking and de-chunking (`dc_dit_chunk.py`) stand between
them and the core's DiT blocks, which see K tokens.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.bricks import check_hidden, dit_activation_values, dit_block, ratio
from elastic_export.families.dc_dit.chunk import Router, count, float32, group_norm, nearest, select, smooth, take
from elastic_export.families.family import Family, demand, priced, sample_feeds, sample_inputs, sample_outputs
from elastic_export.families.layers import DiTBlock, FinalLayer, LabelEmbedder, TimestepEmbedder, initialize, sincos_2d
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.schedule import LinearBeta
from elastic_runtime.errors import ModelError


@dataclass(frozen=True)
class DcDitParams:
    """Sizes of one DC-DiT. `encoder` and `decoder` are written as in the public configs: `c2` for two convolution blocks."""

    input_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    dechunk_kernel_sigma: float
    enc_dec_dim_factor: int = 4
    encoder: str = "c2"
    decoder: str = "c2"
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "num_classes", "enc_dec_dim_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size < 2:
            raise ValueError(f"input_size must be at least 2, got {self.input_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 32 or self.hidden_size % (32 * self.enc_dec_dim_factor):
            unit = 32 * self.enc_dec_dim_factor
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 32 * enc_dec_dim_factor = {unit}: GroupNorm has 32 groups"
            )
        check_hidden(self.hidden_size, self.mlp_ratio)
        if not 0 < self.dechunk_kernel_sigma < math.inf:
            raise ValueError(f"dechunk_kernel_sigma must be above 0 and finite, got {self.dechunk_kernel_sigma}")
        for name in ("encoder", "decoder"):
            if not re.fullmatch(r"c[1-9]\d?", str(getattr(self, name))):
                raise ValueError(f"{name} must be c1, c2, ...: so many convolution blocks; got {getattr(self, name)!r}")
        if self.prediction not in ("epsilon", "v"):
            raise ValueError(f"prediction must be epsilon (as in public checkpoints) or v, got {self.prediction!r}")
        if self.learn_sigma is not True:
            raise ValueError(f"learn_sigma must be true: the family predicts its variance; got {self.learn_sigma!r}")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.input_size, self.input_size

    @property
    def tokens(self) -> int:
        return self.input_size**2

    @property
    def outer_width(self) -> int:
        return self.hidden_size // self.enc_dec_dim_factor

    @property
    def blocks(self) -> tuple[int, int]:
        """Convolution blocks of encoder and decoder."""
        return int(self.encoder[1:]), int(self.decoder[1:])


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension with a weight, eps 1e-5, reduced in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU before each, the condition added between them, and a skip."""

    def __init__(self, channels: int, out: int, condition: int):
        super().__init__()
        inner = min(channels, out)
        self.norm1 = nn.GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.cond_proj = nn.Linear(condition, inner)
        self.norm2 = nn.GroupNorm(32, inner)
        self.conv2 = nn.Conv2d(inner, out, 3, padding=1)
        self.skip_proj = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(group_norm(self.norm1, x))) + self.cond_proj(F.silu(c))[:, :, None, None]
        return self.conv2(F.silu(group_norm(self.norm2, h))) + self.skip_proj(x)  # (B, out, s, s)


class ConvStack(nn.Module):
    """Convolution blocks on the grid, then an RMSNorm over the channels of its tokens."""

    def __init__(self, widths: list[int], condition: int):
        super().__init__()
        self.layers = nn.ModuleList(ConvBlock(before, after, condition) for before, after in itertools.pairwise(widths))
        self.rmsnorm = RmsNorm(widths[-1])

    def forward(self, grid: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            grid = layer(grid, c)
        return self.rmsnorm(grid.flatten(2).transpose(1, 2))  # (B, T, width)


class DcDit(nn.Module):
    """DC-DiT denoiser: `(sample, timestep, class_labels, drop_fraction, slots) -> (prediction, kept, probability)`."""

    pos_embed: Tensor
    # What leads to a decision stays float32 in a graph of half precision, since a token that is kept or dropped by a rounding error
    # changes the picture by more than one; it is a twentieth of the arithmetic.
    exact = ("x_embedder", "t_embedder", "y_embedder", "encoder", "router")

    def __init__(self, params: DcDitParams):
        super().__init__()
        self.params = params
        width, outer, (encoders, decoders) = params.hidden_size, params.outer_width, params.blocks
        self.x_embedder = nn.Conv2d(params.in_channels, outer, 3, padding=1)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(params.num_classes, width)
        self.encoder = ConvStack([outer] * encoders + [width], width)
        self.residual_proj = nn.Linear(width, width)
        self.router = Router(width)
        self.register_buffer("pos_embed", sincos_2d(width, params.input_size))
        self.blocks = nn.ModuleList(DiTBlock(width, params.num_heads, params.mlp_ratio) for _ in range(params.depth))
        self.rmsnorm = RmsNorm(width)
        self.decoder = ConvStack([width] + [outer] * decoders, width)
        self.final_layer = FinalLayer(outer, 2 * params.in_channels, width)
        side = torch.arange(params.input_size, device="cpu", dtype=torch.float32)  # no buffer: building on `meta` would lose it
        self.cells = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)  # (T, 2): row, column
        gates: list[Any] = [block.modulation for block in self.blocks]
        initialize(self, zero=(*gates, self.final_layer, self.residual_proj))

    def to_grid(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.params.input_size, -1))  # (B, D, s, s)

    def encode(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of every pixel (B, T, D), the condition (B, D) and the router's probabilities (B, T)."""
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)
        x = self.encoder(self.x_embedder(sample), c)
        return x, c.to(self.pos_embed.dtype), self.router(self.to_grid(x))

    def through_core(self, x: Tensor, c: Tensor, p: Tensor, kept: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """De-chunked tokens (B, T, D) in float32, and the positions (B, K) of the tokens that went through the core."""
        p, positions = select(p, slots.shape[0])  # (B, K)
        shown = slots < kept[:, None]  # (B, K)
        cells, visible = F.embedding(positions, self.cells), shown.float()  # (B, K, 2)
        # Attention of ONNX Runtime does not stretch a mask over the queries.
        mask = shown[:, None, None, :].expand(-1, 1, slots.shape[0], -1)
        h = take(x, positions).to(c.dtype) + F.embedding(positions, self.pos_embed[0])  # (B, K, D)
        for block in self.blocks:
            h = block(h, c, mask)
        h = smooth(self.rmsnorm(h).float(), p, cells, visible, self.params.dechunk_kernel_sigma)
        return take(h, nearest(self.cells, cells, positions, visible)), positions

    def decode(self, x: Tensor, c: Tensor) -> Tensor:
        """`[epsilon or v | variance]` (B, 2C, s, s) from tokens (B, T, D)."""
        tokens = self.decoder(self.to_grid(x.to(c.dtype)), c)  # (B, T, b)
        return self.to_grid(self.final_layer(tokens, c).float())

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, drop_fraction: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the noise (or v) and how far the variance lies between its bounds; tell which tokens were wanted.

        Shapes: sample (B, C, s, s); timestep (B,) in [0, 1000); class_labels (B,) int64, `num_classes` for no label; drop_fraction
        (B,) in [0, 1), of the tokens that the router keeps; slots (K,) int64, always `arange(K)`, K <= T: at most so many tokens
        go through the core, those with the highest probabilities. kept (B,) is the count that K did not cut; probability (B, T) is
        the router's of keeping each token.
        """
        x, c, p = self.encode(sample, timestep, class_labels)
        kept = count(p, drop_fraction)
        tokens, _ = self.through_core(x, c, p, kept, slots)
        return self.decode(tokens + float32(self.residual_proj, x), c), kept, p


_RENAMES = (
    (r"^x_embedder\.proj\.", "x_embedder."),
    (r"^hnet\.routing_module\.", "router."),
    (r"^hnet\.main_network\.main_network\.layers\.", "blocks."),
    (r"^hnet\.main_network\.main_network\.", ""),
    (r"^hnet\.", ""),
    (r"\bcond_proj\.1\.", "cond_proj."),
    (r"\badaLN_modulation\.1\.", "modulation.linear."),
)


def _renamed(key: str) -> str:
    for pattern, name in _RENAMES:
        key = re.sub(pattern, name, key)
    return key


def rename_key(key: str) -> str | None:
    """Name in this file of a public checkpoint's key."""
    return _renamed(key)


_XL = DcDitParams(input_size=32, in_channels=4, hidden_size=1152, depth=28, num_heads=16, num_classes=1000, dechunk_kernel_sigma=1.0)
_SIZES = {
    "s": replace(_XL, depth=12, hidden_size=384, num_heads=6),
    "b": replace(_XL, depth=12, hidden_size=768, num_heads=12),
    "l": replace(_XL, depth=24, hidden_size=1024),
    "xl": _XL,
}
_SIGMA = {32: 1.0, 64: 2.0}  # grid cells, by latent side: 256 and 512 pixels
PRESETS = {
    f"dc-dit-{size}-{8 * side}": replace(params, input_size=side, dechunk_kernel_sigma=sigma)
    for side, sigma in _SIGMA.items()
    for size, params in _SIZES.items()
}


def _blocks(names: Any, stack: str) -> int:
    return len({match[1] for name in names if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))})


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of DcDitParams that a checkpoint's shapes and training arguments tell.

    Raises: ModelError for a checkpoint that is not a DC-DiT, or one of a kind that this file does not implement.
    """
    named = {_renamed(key): tuple(value.shape) for key, value in weights.items()}
    ranks = {
        "x_embedder.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "blocks.0.mlp.fc1.weight": 2,
        "router.proj.weight": 4, "final_layer.linear.weight": 2,
    }  # fmt: skip
    demand("a DC-DiT", named, ranks)
    encoders, decoders = (_blocks(named, f"{side}.layers") for side in ("encoder", "decoder"))
    if not encoders or not decoders:
        raise ModelError(
            "the checkpoint has no convolution blocks in its encoder or decoder; other kinds than c1, c2, ... are not supported"
        )
    outer, channels, *_ = named["x_embedder.weight"]
    width = named["pos_embed"][2]
    shapes = {
        "input_size": math.isqrt(named["pos_embed"][1]),
        "in_channels": channels,
        "hidden_size": width,
        "depth": _blocks(named, "blocks"),
        "num_classes": named["y_embedder.embedding_table.weight"][0] - 1,
        "enc_dec_dim_factor": width // outer,
        "encoder": f"c{encoders}",
        "decoder": f"c{decoders}",
        "learn_sigma": named["final_layer.linear.weight"][0] == 2 * channels,
        "mlp_ratio": ratio(named["blocks.0.mlp.fc1.weight"][0], width),
    }
    arguments = {name: value for name in ("num_heads", "dechunk_kernel_sigma") if (value := _argument(args, name)) is not None}
    return {"the checkpoint's shapes": shapes, "the checkpoint's args": arguments}


def _argument(args: Mapping[str, Any], name: str) -> Any:
    """An argument by name: flat, or as the public trainer nests it, with a value for each width from the outermost to the core's."""
    hnet: Any = args
    for inner in ("model", "hnet"):
        hnet = hnet.get(inner) if isinstance(hnet, Mapping) else None
    value = args.get(name, hnet.get(name) if isinstance(hnet, Mapping) else None)
    return value[-1] if isinstance(value, list) and value else value


def assumed(known: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape tells: heads of the published size with this depth and width, sigma of the published picture size."""
    fields: dict[str, Any] = {"dechunk_kernel_sigma": _SIGMA[known["input_size"]]} if known.get("input_size") in _SIGMA else {}
    for preset in _SIZES.values():
        if (known.get("depth"), known.get("hidden_size")) == (preset.depth, preset.hidden_size):
            fields["num_heads"] = preset.num_heads
    return fields


def axes(params: DcDitParams) -> tuple[Axis, ...]:
    """`tokens`: the cap K, carried by the length of `slots`, from 16 tokens or a step to all of them in 64ths."""
    step = max(params.tokens // 64, 1)
    least = params.tokens - (params.tokens - min(16, max(params.tokens // 16, 1))) // step * step
    return (
        Axis(
            name="tokens", min=least, max=params.tokens, step=step, default=params.tokens, input="slots", carrier="length", dimension="K"
        ),
    )  # fmt: skip


def inputs(params: DcDitParams) -> tuple[TensorSpec, ...]:
    return (
        *sample_inputs(params.sample_shape),
        TensorSpec(name="drop_fraction", dtype="float32", shape=("B",)),
        TensorSpec(name="slots", dtype="int64", shape=("K",)),
    )


def outputs(params: DcDitParams) -> tuple[TensorSpec, ...]:
    return (
        *sample_outputs((2 * params.in_channels, params.input_size, params.input_size)),
        TensorSpec(name="kept", dtype="float32", shape=("B",)),
        TensorSpec(name="probability", dtype="float32", shape=("B", params.tokens)),
    )


def feeds(params: DcDitParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, whole timesteps, labels and several fractions, the same for every budget, and the slots."""
    picture = sample_feeds(params.sample_shape, params.num_classes, batch)
    return picture | {
        "timestep": np.floor(picture["timestep"] * 1000),
        "drop_fraction": np.resize(np.array([0.0, 0.3, 0.6], dtype=np.float32), batch),
        "slots": np.arange(budget["tokens"], dtype=np.int64),
    }


def convolution(pixels: int, side: int, channels: int, out: int) -> int:
    """FLOPs of a `side` x `side` convolution with stride 1."""
    return 2 * pixels * side**2 * channels * out


def conv_block(pixels: int, channels: int, out: int, condition: int) -> int:
    """FLOPs of DC-DiT's convolution block: two 3x3 convolutions, the condition's projection, and a 1x1 skip where widths differ."""
    inner = min(channels, out)
    skip = convolution(pixels, 1, channels, out) if channels != out else 0
    return convolution(pixels, 3, channels, inner) + convolution(pixels, 3, inner, out) + 2 * condition * inner + skip


def flops(params: DcDitParams, slots: int) -> int:
    """FLOPs of one DC-DiT forward pass at batch 1 with `slots` token slots; all but the core and de-chunking is the same at any number."""
    width, outer, tokens = params.hidden_size, params.outer_width, params.tokens
    encoders, decoders = params.blocks
    inner = width // 4
    router = convolution(tokens, 1, width, inner) + 2 * convolution(tokens, 3, inner, inner) + convolution(tokens, 1, inner, 1)
    last, first = conv_block(tokens, outer, width, width), conv_block(tokens, width, outer, width)
    around = last + first + (encoders + decoders - 2) * conv_block(tokens, outer, outer, width)
    final = 2 * (width * 2 * outer + tokens * outer * 2 * params.in_channels)
    ends = convolution(tokens, 3, params.in_channels, outer) + 2 * (256 * width + width**2) + final
    residual, smoothing = 2 * tokens * width**2, 2 * slots**2 * width
    return ends + around + router + residual + smoothing + params.depth * dit_block(slots, width, params.mlp_ratio)


def activation_values(params: DcDitParams, slots: int) -> int:
    """Most values alive at once in a DC-DiT forward pass at batch 1: in a convolution block at full width, in the core while the
    tokens and their residual wait, or in the search for the nearest tokens."""
    waiting = 2 * params.tokens * params.hidden_size
    core = dit_activation_values(slots, params.hidden_size, params.num_heads, params.mlp_ratio)
    nearest = 3 * params.tokens * slots + slots * params.hidden_size
    return waiting + max(core, nearest, 2 * params.tokens * params.hidden_size)


def cost(params: DcDitParams, budget: Budget, weights: int) -> Cost:
    """Cost of one sample's forward pass with `tokens` slots, filled or not; `weights` is the number of parameters."""
    slots = budget["tokens"]
    return priced(budget, flops(params, slots), weights, activation_values(params, slots))


def facts(params: DcDitParams) -> dict[str, Any]:
    return {
        "prediction": params.prediction,
        "schedule": LinearBeta(),
        "sample_shape": params.sample_shape,
        "num_classes": params.num_classes,
        "null_label": params.num_classes,
        "learned_variance": True,
        "guided_channels": min(3, params.in_channels),  # as DiT's public code guides, of 4 latent channels
    }


FAMILY = Family(
    name="dc-dit", params=DcDitParams, build=DcDit, presets=PRESETS, rename_key=rename_key, sources=sources, assumed=assumed,
    axes=axes, inputs=inputs, outputs=outputs, feeds=feeds, cost=cost, facts=facts,
)  # fmt: skip
