"""What the families share: embeddings, attention, the adaLN-Zero block and the final layer.

Legend: B batch, N tokens, T grid tokens, D width, H heads, C channels, p patch side, h and w token grid sides.

Half-precision models keep their reductions (LayerNorm, RMS) and their sinusoids in float32: in float16 a squared sum
overflows and a timestep embedding is wrong by up to 0.46.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import Self  # since Python 3.11


def sincos_2d(width: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos positions `(1, side*side, width)`: columns first, then rows, each `[sin | cos]` (MAE, DiT)."""
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width that is a multiple of 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = axis[None, :, :].expand(side, side, -1)
    rows = axis[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine, eps 1e-6, reduced in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Constants(nn.Module):
    """A module whose plain tensors are constants: they follow it to another device, and never to another precision.

    They are no buffers, which `.half()` would round and building on `meta` would lose.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        super()._apply(fn, recurse)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                vars(self)[name] = value.to(fn(torch.empty(0, device=value.device)).device)
            elif isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
                vars(self)[name] = [each.to(fn(torch.empty(0, device=each.device)).device) for each in value]
        return self


class Sinusoids(Constants):
    """`[cos | sin](t * 10000^(-i/half) * scale)` of times (B,): `width` of them, twice `half`, float32 (DiT). They are multiplied in this
    order, as Qwen-Image's are: a time of nearly 1000 that was rounded first moves its outputs by 5e-6."""

    def __init__(self, width: int = 256, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        # torch's own constants: an exporter that folds the formula is an ulp off, which a time of thousands makes large.
        self.frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device="cpu") / (width // 2))

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None].float() * self.frequencies  # (B, width / 2)
        angles = angles * self.scale if self.scale != 1 else angles
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


class TimestepEmbedder(nn.Module):
    """`mlp(Sinusoids()(t))` (DiT)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.sinusoids = Sinusoids()

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(timestep).to(next(self.mlp.parameters()).dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """Class table with one more row, `num_classes`, for "no label" (classifier-free guidance)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)  # (B, D)


class PatchEmbed(nn.Module):
    """Non-overlapping `p x p` patches, raster order."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, sample: Tensor) -> Tensor:
        return self.proj(sample).flatten(2).transpose(1, 2)  # (B, T, D)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (B, H, N, D/H)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)  # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are `[q | k | v]`, each `(heads, head_dim)`."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, H, N, D/H)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))  # (B, N, D)


class Mlp(nn.Module):
    """Two linear layers around a GELU, in its tanh form unless it is asked for `exact`."""

    def __init__(self, width: int, hidden: int, bias: bool = True, exact: bool = False):
        super().__init__()
        self.form = "none" if exact else "tanh"
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.form))


class Modulation(nn.Module):
    """adaLN: `Linear(SiLU(c))` cut into `parts` vectors of the width; `c` has that width too, or that of `condition`."""

    def __init__(self, width: int, parts: int, condition: int | None = None):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition or width, parts * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c))[:, None, :].chunk(self.parts, dim=-1)  # parts x (B, 1, D)


class DiTBlock(nn.Module):
    """adaLN-Zero transformer block (DiT, arXiv 2212.09748, section 3.2); `c` has the block's width, or that of `condition`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, condition: int | None = None):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.modulation = Modulation(width, 6, condition)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = x + gate_a * self.attn(modulate(layer_norm(x), shift_a, scale_a), mask)
        return x + gate_m * self.mlp(modulate(layer_norm(x), shift_m, scale_m))  # (B, N, D)


class FinalLayer(nn.Module):
    """adaLN, then one linear layer to the `p*p*C` values of a patch."""

    def __init__(self, width: int, out_features: int, condition: int | None = None):
        super().__init__()
        self.modulation = Modulation(width, 2, condition)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(modulate(layer_norm(x), shift, scale))  # (B, T, p*p*C)


def unpatchify(tokens: Tensor, patch_size: int, side: int) -> Tensor:
    """Raster tokens `(B, side*side, p*p*C)` laid out `(p, p, C)` back to a picture `(B, C, side*p, side*p)`."""
    grid = tokens.unflatten(1, (side, side)).unflatten(3, (patch_size, patch_size, -1))  # (B, h, w, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h*p, w*p)


def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter a small random value, so that no zero-initialised layer hides a part of the network."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(std=0.02, generator=generator)
        parameter.data = noise if parameter.ndim > 1 else parameter.data + noise


def initialize(model: nn.Module, zero: Iterable[nn.Module]) -> None:
    """Xavier weights, zero biases, then zeros in the layers that must start as identities (adaLN-Zero)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in zero:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
