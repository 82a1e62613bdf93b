"""ELT in its masked form: a looped transformer that fills in picture tokens, as MaskGIT does (arXiv 2604.09168, 2202.04200).

Legend: B batch, T tokens, D width, V vocabulary (the id V is the mask), N unique blocks, L loops. The blocks are plain pre-norm
ones, 12 D^2 weights each, with no word of the time: how many masks are left tells it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from elastic_export.families.bricks import attention, check_hidden, dit_activation_values, ratio
from elastic_export.families.elt import axes, from_presets, looped, prefixes
from elastic_export.families.family import Family, demand, example_labels, priced
from elastic_export.families.layers import Attention, LabelEmbedder, Mlp, initialize, layer_norm, sincos_2d
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.schedule import CosineMask


@dataclass(frozen=True)
class EltMaskedParams:
    """Sizes of one masked ELT on a `grid` x `grid` picture of tokens. `loops` is L_max of training, `max_loops` the largest offered."""

    grid: int
    vocabulary: int
    hidden_size: int
    num_heads: int
    num_classes: int
    unique_blocks: int
    loops: int
    max_loops: int
    mlp_ratio: float = 4.0
    token_kind: str = "code"

    def __post_init__(self) -> None:
        for name in ("grid", "vocabulary", "hidden_size", "num_heads", "num_classes", "unique_blocks", "loops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4")
        check_hidden(self.hidden_size, self.mlp_ratio)
        if self.token_kind not in ("grey", "code"):
            raise ValueError(f"token_kind must be grey or code, got {self.token_kind!r}")
        if self.max_loops < self.loops:
            raise ValueError(f"max_loops {self.max_loops} is fewer than the {self.loops} loops of training")

    @property
    def tokens(self) -> int:
        return self.grid**2


class Block(nn.Module):
    """Pre-norm transformer block. LayerNorm's scale and shift would only repeat what the linear layer after it can do."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(layer_norm(x))
        return x + self.mlp(layer_norm(x))  # (B, T, D)


