"""The interface in the public U-ViT, whose time and label are tokens (github.com/baofff/U-ViT; arXiv 2603.12245, section 3.2).

Legend as in `uvit.py` and `interface.py`: E tokens before the patches, N = E+T. The core runs on E+K tokens. Nothing of it is public: that
the extra tokens pass the interface by is what the paper says of text, and where it stands is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_export.families import uvit
from elastic_export.families.bricks import dit_activation_values
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
from elastic_export.families.uvit import UVit, UVitParams, block_flops, end_flops
from elastic_runtime.contract.budget import Budget


@dataclass(frozen=True, kw_only=True)
class ElitUvitTokensParams(UVitParams):
    """Sizes of a public U-ViT with the interface between `head_blocks` and `tail_blocks` of its depth + 1 blocks."""

    group_size: int
    head_blocks: int
    tail_blocks: int
    latent_positions: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        interface.mirrored(self.head_blocks, self.tail_blocks)
        if not 0 <= self.head_blocks <= self.depth // 2:
            raise ValueError(
                f"head_blocks and tail_blocks {self.head_blocks} must be 0 to {self.depth // 2}: of {self.depth + 1} blocks the middle one "
                "runs on latents"
            )
        _ = self.interface  # whose parts check themselves

    @property
    def windows(self) -> Windows:
        return Windows(self.grid, self.grid, self.group_size)

    @property
    def interface(self) -> InterfaceParams:
        return InterfaceParams(self.windows, self.embed_dim, self.num_heads, self.embed_dim, self.latent_positions)

    @property
    def core(self) -> range:
        """The blocks that run on latents."""
        return range(self.head_blocks, self.depth + 1 - self.tail_blocks)


class ElitUvitTokens(nn.Module):
    """U-ViT denoiser with the interface: `(sample, timestep, class_labels, latent_ids) -> noise`, or without `class_labels`."""

    def __init__(self, params: ElitUvitTokensParams):
        super().__init__()
        self.params = params
        self.uvit = UVit(params)
        self.read = Read(params.interface)
        self.write = Write(params.interface)

    def forward(self, sample: Tensor, timestep: Tensor, latent_ids: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Shapes: as `UVit.forward`; latent_ids (J,) int64, always `arange(J)`: only its length is read, since kept latents are a prefix.
        """
        params, kept, extra = self.params, latent_ids.shape[0], self.params.extras
        skips: list[Tensor] = []
        extras = self.uvit.extras(timestep, class_labels)  # (B, E, D)
        x = self.uvit.embed(sample, extras)  # (B, N, D)
        x = torch.cat([x[:, :extra], params.windows.from_raster(x[:, extra:])], dim=1)
        x = self.uvit.run(x, range(params.core.start), skips)

        spatial, latents = self.read(x[:, extra:], extras.sum(dim=1))  # (B, G, P, D)
        z = torch.cat([x[:, :extra], tail_drop(latents, kept)], dim=1)  # (B, E+K, D)
        z = self.uvit.run(z, params.core, skips)
        x = torch.cat([z[:, :extra], self.write(spatial, latents, z[:, extra:], kept)], dim=1)  # (B, N, D)

        x = self.uvit.run(x, range(params.core.stop, params.depth + 1), skips)
        return self.uvit.decode(params.windows.to_raster(x[:, extra:]))  # (B, C, H, W)


def rename_key(key: str) -> str | None:
    """Name in an ElitUvitTokens of a key: the public U-ViT's, or one of the public ELIT's editors."""
    name = interface.renamed(key)
    return name if name.startswith(("read.", "write.")) else f"uvit.{name}"


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of ElitUvitTokensParams that a checkpoint's shapes tell: all but the heads, the schedule and the split.

    Raises: ModelError as `uvit.sources`, and for a checkpoint without the interface.
    """
    own, interface_sizes = interface.parted(weights, "elit-uvit-tokens", "uvit")
    return {source: sizes | interface_sizes for source, sizes in uvit.sources(own, args).items()}


def feeds(params: ElitUvitTokensParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """The plain backbone's, the same for every budget, and the kept latents."""
    return uvit.feeds(params, budget, batch) | latent_ids(params.windows, budget)


def flops(params: ElitUvitTokensParams, latents: int) -> int:
    """FLOPs of one forward pass at batch 1 with `latents` kept latents; a core block's tokens are these and the extra ones."""
    total = end_flops(params) + interface.flops(params.interface)
    for index in range(params.depth + 1):
        tokens = params.extras + latents if index in params.core else params.tokens
        total += block_flops(params, tokens, receives=index > params.depth // 2)
    return total


def activation_values(params: ElitUvitTokensParams, latents: int) -> int:
    """Most values alive at once in a forward pass at batch 1. Outputs wait for their mirrors: the head's while the core runs."""
    width, outer, core = params.embed_dim, params.head_blocks, params.extras + latents
    inner = params.depth // 2 - outer
    head, middle = (dit_activation_values(tokens, width, params.num_heads, params.mlp_ratio) for tokens in (params.tokens, core))
    if params.skip:
        head, middle = head + outer * params.tokens * width, middle + (outer * params.tokens + inner * core) * width
    return max(head if outer else 0, middle + interface.waiting_values(params.interface))


FAMILY = Family(
    name="elit-uvit-tokens", params=ElitUvitTokensParams, build=ElitUvitTokens, presets={}, rename_key=rename_key, sources=sources,
    assumed=uvit.assumed, axes=lambda params: (latents_axis(params.windows),),
    inputs=lambda params: (*sample_inputs(params.sample_shape, bool(params.classes)), LATENT_IDS),
    outputs=lambda params: sample_outputs(params.sample_shape), feeds=feeds, cost=latents_cost(flops, activation_values), facts=uvit.facts,
)  # fmt: skip
