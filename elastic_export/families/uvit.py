"""U-ViT: a transformer over patches, time and class as tokens, with long skips (arXiv 2209.12152, CVPR 2023; github.com/baofff/U-ViT).

Legend: B batch, C channels, T patches, E tokens before them (the label's, the time's), N = E+T, D width. It has no elastic axis.
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

from elastic_export.families.bricks import check_hidden, dit_activation_values, plain_block, ratio
from elastic_export.families.family import Family, demand, priced, sample_feeds, sample_inputs, sample_outputs
from elastic_export.families.layers import Attention, Mlp, PatchEmbed, Sinusoids, initialize, unpatchify
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.schedule import ScaledLinearBeta, VpSde
from elastic_runtime.errors import ModelError

# What the public code trained on: `train_ldm_discrete.py` (H/2, H/4), or `train_ldm.py` (L/2, L/4) and `train.py` (pixels).
SCHEDULES: dict[str, ScaledLinearBeta | VpSde] = {"discrete": ScaledLinearBeta(), "vpsde": VpSde()}


@dataclass(frozen=True)
class UVitParams:
    """Sizes of one U-ViT under the names of its public configs. `depth` counts the blocks that a skip joins: there is one more, the middle.

    `num_classes` counts the rows of the label table, of which the last stands for "no label"; -1: no table. `schedule` is what it was
    trained on, `discrete` (Stable Diffusion's betas) or `vpsde`, which the public configs leave to the choice of a script.
    """

    img_size: int
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = -1
    conv: bool = True
    skip: bool = True
    schedule: str = "discrete"

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("qkv_bias", "mlp_time_embed", "conv", "skip"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads} and of 2")
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} must be even: it counts the blocks before and after the middle one")
        if self.num_classes != -1 and self.num_classes < 2:
            raise ValueError(f"num_classes {self.num_classes} must be 2 or more, the last for no label, or -1 for none")
        check_hidden(self.embed_dim, self.mlp_ratio)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, got {self.schedule!r}")

    @property
    def grid(self) -> int:
        return self.img_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def classes(self) -> int:
        """Classes to draw, without the null label."""
        return max(self.num_classes - 1, 0)

    @property
    def extras(self) -> int:
        """Tokens before the patches."""
        return 2 if self.classes else 1

    @property
    def tokens(self) -> int:
        return self.extras + self.patches

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size


class Norm(nn.Module):
    """LayerNorm with affine, eps 1e-5, reduced in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), eps=1e-5).to(x.dtype)


class Block(nn.Module):
    """A transformer block; one that receives a skip joins it to its input first."""

    def __init__(self, params: UVitParams, receives: bool):
        super().__init__()
        width = params.embed_dim
        self.norm1 = Norm(width)
        self.attn = Attention(width, params.num_heads, bias=params.qkv_bias)
        self.norm2 = Norm(width)
        self.mlp = Mlp(width, int(width * params.mlp_ratio), exact=True)
        self.skip_linear = nn.Linear(2 * width, width) if receives else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # (B, N, D)


