"""Which tokens of an HDiT's level see each other, as tables that are built with the module.

Local attention is dense attention under a constant mask, which is the same function and which every compiler knows; shifted windows join
the heads, so that one constant mask serves every batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic_export.families.layers import Constants


class Cells(Constants):
    """Where a level's tokens stand and which see each other, as tables.

    windows: parts of the tokens that attend within themselves, once they are `ordered`. positions (n, 2): (y, x) in that order.
    mask (1, 1, n, n) or (1, heads*windows, s*s, s*s): True where seen, None: all are.
    """

    mask: Tensor | None = None
    windows = 1

    def __init__(self, grid: tuple[int, int], kind: str, size: int = 0, heads: int = 1, shifted: bool = False):
        super().__init__()
        self.grid, self.side, self.shift = grid, 0, 0
        centres = [(2 * np.arange(side) + 1 - side) / max(grid) for side in grid]  # the longer side spans [-1, 1]
        places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
        if kind == "neighborhood":
            rows, columns = (_neighbours(side, size) for side in grid)
            mask = rows[:, None, :, None] & columns[None, :, None, :]  # (h, w, h, w)
            self.mask = torch.from_numpy(mask.reshape(1, 1, len(places), len(places)))
        elif kind == "shifted-window":
            self.side, self.shift = size, size // 2 if shifted else 0
            h, w = (side // size for side in grid)
            self.windows = h * w
            places = self.ordered(torch.from_numpy(places)[None])[0].numpy()
            if self.shift:
                rows, columns = (_sides(count, size, self.shift) for count in (h, w))
                mask = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]  # (h, w, s, s, s, s)
                whole = np.tile(mask.reshape(h * w, size**2, size**2), (heads, 1, 1))  # windows of the first head, of the second, ...
                self.mask = torch.from_numpy(whole[None])
        self.positions = torch.from_numpy(places.astype(np.float32))

    def ordered(self, x: Tensor) -> Tensor:
        """Tokens (B, n, W) window after window, rolled first where windows are shifted; as they are where there are none."""
        # Slices and not an index: ONNX Runtime 1.31 crashes on a Gather of such tokens in half precision.
        return gathered(self._rolled(x, self.shift), self.grid, (self.side, self.side)).reshape(x.shape) if self.side else x

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        if not self.side:
            return x
        cells = x.reshape(x.shape[0], self.windows, self.side**2 * x.shape[2])
        return self._rolled(spread(cells, self.grid, (self.side, self.side)), -self.shift)

    def _rolled(self, x: Tensor, shift: int) -> Tensor:
        if not shift:
            return x
        x = x.unflatten(1, self.grid)  # (B, h, w, W)
        x = torch.cat([x[:, -shift:], x[:, :-shift]], dim=1)
        return torch.cat([x[:, :, -shift:], x[:, :, :-shift]], dim=2).flatten(1, 2)


@dataclass(frozen=True)
class Places:
    """Tokens that all see each other, wherever they stand: `Cells` of no grid.

    positions (n, 2): (y, x) of each.
    """

    positions: Tensor
    mask: None = None
    windows: int = 1

    def ordered(self, x: Tensor) -> Tensor:
        return x

    def restored(self, x: Tensor) -> Tensor:
        return x


def gathered(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens (B, h*w, W) of a grid h x w joined by cells of a x b: (B, h/a * w/b, a*b*W), row-major within a cell."""
    (h, w), (a, b) = grid, size
    cells = x.reshape(x.shape[0], h // a, a, w // b, b * x.shape[2])  # five dimensions: six are too many for Core ML where one is open
    return cells.transpose(2, 3).reshape(x.shape[0], h // a * (w // b), a * b * x.shape[2])


def spread(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of `gathered`: `grid` is that of the result."""
    (h, w), (a, b) = grid, size
    width = x.shape[2] // (a * b)
    return x.reshape(x.shape[0], h // a, w // b, a, b * width).transpose(2, 3).reshape(x.shape[0], h * w, width)


def _neighbours(side: int, size: int) -> np.ndarray:
    """Which cells of an axis each sees (side, side): the `size` around it, moved inside at the ends (NATTEN)."""
    first = np.clip(np.arange(side) - size // 2, 0, side - size)[:, None]
    cells = np.arange(side)[None]
    seen: np.ndarray = (first <= cells) & (cells < first + size)
    return seen


def _sides(count: int, size: int, shift: int) -> np.ndarray:
    """Which rows of a window see each other (count, size, size): all, but in the first window, whose first `shift` came round the edge."""
    seen = np.ones((count, size, size), dtype=bool)
    around = np.arange(size) < shift
    seen[0] = around[:, None] == around[None]
    return seen
