"""What HDiT's levels are made of (k-diffusion's `image_transformer_v2`); no linear layer has a bias.

Legend: B batch, n tokens of a level's grid h x w in raster order, W its width, H heads, d their width, M condition width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.hdit.cells import Cells, Places, gathered, spread
from elastic_export.families.layers import merge_heads, split_heads


def rms(x: Tensor, scale: Tensor) -> Tensor:
    """`x * scale / sqrt(mean(x^2) + 1e-6)`, reduced in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * scale


class Norm(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.scale)


class ConditionedNorm(nn.Module):
    """RMS norm whose scale is 1 and what the condition adds."""

    def __init__(self, width: int, condition: int):
        super().__init__()
        self.linear = nn.Linear(condition, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return rms(x, self.linear(cond)[:, None] + 1)


class Fourier(nn.Module):
    """`[cos | sin](2 pi v w)` of numbers v (B,), float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width // 2, 1))

    def forward(self, v: Tensor) -> Tensor:
        angles = 2 * math.pi * (v[:, None] * self.weight[:, 0])
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


class AxialRope(nn.Module):
    """Turns a half of each head by angles that grow with y and x; the other half stays. Float32."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        frequencies = torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * width // 8 + 1)[:-1].exp()
        self.freqs = nn.Parameter(frequencies.reshape(width // 8, heads).T.contiguous())

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (H, n, d/4) of positions (n, 2)."""
        angles = torch.cat([positions[:, :1] * self.freqs[:, None], positions[:, 1:] * self.freqs[:, None]], dim=-1)
        return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first quarter of each head's width and the second, as pairs, by the angles."""
    quarter = cos.shape[-1]
    first, second, rest = x[..., :quarter], x[..., quarter : 2 * quarter], x[..., 2 * quarter :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class SelfAttention(nn.Module):
    """Attention by cosines, scaled for each head, with axial RoPE, among the tokens that `cells` lets see each other."""

    def __init__(self, width: int, condition: int, head: int):
        super().__init__()
        self.heads = width // head
        self.norm = ConditionedNorm(width, condition)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((self.heads,), 10.0))
        self.pos_emb = AxialRope(self.heads, head)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor, cells: Cells | Places) -> Tensor:
        x = self.norm(x, cond)
        x = cells.ordered(x)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv_proj(x).chunk(3, dim=-1))  # (B, H, n, d)
        cos, sin = self.pos_emb(cells.positions)
        q, k = (turned(self.unit(part), cos, sin).to(x.dtype) for part in (q, k))
        if cells.windows > 1:
            q, k, v = (part.unflatten(2, (cells.windows, -1)).flatten(1, 2) for part in (q, k, v))  # (B, H*windows, s*s, d)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=cells.mask, scale=1.0)
        if cells.windows > 1:
            attended = attended.unflatten(1, (self.heads, -1)).flatten(2, 3)
        return cells.restored(self.out_proj(merge_heads(attended)))  # (B, n, W)

    def unit(self, x: Tensor) -> Tensor:
        """Queries or keys of one length, the root of their head's scale, float32."""
        wide = x.float()
        return wide * (self.scale.float().sqrt()[:, None, None] * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6))


class FeedForward(nn.Module):
    """GEGLU with the exact GELU; the gate is the second half."""

    def __init__(self, norm: nn.Module, width: int, hidden: int):
        super().__init__()
        self.norm = norm
        self.up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        value, gate = self.up_proj(self.norm(x, *cond)).chunk(2, dim=-1)
        return self.down_proj(value * F.gelu(gate))


class Condition(nn.Module):
    """The network from the sum of what conditions a picture to the condition of every layer."""

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.in_norm = Norm(width)
        self.blocks = nn.ModuleList(FeedForward(Norm(width), width, hidden) for _ in range(depth))
        self.out_norm = Norm(width)

    def forward(self, cond: Tensor) -> Tensor:
        cond = self.in_norm(cond)
        for block in self.blocks:
            cond = cond + block(cond)
        return self.out_norm(cond)  # (B, M)


class Layer(nn.Module):
    """Attention, unless the level has none, and a feed-forward."""

    def __init__(self, width: int, hidden: int, condition: int, head: int | None):
        super().__init__()
        self.self_attn = SelfAttention(width, condition, head) if head else None
        self.ff = FeedForward(ConditionedNorm(width, condition), width, hidden)

    def forward(self, x: Tensor, cond: Tensor, cells: Cells | Places) -> Tensor:
        if self.self_attn is not None:
            x = x + self.self_attn(x, cond, cells)
        return x + self.ff(x, cond)  # (B, n, W)


class Linear(nn.Module):
    """A linear layer under the name `proj`."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Merge(nn.Module):
    """The four tokens of each 2x2 cell, one after the other, through one linear layer."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(4 * width, inner, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(gathered(x, grid, (2, 2)))  # (B, n/4, W of the inner level)


class Split(nn.Module):
    """The mirror of `Merge`, between what was kept before it and what comes out."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(inner, 4 * width, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
        return kept + self.fac * (spread(self.proj(x), grid, (2, 2)) - kept)  # (B, n, W)
