"""ELIT-SiT: the interface around plain SiT blocks (arXiv 2603.12245, CVPR 2026), as in the public code and checkpoints."""

from functools import partial

from torch import Tensor

from elastic_export.families.bricks import dit_block
from elastic_export.families.elit import interface
from elastic_export.families.elit.backbone import Backbone, ElitParams, block_values, family, outer_flops, sources


class Elit(Backbone):
    """ELIT-SiT: block after block."""

    def step(self, index: int, x: Tensor, c: Tensor, waiting: list[Tensor]) -> Tensor:
        return self.blocks[index](x, c)  # (B, N, D)


def flops(params: ElitParams, latents: int) -> int:
    """FLOPs of one forward pass at batch 1 with `latents` kept latents, as published."""
    return outer_flops(params) + len(params.core) * dit_block(latents, params.hidden_size, params.mlp_ratio)


def activation_values(params: ElitParams, latents: int) -> int:
    """Most values alive at once in a forward pass at batch 1. While the core runs, the spatial tokens and all latents wait."""
    outer = block_values(params, params.tokens) if params.head_blocks + params.tail_blocks else 0
    return max(outer, block_values(params, latents) + interface.waiting_values(params.interface))


# The shipped configs start the core at encoder_depth 8; the paper's own split of XL is 4-20-4 (head_blocks=4).
SPLITS = {
    "xl": {"head_blocks": 8, "tail_blocks": 4},
    "l": {"head_blocks": 8, "tail_blocks": 4},
    "b": {"head_blocks": 8, "tail_blocks": 2},
    "s": {"head_blocks": 8, "tail_blocks": 2},
}
FAMILY = family("elit-sit", ElitParams, Elit, SPLITS, partial(sources, "elit-sit"), flops, activation_values)
