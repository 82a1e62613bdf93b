"""ELIT's interface, for any backbone (arXiv 2603.12245, section 3.2): Read, tail drop and Write, between a grid of tokens and latents.

Legend: B batch, T spatial tokens, D width, G groups (windows), P latents a group, J kept latents a group, K = G*J kept latents
of a picture.

Between Read and Write a backbone runs on latents (B, K, D), window after window. Spatial tokens come to Read in window order, and Write
leaves them so: attention over all of them does not mind, and windows are slices.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.bricks import attention, cross_attention
from elastic_export.families.family import priced
from elastic_export.families.layers import Mlp, Modulation, layer_norm, merge_heads, modulate, split_heads
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.errors import ModelError

# Names of a public checkpoint's keys in a model that has `read` and `write`.
RENAMES = (
    (r"^input_token_editor\.adapters\.0\.fit_layer\.latents_attend_to_patches\.0\.", "read.attention."),
    (r"^input_token_editor\.adapters\.0\.fit_layer\.read_ff\.0\.", "read.mlp."),
    (r"^input_token_editor\.adapters\.0\.fit_layer\.", "read."),
    (r"^input_token_editor\.adapters\.0\.", "read."),
    (r"^output_token_editor\.adapters\.0\.patches_attend_to_latents\.0\.", "write.attention."),
    (r"^output_token_editor\.adapters\.0\.write_ff\.0\.", "write.mlp."),
    (r"^output_token_editor\.adapters\.0\.", "write."),
    (r"\badaLN_modulation\.1\.", "modulation.linear."),
)

# The other way: what names in a model that has `read` and `write` are in a public checkpoint.
_PUBLIC = (
    ("modulation.linear.", "adaLN_modulation.1."),
    ("read.attention.", "input_token_editor.adapters.0.fit_layer.latents_attend_to_patches.0."),
    ("read.mlp.", "input_token_editor.adapters.0.fit_layer.read_ff.0."),
    ("read.adaLN_modulation.", "input_token_editor.adapters.0.fit_layer.adaLN_modulation."),
    ("read.", "input_token_editor.adapters.0."),
    ("write.attention.", "output_token_editor.adapters.0.patches_attend_to_latents.0."),
    ("write.mlp.", "output_token_editor.adapters.0.write_ff.0."),
    ("write.", "output_token_editor.adapters.0."),
)
TABLE = "read.latent_pos_embed"
LATENT_IDS = TensorSpec(name="latent_ids", dtype="int64", shape=("J",))


@dataclass(frozen=True)
class Windows:
    """A grid of `rows` x `columns` tokens cut into windows of `side` x `side`, row-major, and so are the tokens of a window.

    Raises: ValueError where windows do not divide the grid, or have no side.
    """

    rows: int
    columns: int
    side: int

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"group_size must be at least 1, got {self.side}")
        if self.rows % self.side or self.columns % self.side:
            grid, group = f"{self.rows}x{self.columns}", f"{self.side}x{self.side}"
            raise ValueError(f"a grid of {grid} tokens does not divide into groups of {group}")

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.columns

    @property
    def places(self) -> int:
        """P, the tokens of a window, and its latents."""
        return self.side**2

    @property
    def grid(self) -> tuple[int, int]:
        """Windows by row and column."""
        return self.rows // self.side, self.columns // self.side

    @property
    def count(self) -> int:
        """G."""
        return self.tokens // self.places

    # The axes of transposes are positive: coremltools 9.0 computes negative ones of six dimensions wrongly.
    def from_raster(self, x: Tensor) -> Tensor:
        rows, columns = self.grid
        return x.unflatten(1, (rows, self.side, columns, self.side)).transpose(2, 3).flatten(1, 4)  # (B, T, D), window after window

    def to_raster(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (*self.grid, self.side, self.side)).transpose(2, 3).flatten(1, 4)  # (B, T, D)


@dataclass(frozen=True)
class InterfaceParams:
    """Sizes of an interface in a backbone of width `width` whose condition is `condition` wide.

    latent_positions: rows of Read's table of latent positions, one for each raster cell; write_positions: whether Write has a table of
    its own. A backbone with rotary positions has neither table.
    """

    windows: Windows
    width: int
    heads: int
    condition: int
    latent_positions: int | None
    write_positions: bool = True

    def __post_init__(self) -> None:
        if self.latent_positions is not None and self.latent_positions < self.windows.tokens:
            raise ValueError(f"latent_positions {self.latent_positions} is fewer than the {self.windows.tokens} tokens")


class RootMeanSquareNorm(nn.Module):
    """`x / (||x|| / sqrt(D) + 1e-5) * scale`: the epsilon is added to the root, not under it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return (wide / (root + 1e-5)).to(x.dtype) * self.scale


