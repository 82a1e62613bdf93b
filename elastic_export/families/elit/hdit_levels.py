"""The interface in the public HDiT, inside its innermost level (k-diffusion's `image_transformer_v2`; arXiv 2603.12245, section 3.2).

Legend as in `hdit/model.py` and `interface.py`: T tokens of the innermost level, W its width, M condition width. Local attention needs a
grid, which latents have not: so the outer levels are head and tail, with the first and last layers of the innermost one. Nothing of it is
public, and where the interface stands is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

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
from elastic_export.families.family import Family, sample_inputs, sample_outputs
from elastic_export.families.hdit import model as hdit
from elastic_export.families.hdit.cells import Cells, Places
from elastic_export.families.hdit.model import Hdit, HditParams, end_flops, layer_flops, level_values
from elastic_export.families.layers import Constants
from elastic_runtime.contract.budget import Budget


@dataclass(frozen=True, kw_only=True)
class ElitHditLevelsParams(HditParams):
    """Sizes of a public HDiT with the interface inside its innermost level: `head_blocks` layers of it come before, `tail_blocks` after."""

    group_size: int
    head_blocks: int = 0
    tail_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, depth = self.self_attns[self.innermost]["type"], self.depths[self.innermost]
        if kind != "global":
            raise ValueError(f"the innermost level must have attention of type global, since latents have no grid, got {kind!r}")
        if min(self.head_blocks, self.tail_blocks) < 0 or self.head_blocks + self.tail_blocks >= depth:
            split = f"head_blocks {self.head_blocks} + tail_blocks {self.tail_blocks}"
            raise ValueError(f"{split} must leave a core in the innermost level, which has {depth} layers")
        _ = self.interface  # whose parts check themselves

    @property
    def windows(self) -> Windows:
        return Windows(*self.grid(self.innermost), self.group_size)

    @property
    def interface(self) -> InterfaceParams:
        width, heads = self.widths[self.innermost], self.heads(self.innermost)
        return InterfaceParams(self.windows, width, heads, self.mapping_width, latent_positions=None, write_positions=False)

    @property
    def core(self) -> slice:
        """The layers of the innermost level that run on latents."""
        return slice(self.head_blocks, self.depths[self.innermost] - self.tail_blocks)


class Latents(Constants):
    """Where latents stand: on the cell at their place in their window, whose angles they take."""

    def __init__(self, windows: Windows):
        super().__init__()
        positions = Cells((windows.rows, windows.columns), "global").positions
        self.positions = windows.from_raster(positions[None])[0].unflatten(0, (windows.count, -1))  # (G, P, 2)

    def forward(self, kept: int) -> list[Places]:
        """The first `kept` of each window, for even layers and for odd ones; all P stand where the tokens do, in window order."""
        return [Places(self.positions[:, :kept].flatten(0, 1))] * 2


class ElitHditLevels(nn.Module):
    """HDiT denoiser with the interface: `(sample, timestep, class_labels, latent_ids) -> F` of EDM's preconditioning, or without
    `class_labels`; `timestep` is sigma."""

    def __init__(self, params: ElitHditLevelsParams):
        super().__init__()
        self.params = params
        self.hdit = Hdit(params)
        self.read = Read(params.interface)
        self.write = Write(params.interface)
        self.places = Latents(params.windows)
        self.exact = tuple(f"hdit.{name}" for name in self.hdit.exact)

    def forward(self, sample: Tensor, timestep: Tensor, latent_ids: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict F, of which the picture is `c_skip x + c_out F`.

        Shapes: as `Hdit.forward`; latent_ids (J,) int64, always `arange(J)`: only its length is read, since kept latents are a prefix.
        """
        params, kept = self.params, latent_ids.shape[0]
        level: Any = self.hdit.mid_level
        tokens = self.places(params.windows.places)
        cond = self.hdit.condition(timestep, class_labels)  # (B, M)
        x, outer = self.hdit.down(sample, cond)
        x = params.windows.from_raster(x)  # (B, T, W)
        x = self.hdit.run(level[: params.core.start], x, cond, tokens)

        spatial, latents = self.read(x, cond)  # (B, G, P, W)
        z = tail_drop(latents, kept)  # (B, K, W)
        z = self.hdit.run(level[params.core], z, cond, self.places(kept))
        x = self.write(spatial, latents, z, kept)  # (B, T, W)

        x = self.hdit.run(level[params.core.stop :], x, cond, tokens)
        return self.hdit.up(params.windows.to_raster(x), outer, cond)  # (B, C, H, W)


def rename_key(key: str) -> str | None:
    """Name in an ElitHditLevels of a key: the public HDiT's, or one of the public ELIT's editors."""
    name = interface.renamed(key)
    if name.startswith(("read.", "write.")):
        return name
    return f"hdit.{own}" if (own := hdit.rename_key(key)) else None


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of ElitHditLevelsParams that a checkpoint and the config beside it tell: all of HDiT's, and the windows.

    Raises: ModelError as `hdit.sources`, and for a checkpoint without the interface.
    """
    own, sizes = interface.parted(weights, "elit-hdit-levels", "hdit")
    return hdit.sources(own, args) | {"the interface's shapes": {"group_size": sizes["group_size"]}}


def feeds(params: ElitHditLevelsParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """The plain backbone's, the same for every budget, and the kept latents."""
    return hdit.feeds(params, budget, batch) | latent_ids(params.windows, budget)


def flops(params: ElitHditLevelsParams, latents: int) -> int:
    """FLOPs of one forward pass at batch 1 with `latents` kept latents, local attention by the tokens that are seen."""
    level, tokens = params.innermost, params.windows.tokens
    outer = (params.head_blocks + params.tail_blocks) * layer_flops(params, level, tokens, tokens)
    core = (params.core.stop - params.core.start) * layer_flops(params, level, latents, latents)
    return end_flops(params) + outer + core + interface.flops(params.interface)


def activation_values(params: ElitHditLevelsParams, latents: int) -> int:
    """Most values alive at once in a forward pass at batch 1. What the outer levels keep waits while the innermost one runs, and the
    tokens and all latents while its core does."""
    level, tokens = params.innermost, params.windows.tokens
    outer = [level_values(params, each, params.tokens(each)) + hdit.waiting_values(params, each) for each in range(level)]
    head = level_values(params, level, tokens) if params.head_blocks + params.tail_blocks else 0
    core = level_values(params, level, latents) + interface.waiting_values(params.interface)
    return max([*outer, max(head, core) + hdit.waiting_values(params, level)])


FAMILY = Family(
    name="elit-hdit-levels", params=ElitHditLevelsParams, build=ElitHditLevels, presets={}, rename_key=rename_key, sources=sources,
    assumed=lambda known: {}, axes=lambda params: (latents_axis(params.windows),),
    inputs=lambda params: (*sample_inputs(params.sample_shape, bool(params.num_classes)), LATENT_IDS),
    outputs=lambda params: sample_outputs(params.sample_shape), feeds=feeds, cost=latents_cost(flops, activation_values),
    facts=hdit.facts, options=("head_blocks",),
)  # fmt: skip
