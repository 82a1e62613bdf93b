"""Dynamic chunking: which tokens of a picture go through the core, and how the others are filled in from them.

Legend: B batch, T grid tokens, s grid side, D width, K slots. A slot holds a kept token, the most wanted first; slots past a
sample's count are hidden: they hold some token that nothing reads. No shape depends on the data (arXiv 2603.06351, section 3).
All of this is float32 in models of any precision, as in training: a decision that rounds to the other side changes a whole token.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 1e9  # a squared distance beyond every grid


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Where autocast is on (in training), a context without it; no exported graph should hear of one."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def float32(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """What a layer makes of `x` in float32, whatever the precision of its weights."""
    assert layer.bias is not None
    weight, bias = layer.weight.float(), layer.bias.float()
    with full_precision(x):
        if isinstance(layer, nn.Linear):
            return F.linear(x.float(), weight, bias)
        return F.conv2d(x.float(), weight, bias, padding=layer.padding)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm, reduced in float32."""
    return F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


class Router(nn.Module):
    """Probability that a token is kept: high where a token differs from what its neighbours say of it."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 4
        self.proj = nn.Conv2d(width, inner, 1)
        self.context_predictor = nn.Conv2d(inner, inner, 3, padding=1)
        self.residual_scorer = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1), nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, 1, 1)
        )

    def forward(self, grid: Tensor) -> Tensor:
        """Keep probabilities (B, T) of tokens on their grid (B, D, s, s) in float32; 1 for the first and the last token."""
        first, norm, _, last = self.residual_scorer
        assert isinstance(first, nn.Conv2d)
        assert isinstance(norm, nn.GroupNorm)
        assert isinstance(last, nn.Conv2d)
        z = float32(self.proj, grid)  # (B, D/4, s, s)
        surprise = float32(first, z - float32(self.context_predictor, z))
        p = torch.sigmoid(float32(last, F.silu(group_norm(norm, surprise)))).flatten(1)  # (B, T)
        return F.pad(p[:, 1:-1], (1, 1), value=1.0)


def natural(p: Tensor) -> Tensor:
    """Which tokens the router keeps by itself, (B, T)."""
    return p > 1 - p


def count(p: Tensor, drop_fraction: Tensor) -> Tensor:
    """Tokens kept of each sample (B,), after its fraction of the natural ones is dropped.

    In float32, as the public code counts: other precisions drop another number of tokens (90 of them at 0.7).
    """
    kept = natural(p).float().sum(1)
    return kept - torch.floor(kept * drop_fraction)


def select(p: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Probabilities and grid positions (B, K) of the natural tokens with the highest p; -1 and any token where there are no more."""
    ranked = torch.topk(p.masked_fill(~natural(p), -1.0), slots, dim=1)
    return ranked.values, ranked.indices


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` (B, N, D) by `index` (B, M)."""
    return torch.gather(x, 1, index[:, :, None].expand(-1, -1, x.shape[2]))  # (B, M, D)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Between grid cells `a` (B, N, 2) and `b` (B, M, 2): whole numbers (B, N, M), exact in float32."""
    rows = a[:, :, None, 0] - b[:, None, :, 0]
    columns = a[:, :, None, 1] - b[:, None, :, 1]
    return rows * rows + columns * columns


def smooth(h: Tensor, p: Tensor, cells: Tensor, visible: Tensor, sigma: float) -> Tensor:
    """Kept tokens `h` (B, K, D), each mixed with the others around it by as much as the router doubted it.

    Shapes: p (B, K); cells (B, K, 2); visible (B, K), 1 or 0. Gaussian of `sigma` cells, weighted by p (section 3.3).
    """
    p = p.clamp(1e-4, 1 - 1e-4)
    weight = torch.exp(squared_distance(cells, cells) / (-2 * sigma**2)) * (p * visible)[:, None, :]  # (B, K, K)
    with full_precision(h):
        mean = (weight / (weight.sum(-1, keepdim=True) + 1e-8)) @ h  # (B, K, D)
    return p[:, :, None] * h + (1 - p[:, :, None]) * mean


def nearest(grid: Tensor, cells: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """For every grid cell (T, 2), the slot (B, T) of its nearest kept token; of equally near ones, the first in raster order.

    Two steps of small whole numbers (the least distance, then the least position that has it) are exact in float32 on grids
    up to 2048 x 2048, where one key of both is not past 32 x 32.
    """
    distance = squared_distance(grid[None], cells) + (1 - visible)[:, None, :] * HIDDEN  # (B, T, K)
    farther = (distance > distance.amin(-1, keepdim=True)).float()
    return (positions.float()[:, None, :] + farther * grid.shape[0]).argmin(-1)
