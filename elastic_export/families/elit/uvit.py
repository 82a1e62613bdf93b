"""ELIT-U-ViT: SiT blocks with long skips between those of the first half and those of the second (arXiv 2603.12245, section 4.2).

Legend as in `backbone.py`. Nothing of it is public; the form of a skip is U-ViT's (arXiv 2209.12152, equation 3): the two are
concatenated and go through a linear layer. Thirteen skips at depth 28 are what the paper's FLOPs say.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from elastic_export.families.bricks import dit_block
from elastic_export.families.elit import interface
from elastic_export.families.elit.backbone import Backbone, ElitParams, block_values, family, outer_flops, sources


@dataclass(frozen=True)
class ElitUvitParams(ElitParams):
    """Sizes of one ELIT-U-ViT. Block i sends its output to block `depth - 1 - i`, but for the middle block or two, which have no
    skip. A skip stays on its side of the interface."""

    def __post_init__(self) -> None:
        super().__post_init__()
        interface.mirrored(self.head_blocks, self.tail_blocks)
        if not self.senders:
            raise ValueError(f"depth {self.depth} leaves no skip: give 3 blocks or more, or take elit-sit")

    @property
    def senders(self) -> range:
        return range((self.depth - 1) // 2)

    @property
    def receivers(self) -> range:
        return range(self.depth - len(self.senders), self.depth)


def skip_linear(width: int) -> nn.Linear:
    """What joins a block's input, first, and its mirror's output. A new one passes the input on: as an ELIT-SiT becomes an ELIT-U-ViT."""
    layer = nn.Linear(2 * width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ElitUvit(Backbone):
    """ELIT-U-ViT: a block of the second half first joins the output of its mirror."""

    def __init__(self, params: ElitUvitParams):
        super().__init__(params)
        self.senders = params.senders
        self.skips = nn.ModuleDict({str(index): skip_linear(params.hidden_size) for index in params.receivers})

    def step(self, index: int, x: Tensor, c: Tensor, waiting: list[Tensor]) -> Tensor:
        if str(index) in self.skips:
            x = self.skips[str(index)](torch.cat([x, waiting.pop()], dim=-1))  # (B, N, D)
        x = self.blocks[index](x, c)
        if index in self.senders:
            waiting.append(x)
        return x  # (B, N, D)


def flops(params: ElitUvitParams, latents: int) -> int:
    """FLOPs of one forward pass at batch 1 with `latents` kept latents: an ELIT-SiT's and the skips'."""
    width, outer = params.hidden_size, params.head_blocks
    inner = len(params.senders) - outer
    skips = 2 * (outer * params.tokens + inner * latents) * 2 * width**2
    return outer_flops(params) + len(params.core) * dit_block(latents, width, params.mlp_ratio) + skips


def activation_values(params: ElitUvitParams, latents: int) -> int:
    """Most values alive at once in a forward pass at batch 1. Outputs wait for their mirrors: the head's while the core runs."""
    width, outer = params.hidden_size, params.head_blocks
    inner = len(params.senders) - outer
    head = block_values(params, params.tokens) if outer else 0
    core = block_values(params, latents) + inner * latents * width + interface.waiting_values(params.interface)
    return max(head, core) + outer * params.tokens * width


# XL's split is the paper's; the others are ours.
SPLITS = {size: {"head_blocks": blocks, "tail_blocks": blocks} for size, blocks in (("xl", 4), ("l", 4), ("b", 2), ("s", 2))}
FAMILY = family("elit-uvit", ElitUvitParams, ElitUvit, SPLITS, partial(sources, "elit-uvit"), flops, activation_values)