class UVit(nn.Module):
    """U-ViT denoiser: `(sample, timestep, class_labels) -> noise`, or without `class_labels`. Names are those of the public code."""

    def __init__(self, params: UVitParams):
        super().__init__()
        self.params = params
        width, values = params.embed_dim, params.patch_size**2 * params.in_chans
        self.patch_embed = PatchEmbed(params.patch_size, params.in_chans, width)
        self.sinusoids = Sinusoids(width)
        hidden = (nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)) if params.mlp_time_embed else ()
        self.time_embed = nn.Sequential(*hidden)
        self.label_emb = nn.Embedding(params.num_classes, width) if params.classes else None
        self.pos_embed = nn.Parameter(torch.randn(1, params.tokens, width) * 0.02)
        half = params.depth // 2
        self.in_blocks = nn.ModuleList(Block(params, receives=False) for _ in range(half))
        self.mid_block = Block(params, receives=False)
        self.out_blocks = nn.ModuleList(Block(params, receives=params.skip) for _ in range(half))
        self.norm = Norm(width)
        self.decoder_pred = nn.Linear(width, values)
        self.final_layer = nn.Conv2d(params.in_chans, params.in_chans, 3, padding=1) if params.conv else nn.Identity()
        initialize(self, zero=())

    def extras(self, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """The label's token and the time's, before their positions."""
        time = self.time_embed(self.sinusoids(timestep).to(self.pos_embed.dtype))[:, None]  # (B, 1, D)
        return time if self.label_emb is None else torch.cat([self.label_emb(class_labels)[:, None], time], dim=1)  # (B, E, D)

    def embed(self, sample: Tensor, extras: Tensor) -> Tensor:
        """The tokens that the blocks take, with their positions: the extra ones and those of the patches."""
        return torch.cat([extras, self.patch_embed(sample.to(extras.dtype))], dim=1) + self.pos_embed  # (B, N, D)

    def run(self, x: Tensor, stretch: range, skips: list[Tensor]) -> Tensor:
        """A stretch of the depth + 1 blocks, in order. Those before the middle leave what they gave in `skips`, those after it take it, the
        last first."""
        blocks, half = [*self.in_blocks, self.mid_block, *self.out_blocks], len(self.in_blocks)
        for i in stretch:
            x = blocks[i](x, skips.pop()) if i > half else blocks[i](x)
            if i < half:
                skips.append(x)
        return x

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Shapes: sample (B, C, H, W); timestep (B,), 1000 or 999 times the continuous time, see `SCHEDULES`; class_labels (B,) int64, the
        last row for no label, and none where the model has no table.
        """
        x = self.embed(sample, self.extras(timestep, class_labels))
        x = self.run(x, range(self.params.depth + 1), [])
        return self.decode(x[:, self.params.extras :])

    def decode(self, x: Tensor) -> Tensor:
        """The last layers, on patches (B, T, D)."""
        patches = unpatchify(self.decoder_pred(self.norm(x)), self.params.patch_size, self.params.grid)
        picture: Tensor = self.final_layer(patches)
        return picture.float()  # (B, C, H, W)


_H = UVitParams(
    img_size=32, patch_size=2, in_chans=4, embed_dim=1152, depth=28, num_heads=16, num_classes=1001, conv=False, schedule="discrete"
)
_L = replace(_H, embed_dim=1024, depth=20, conv=True, schedule="vpsde")
_SIZES = {"h": _H, "l": _L}
PRESETS = {f"uvit-{size}-256": params for size, params in _SIZES.items()} | {
    f"uvit-{size}-512": replace(params, img_size=64, patch_size=4) for size, params in _SIZES.items()
}


def rename_key(key: str) -> str | None:
    """The module has the names of the public checkpoints, which are bare state dicts."""
    return key


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of UVitParams that a public checkpoint's shapes tell: all but the heads and the schedule.

    Raises: ModelError for a checkpoint that is no U-ViT, or one of a kind that this file does not implement.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    ranks = {"patch_embed.proj.weight": 4, "pos_embed": 3, "in_blocks.0.mlp.fc1.weight": 2, "decoder_pred.weight": 2}
    demand("a U-ViT", shapes, ranks)
    if "context_embed.weight" in shapes:
        raise ModelError("this U-ViT draws from texts (context_embed), and uvit from classes or from nothing: it cannot be exported")
    if any(name.startswith("input_token_editor.") for name in shapes):
        raise ModelError("this U-ViT has an elastic interface (input_token_editor), and uvit has none: export it as elit-uvit-tokens")
    width, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    labels = shapes.get("label_emb.weight", (-1,))[0]
    patches = shapes["pos_embed"][1] - (1 if labels == -1 else 2)
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise ModelError(
            f"this is not a U-ViT checkpoint: its pos_embed {shapes['pos_embed']} leaves {patches} patches, which make no square"
        )
    sizes = {
        "img_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": 2 * len({match[1] for key in shapes if (match := re.match(r"in_blocks\.(\d+)\.", key))}),
        "mlp_ratio": ratio(shapes["in_blocks.0.mlp.fc1.weight"][0], width),
        "qkv_bias": "in_blocks.0.attn.qkv.bias" in shapes,
        "mlp_time_embed": "time_embed.0.weight" in shapes,
        "num_classes": labels,
        "conv": "final_layer.weight" in shapes,
        "skip": "out_blocks.0.skip_linear.weight" in shapes,
    }
    return {"the checkpoint's shapes": sizes}


def assumed(known: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape tells, from the published size with this depth and width; what has pixels for samples was trained on the SDE."""
    pixels = {"schedule": "vpsde"} if known.get("in_chans") in (1, 3) else {}
    for preset in _SIZES.values():
        if (known.get("depth"), known.get("embed_dim")) == (preset.depth, preset.embed_dim):
            return {"num_heads": preset.num_heads, "schedule": preset.schedule} | pixels
    return pixels


def feeds(params: UVitParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, times in the schedule's unit, and labels where there are classes."""
    arrays = sample_feeds(params.sample_shape, params.classes, batch)
    longest = SCHEDULES[params.schedule].times(1)[0]
    return arrays | {"timestep": (arrays["timestep"] * longest).astype(np.float32)}


def block_flops(params: UVitParams, tokens: int, receives: bool = False) -> int:
    """FLOPs of a block on so many tokens."""
    skip = 4 * tokens * params.embed_dim**2 if receives and params.skip else 0
    return plain_block(tokens, params.embed_dim, params.mlp_ratio) + skip


def end_flops(params: UVitParams) -> int:
    """FLOPs of what stands before and after the blocks; the public code decodes the extra tokens before it drops them."""
    width, values = params.embed_dim, params.patch_size**2 * params.in_chans
    ends = 2 * params.patches * values * width + 2 * params.tokens * width * values
    time = 16 * width**2 if params.mlp_time_embed else 0
    return ends + time + (2 * params.img_size**2 * 9 * params.in_chans**2 if params.conv else 0)


def flops(params: UVitParams) -> int:
    """FLOPs of one forward pass at batch 1, as the public code computes it."""
    half, tokens = params.depth // 2, params.tokens
    return end_flops(params) + (half + 1) * block_flops(params, tokens) + half * block_flops(params, tokens, receives=True)


def activation_values(params: UVitParams) -> int:
    """Most values alive at once in a forward pass at batch 1: a block's, while the skips wait."""
    waiting = params.depth // 2 if params.skip else 0
    block = dit_activation_values(params.tokens, params.embed_dim, params.num_heads, params.mlp_ratio)
    return block + waiting * params.tokens * params.embed_dim


def cost(params: UVitParams, budget: Budget, weights: int) -> Cost:
    """Cost of one sample's forward pass; `weights` is the number of parameters."""
    return priced(budget, flops(params), weights, activation_values(params))


def facts(params: UVitParams) -> dict[str, Any]:
    return {
        "prediction": "epsilon",
        "schedule": SCHEDULES[params.schedule],
        "sample_shape": params.sample_shape,
        "num_classes": params.classes,
        "null_label": params.classes,
    }


FAMILY = Family(
    name="uvit", params=UVitParams, build=UVit, presets=PRESETS, rename_key=rename_key, sources=sources, assumed=assumed,
    axes=lambda params: (), inputs=lambda params: sample_inputs(params.sample_shape, bool(params.classes)),
    outputs=lambda params: sample_outputs(params.sample_shape), feeds=feeds, cost=cost, facts=facts, yields=("num_classes",),
)  # fmt: skip