class CrossAttention(nn.Module):
    """Attention inside each window, with q and k normalised over the full width before the head split.

    `x` (P, D) stands for the same queries in every window, which are then computed once.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.q_norm = RootMeanSquareNorm(width)
        self.k_norm = RootMeanSquareNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv_proj(context).chunk(2, dim=-1)
        q = self.q_norm(self.q_proj(x)).expand_as(k)
        # Windows join the batch: fused attention kernels and ONNX's Attention take three or four dimensions.
        q, k, v = (split_heads(part.flatten(0, 1), self.heads) for part in (q, self.k_norm(k), v))  # (B*G, H, P, D/H)
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v))  # (B*G, P, D)
        return self.proj(attended.unflatten(0, context.shape[:2]))  # (B, G, P, D)


class Read(nn.Module):
    """Latents read the spatial tokens of their window."""

    def __init__(self, params: InterfaceParams):
        super().__init__()
        self.windows = params.windows
        places, width = params.windows.places, params.width
        self.learned_query_embed = nn.Parameter(torch.randn(places, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(places, width) * 0.02)
        if params.latent_positions is None:
            self.latent_pos_embed = None
        else:
            self.latent_pos_embed = nn.Parameter(torch.randn(params.latent_positions, width) * 0.02)
        self.modulation = Modulation(width, 7, params.condition)
        self.attention = CrossAttention(width, params.heads)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial tokens with their places, which Write takes, and all the latents, both (B, G, P, D); of `x` (B, T, D), `c` (B, Dc)."""
        spatial = x.unflatten(1, (self.windows.count, -1)) + self.pos_embed  # (B, G, P, D)
        # The seventh part is in the checkpoints and unused by the public forward.
        shift_p, scale_p, gate_a, shift_m, scale_m, gate_m, _ = (part[:, None] for part in self.modulation(c))  # (B, 1, 1, D)
        latents = self.learned_query_embed  # (P, D), of every window
        latents = latents + gate_a * self.attention(latents, modulate(layer_norm(spatial), shift_p, scale_p))
        latents = latents + gate_m * self.mlp(modulate(layer_norm(latents), shift_m, scale_m))
        if self.latent_pos_embed is not None:
            cells = self.windows.from_raster(self.latent_pos_embed[None, : self.windows.tokens])  # (1, T, D)
            latents = latents + cells.unflatten(1, (self.windows.count, -1))
        return spatial, latents


def tail_drop(latents: Tensor, kept: int) -> Tensor:
    """The first `kept` latents of every group of `latents` (B, G, P, D), as one sequence (B, K, D)."""
    return latents[:, :, :kept].flatten(1, 2)


class Write(nn.Module):
    """Spatial tokens read back from all the latents of their window, updated and dropped ones alike."""

    def __init__(self, params: InterfaceParams):
        super().__init__()
        width = params.width
        self.pos_embed = nn.Parameter(torch.randn(params.windows.places, width) * 0.02) if params.write_positions else None
        self.attention = CrossAttention(width, params.heads)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, spatial: Tensor, latents: Tensor, z: Tensor, kept: int) -> Tensor:
        """Tokens (B, T, D) of what Read gave, (B, G, P, D) both, and of the kept latents `z` (B, K, D) after the core."""
        updated = z.unflatten(1, (spatial.shape[1], -1))  # (B, G, J, D)
        latents = torch.cat([updated, latents[:, :, kept:]], dim=2)  # (B, G, P, D)
        if self.pos_embed is not None:
            spatial = spatial + self.pos_embed
        spatial = spatial + self.attention(spatial, latents)
        return (spatial + self.mlp(spatial)).flatten(1, 2)