class EltMasked(nn.Module):
    """Masked ELT: `(tokens, class_labels, loops) -> logits`."""

    pos_embed: Tensor

    def __init__(self, params: EltMaskedParams):
        super().__init__()
        self.params = params
        width = params.hidden_size
        self.x_embedder = nn.Embedding(params.vocabulary + 1, width)
        self.y_embedder = LabelEmbedder(params.num_classes, width)
        self.register_buffer("pos_embed", sincos_2d(width, params.grid))
        blocks = [Block(width, params.num_heads, params.mlp_ratio) for _ in range(params.unique_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = nn.Linear(width, params.vocabulary)
        # Each block begins as an identity, so that L of them do too.
        initialize(self, zero=(self.final_layer, *(layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2))))

    def embed(self, tokens: Tensor, class_labels: Tensor) -> Tensor:
        """What the loop starts from; the label stands on every token."""
        return self.x_embedder(tokens) + self.pos_embed + self.y_embedder(class_labels)[:, None]  # (B, T, D)

    def once(self, x: Tensor) -> Tensor:
        """One loop: the N blocks."""
        for block in self.blocks:
            x = block(x)
        return x  # (B, T, D)

    def head(self, x: Tensor) -> Tensor:
        """Logits from the tokens of any loop."""
        return self.final_layer(layer_norm(x)).float()  # (B, T, V)

    def forward(self, tokens: Tensor, class_labels: Tensor, loops: Tensor | int) -> Tensor:
        """Logits of every token, masked or not.

        Shapes: tokens (B, T) int64, `vocabulary` for a mask; class_labels (B,) int64, `num_classes` for no label; loops () int64.
        """
        return self.head(looped(self.once, self.embed(tokens, class_labels), loops))

    def exits(self, tokens: Tensor, class_labels: Tensor, loops: Sequence[int]) -> list[Tensor]:
        """Logits after each of the rising counts `loops`, all from one pass of the last of them: for training."""
        return [self.head(state) for state in prefixes(self.once, self.embed(tokens, class_labels), loops)]


# Widths, depths, 256 tokens: the paper's. The vocabulary is MaskGIT's; heads of 64 or 72 channels and the loops past L_max are ours.
_L = EltMaskedParams(grid=16, vocabulary=1024, hidden_size=1024, num_heads=16, num_classes=1000, unique_blocks=8, loops=3, max_loops=4)
PRESETS = {
    "elt-masked-l-8x3": _L,
    "elt-masked-l-12x2": replace(_L, unique_blocks=12, loops=2, max_loops=3),
    "elt-masked-xl-7x4": replace(_L, hidden_size=1152, unique_blocks=7, loops=4, max_loops=5),
}


def rename_key(key: str) -> str | None:
    """Checkpoint keys are this file's own."""
    return key


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of EltMaskedParams that a checkpoint's shapes and training arguments tell.

    Raises: ModelError for a checkpoint that is not a masked ELT.
    """
    shape = {key: tuple(value.shape) for key, value in weights.items()}
    ranks = {"x_embedder.weight": 2, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "blocks.0.mlp.fc1.weight": 2}
    demand("a masked ELT", shape, ranks)
    width = shape["x_embedder.weight"][1]
    shapes = {
        "grid": math.isqrt(shape["pos_embed"][1]),
        "vocabulary": shape["x_embedder.weight"][0] - 1,
        "hidden_size": width,
        "num_classes": shape["y_embedder.embedding_table.weight"][0] - 1,
        "unique_blocks": len({match[1] for key in shape if (match := re.match(r"blocks\.(\d+)\.", key))}),
        "mlp_ratio": ratio(shape["blocks.0.mlp.fc1.weight"][0], width),
    }
    arguments = {name: args[name] for name in ("num_heads", "loops", "max_loops", "token_kind") if args.get(name) is not None}
    return {"the checkpoint's shapes": shapes, "the checkpoint's args": arguments}


def assumed(known: Mapping[str, Any]) -> dict[str, Any]:
    return from_presets(PRESETS, known)


def inputs(params: EltMaskedParams) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="tokens", dtype="int64", shape=("B", params.tokens)),
        TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
        TensorSpec(name="loops", dtype="int64", shape=()),
    )


def outputs(params: EltMaskedParams) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="logits", dtype="float32", shape=("B", params.tokens, params.vocabulary)),)


def feeds(params: EltMaskedParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Tokens, masks among them, and labels, the last of them the null label; the same for every budget."""
    generator = np.random.default_rng(0)
    return {
        "tokens": generator.integers(0, params.vocabulary + 1, (batch, params.tokens)),
        "class_labels": example_labels(generator, params.num_classes, batch),
        "loops": np.array(budget["loops"], dtype=np.int64),
    }


def flops(params: EltMaskedParams, loops: int) -> int:
    """FLOPs of one masked ELT forward pass at batch 1: `loops` times the shared blocks, which are DiT's without adaLN, and the logits."""
    width, tokens = params.hidden_size, params.tokens
    block = round(2 * tokens * (4 + 2 * params.mlp_ratio) * width**2) + attention(tokens, tokens, width)
    return params.unique_blocks * loops * block + 2 * tokens * width * params.vocabulary


def cost(params: EltMaskedParams, budget: Budget, weights: int) -> Cost:
    """Cost of one sample's forward pass; `weights` is the number of parameters, each held once whatever the loops."""
    values = dit_activation_values(params.tokens, params.hidden_size, params.num_heads, params.mlp_ratio)
    return priced(budget, flops(params, budget["loops"]), weights, values)


def facts(params: EltMaskedParams) -> dict[str, Any]:
    return {
        "prediction": "logits",
        "schedule": CosineMask(vocabulary=params.vocabulary),
        "sample_shape": (1, params.grid, params.grid),
        "num_classes": params.num_classes,
        "null_label": params.num_classes,
        "tokens": params.token_kind,
    }


FAMILY = Family(
    name="elt-masked", params=EltMaskedParams, build=EltMasked, presets=PRESETS, rename_key=rename_key, sources=sources,
    assumed=assumed, axes=axes, inputs=inputs, outputs=outputs, feeds=feeds, cost=cost, facts=facts,
)  # fmt: skip
