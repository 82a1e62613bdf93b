"""ELIT-HDiT: SiT blocks whose inner part runs at twice the width on a quarter of the latents (arXiv 2603.12245, section 4.2).

Legend as in `backbone.py`; Gh and Gw are the sides of the grid of groups. Nothing of it is public; merge and split have the form of
HDiT's (arXiv 2401.11605): linear layers without bias, and a learned mean with what was there before. The paper merges groups, so that
latents of the same place in 2 x 2 neighbouring groups become one token and every number of kept latents will do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastic_export.families.bricks import dit_block
from elastic_export.families.elit import interface
from elastic_export.families.elit.backbone import Backbone, ElitParams, block_values, family, outer_flops, shapes_of, sources
from elastic_export.families.layers import Constants
from elastic_runtime.errors import ModelError


@dataclass(frozen=True)
class ElitHditParams(ElitParams):
    """Sizes of one ELIT-HDiT: latents are merged before block `merge_block` and split again before block `split_block`."""

    merge_block: int = field(kw_only=True)
    split_block: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.core.start, self.core.stop
        if not first <= self.merge_block < self.split_block <= last:
            raise ValueError(
                f"merge_block {self.merge_block} and split_block {self.split_block} must lie in the core, in this order: its blocks are "
                f"{first} to {last - 1}, and split_block may be {last}"
            )
        if any(side % 2 for side in self.windows.grid):
            rows, columns = self.windows.grid
            raise ValueError(f"a grid of {rows}x{columns} groups cannot be merged two by two: choose a group_size that leaves even sides")

    @property
    def merged(self) -> range:
        """The blocks between merge and split."""
        return range(self.merge_block, self.split_block)


def quarters(rows: int, columns: int) -> Tensor:
    """Row-major groups in the order of their places in blocks of 2 x 2, (G,): first all of place (0, 0), then (0, 1), (1, 0), (1, 1)."""
    groups = torch.arange(rows * columns, device="cpu").reshape(rows // 2, 2, columns // 2, 2)
    return groups.permute(1, 3, 0, 2).flatten()


# An open J allows Core ML no more than five dimensions, so groups are brought in order by a constant and not by a view of seven.
class Merge(Constants):
    """Latents of 2 x 2 neighbouring groups become one token of twice the width."""

    def __init__(self, width: int, rows: int, columns: int):
        super().__init__()
        self.order = quarters(rows, columns)
        self.proj = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        groups = len(self.order)
        parts = z.unflatten(1, (groups, -1))[:, self.order]  # (B, G, J, D), the first quarters of all blocks first
        parts = parts.unflatten(1, (4, groups // 4)).permute(0, 2, 3, 1, 4)  # (B, G/4, J, 4, D)
        return self.proj(parts.flatten(3)).flatten(1, 2)  # (B, K/4, 2D)


class Split(Constants):
    """A token becomes the latents of 2 x 2 groups again, in a learned mean with those that were merged."""

    def __init__(self, width: int, rows: int, columns: int):
        super().__init__()
        self.order = quarters(rows, columns).argsort()
        self.proj = nn.Linear(2 * width, 4 * width, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        groups = len(self.order)
        parts = self.proj(x.unflatten(1, (groups // 4, -1))).unflatten(3, (4, -1))  # (B, G/4, J, 4, D)
        parts = parts.permute(0, 3, 1, 2, 4).flatten(1, 2)[:, self.order]  # (B, G, J, D)
        return before + self.fac * (parts.flatten(1, 2) - before)  # (B, K, D)


class ElitHdit(Backbone):
    """ELIT-HDiT: a merge before the inner blocks of the core, a split after them."""

    def __init__(self, params: ElitHditParams):
        super().__init__(params, doubled=params.merged)
        self.merged = params.merged
        self.merge = Merge(params.hidden_size, *params.windows.grid)
        self.split = Split(params.hidden_size, *params.windows.grid)

    def step(self, index: int, x: Tensor, c: Tensor, waiting: list[Tensor]) -> Tensor:
        if index == self.merged.start:
            waiting.append(x)
            x = self.merge(x)  # (B, K/4, 2D)
        x = self.blocks[index](x, c)
        if index + 1 == self.merged.stop:
            x = self.split(x, waiting.pop())
        return x  # (B, N, D), or (B, K/4, 2D) between merge and split


def block_sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`sources`, and from the blocks of twice the width where merge and split stand.

    Raises: ModelError also where no row of blocks has twice the width.
    """
    sizes = sources("elit-hdit", weights, args)
    named, shapes = shapes_of("elit-hdit", weights), sizes["the checkpoint's shapes"]
    wide = [index for index in range(shapes["depth"]) if named.get(f"blocks.{index}.attn.proj.bias") == (2 * shapes["hidden_size"],)]
    if not wide or wide != list(range(wide[0], wide[-1] + 1)):
        raise ModelError(
            f"this is not an elit-hdit checkpoint: of its blocks those between merge and split, one after the other, should be "
            f"{2 * shapes['hidden_size']} wide, twice hidden_size; so wide are {', '.join(map(str, wide)) or 'none'}"
        )
    return sizes | {"the checkpoint's shapes": shapes | {"merge_block": wide[0], "split_block": wide[-1] + 1}}


def flops(params: ElitHditParams, latents: int) -> int:
    """FLOPs of one forward pass at batch 1 with `latents` kept latents; a merge and a split are `2 * 4 * K * D^2` together."""
    width, ratio, merged = params.hidden_size, params.mlp_ratio, len(params.merged)
    plain = (len(params.core) - merged) * dit_block(latents, width, ratio)
    inner = merged * dit_block(latents // 4, 2 * width, ratio, condition=width)
    return outer_flops(params) + plain + inner + 2 * 4 * latents * width**2


def activation_values(params: ElitHditParams, latents: int) -> int:
    """Most values alive at once in a forward pass at batch 1. While inner blocks run, the latents before the merge wait as well."""
    outer = block_values(params, params.tokens) if params.head_blocks + params.tail_blocks else 0
    plain = block_values(params, latents) if len(params.core) > len(params.merged) else 0
    inner = block_values(params, latents // 4, scale=2) + latents * params.hidden_size
    return max(outer, max(plain, inner) + interface.waiting_values(params.interface))


# XL's split is the paper's; in the others, too, as many core blocks lie outside merge and split as head and tail have.
SPLITS = {
    "xl": {"head_blocks": 4, "tail_blocks": 4, "merge_block": 8, "split_block": 20},
    "l": {"head_blocks": 4, "tail_blocks": 4, "merge_block": 8, "split_block": 16},
    "b": {"head_blocks": 2, "tail_blocks": 2, "merge_block": 4, "split_block": 8},
    "s": {"head_blocks": 2, "tail_blocks": 2, "merge_block": 4, "split_block": 8},
}
FAMILY = family(
    "elit-hdit", ElitHditParams, ElitHdit, SPLITS, block_sources, flops, activation_values, yields=("merge_block", "split_block")
)