def latents_axis(windows: Windows) -> Axis:
    """`latents`: K = G*J, carried by the length J of `latent_ids`."""
    return Axis(
        name="latents", min=windows.count, max=windows.tokens, step=windows.count, default=windows.tokens,
        input="latent_ids", carrier="length", unit=windows.count, dimension="J",
    )  # fmt: skip


def latent_ids(windows: Windows, budget: Budget) -> dict[str, np.ndarray]:
    """The feed of `LATENT_IDS` for a budget."""
    return {"latent_ids": np.arange(budget["latents"] // windows.count, dtype=np.int64)}


def mirrored(head_blocks: int, tail_blocks: int) -> None:
    """Raise ValueError unless skips of a backbone stay on their side of the interface."""
    if head_blocks != tail_blocks:
        raise ValueError(
            f"head_blocks {head_blocks} must equal tail_blocks {tail_blocks}: a skip joins tokens to tokens or latents to "
            "latents; give the split that the model was trained with"
        )


def latents_cost(flops: Callable[[Any, int], int], activation_values: Callable[[Any, int], int]) -> Callable[[Any, Budget, int], Cost]:
    """A family's `cost` by its FLOPs and its most values alive at (params, latents)."""

    def cost(params: Any, budget: Budget, weights: int) -> Cost:
        latents = budget["latents"]
        return priced(budget, flops(params, latents), weights, activation_values(params, latents))

    return cost


def renamed(key: str, *more: tuple[str, str]) -> str:
    """A public checkpoint's key with `read` and `write` for the two editors, and `more` renames of a backbone's."""
    for pattern, name in (*RENAMES, *more):
        key = re.sub(pattern, name, key)
    return key


def public(name: str) -> str:
    """The public checkpoint's key of a weight of `read` or `write`: `renamed` undone."""
    for ours, theirs in _PUBLIC:
        name = name.replace(ours, theirs, 1)
    return name


def parted(weights: Mapping[str, Tensor], family: str, plain: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A checkpoint of a `plain` backbone with the interface put in: the backbone's own weights, and the sizes that the interface's tell.

    Raises: ModelError where there is no interface, or its tables have no two dimensions.
    """
    own = {key: value for key, value in weights.items() if not renamed(key).startswith(("read.", "write."))}
    tables = {name: tuple(value.shape) for key, value in weights.items() if (name := renamed(key)) in ("read.pos_embed", TABLE)}
    if "read.pos_embed" not in tables:
        raise ModelError(f"this checkpoint has no interface (input_token_editor), so it is not an {family}: export it as {plain}")
    if odd := [name for name, shape in tables.items() if len(shape) != 2 or 0 in shape]:
        raise ModelError(f"this is not an {family} checkpoint: its {odd[0]} has shape {tables[odd[0]]}, not 2 whole dimensions")
    positions = {"latent_positions": tables[TABLE][0]} if TABLE in tables else {}
    return own, {"group_size": math.isqrt(tables["read.pos_embed"][0])} | positions


def flops(params: InterfaceParams) -> int:
    """FLOPs of Read and Write at batch 1: both run at full P however many latents are kept.

    What is counted and not computed is Read's query projection of all windows but one: they have the same queries.
    """
    width, tokens, per_group = params.width, params.windows.tokens, params.windows.places
    windows = params.windows.count * attention(per_group, per_group, width)
    feed_forward = 2 * tokens * 2 * width**2  # MLP of ratio 1
    return 2 * 7 * params.condition * width + 2 * (cross_attention(tokens, tokens, width) + windows + feed_forward)


def waiting_values(params: InterfaceParams) -> int:
    """Values that wait at batch 1 while the core runs: the spatial tokens and all latents."""
    return 2 * params.windows.tokens * params.width
