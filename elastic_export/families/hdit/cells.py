"""Which tokens of an HDiT's level see each other, as tables that are built with the module.

Local attention is dense attention under a constant mask, which is the same function and which every compiler knows; shifted windows are a
constant order of the tokens, and join the heads.
"""

import numpy as np
import torch
from torch import Tensor

from elastic_export.families.layers import Constants


class Cells(Constants):
    """Where a level's tokens stand and which see each other, as tables.

    `order` and its inverse: in what order attention takes the tokens, None where as they are. positions (n, 2): (y, x) in that order.
    windows: parts of it that attend within themselves. mask (1, 1, n, n) or (1, heads*windows, s*s, s*s): True where seen, None: all are.
    """

    order: Tensor | None = None
    inverse: Tensor | None = None
    mask: Tensor | None = None
    windows = 1

    def __init__(self, grid: tuple[int, int], kind: str, size: int = 0, heads: int = 1, shifted: bool = False):
        super().__init__()
        centres = [(2 * np.arange(side) + 1 - side) / max(grid) for side in grid]  # the longer side spans [-1, 1]
        places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
        if kind == "neighborhood":
            rows, columns = (_neighbours(side, size) for side in grid)
            mask = rows[:, None, :, None] & columns[None, :, None, :]  # (h, w, h, w)
            self.mask = torch.from_numpy(mask.reshape(1, 1, len(places), len(places)))
        elif kind == "shifted-window":
            shift = size // 2 if shifted else 0
            cells = np.roll(np.arange(len(places)).reshape(grid), (shift, shift), (0, 1))
            h, w = (side // size for side in grid)
            order = cells.reshape(h, size, w, size).swapaxes(1, 2).reshape(-1)
            self.order, self.inverse, self.windows = torch.from_numpy(order), torch.from_numpy(np.argsort(order)), h * w
            places = places[order]
            if shift:
                rows, columns = (_sides(count, size, shift) for count in (h, w))
                mask = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]  # (h, w, s, s, s, s)
                whole = np.tile(mask.reshape(h * w, size**2, size**2), (heads, 1, 1))  # windows of the first head, of the second, ...
                self.mask = torch.from_numpy(whole[None])
        self.positions = torch.from_numpy(places.astype(np.float32))


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
