"""ELIT on Qwen-Image: the interface on the image stream, text at full length beside it (arXiv 2603.12245, section 4.4).

Legend: B batch, T spatial tokens, D width, G groups (windows), P latents a group, J kept latents a group, K = G*J, L text tokens,
C values of a token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic_export.families import qwen_image
from elastic_export.families.bricks import dit_activation_values
from elastic_export.families.elit import interface
from elastic_export.families.elit.interface import LATENT_IDS, InterfaceParams, Read, Windows, Write, latent_ids, tail_drop
from elastic_export.families.family import random_rows
from elastic_export.families.layers import Constants
from elastic_export.families.qwen_image import QwenImage
from elastic_export.families.tokens import Config
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.budget import Budget

NAME = "elit-qwen-image"


@dataclass(frozen=True)
class ElitQwenParams:
    """What `transformer/elit.json` adds to diffusers' `config`, for pictures of `rows` x `columns` tokens.

    Raises: ValueError for a split that leaves no core, and for a grid that windows do not divide.
    """

    config: Config
    rows: int
    columns: int
    group_size: int
    head_blocks: int
    tail_blocks: int

    def __post_init__(self) -> None:
        depth = self.config["num_layers"]
        if min(self.head_blocks, self.tail_blocks) < 0 or self.head_blocks + self.tail_blocks >= depth:
            raise ValueError(f"head_blocks {self.head_blocks} + tail_blocks {self.tail_blocks} must leave a core in {depth} blocks")
        _ = self.windows

    @property
    def windows(self) -> Windows:
        return Windows(self.rows, self.columns, self.group_size)

    @property
    def heads(self) -> int:
        heads: int = self.config["num_attention_heads"]
        return heads

    @property
    def width(self) -> int:
        """D."""
        return self.heads * int(self.config["attention_head_dim"])

    @property
    def interface(self) -> InterfaceParams:
        return InterfaceParams(self.windows, self.width, self.heads, self.width, latent_positions=None, write_positions=False)

    @property
    def core(self) -> range:
        """The blocks that run on latents."""
        return range(self.head_blocks, self.config["num_layers"] - self.tail_blocks)


class ElitQwenImage(Constants):
    """`(hidden_states, encoder_hidden_states, timestep, latent_ids) -> prediction`, of text of at most `length` tokens. It takes
    `transformer` over.

    Tokens stand in window order between the first layer and the last. A latent has the angles of the cell at its place.
    """

    def __init__(self, transformer: Any, params: ElitQwenParams, length: int):
        super().__init__()
        self.params = params
        self.backbone = QwenImage(transformer)
        self.read, self.write = Read(params.interface), Write(params.interface)
        device = torch.device("cpu")  # constants have values where weights are still on `meta`
        rows, columns = (torch.arange(side, device=device) - (side - side // 2) for side in (params.rows, params.columns))
        frame = torch.zeros(1, dtype=torch.int64, device=device)
        grid = torch.stack(torch.meshgrid(frame, rows, columns, indexing="ij"), dim=-1).view(1, -1, 3)
        self.cells = params.windows.from_raster(grid)[0].float()  # (T, 3)
        first = max(params.rows, params.columns) // 2
        self.words = torch.arange(first, first + length, device=device)[:, None].repeat(1, 3).float()  # (L, 3)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, latent_ids: Tensor) -> Tensor:
        """Predict the velocity (B, T, C).

        Shapes: hidden_states (B, T, C), raster; encoder_hidden_states (B, L, width of the text); timestep (B,), sigma in [0, 1];
        latent_ids (J,) int64, of which only the length is read.
        """
        params, kept, model = self.params, latent_ids.shape[0], self.backbone
        image, text, c = model.enter(hidden_states, encoder_hidden_states, timestep)
        words = self.words[: encoder_hidden_states.shape[1]]
        places = self.cells.unflatten(0, (params.windows.count, -1))[:, :kept].flatten(0, 1)  # (K, 3)
        whole, some = (model.rope(torch.cat((words, ids))) for ids in (self.cells, places))

        x = params.windows.from_raster(image)  # (B, T, D)
        x, text = model.blocks(slice(0, params.core.start), x, text, c, whole)
        spatial, latents = self.read(x, c)  # (B, G, P, D)
        z, text = model.blocks(slice(params.core.start, params.core.stop), tail_drop(latents, kept), text, c, some)  # (B, K, D)
        x = self.write(spatial, latents, z, kept)  # (B, T, D)
        x, _ = model.blocks(slice(params.core.stop, None), x, text, c, whole)
        return params.windows.to_raster(model.leave(x, c))  # (B, T, C)


def inputs(params: ElitQwenParams) -> tuple[TensorSpec, ...]:
    """The contract's inputs; T there is the text's length, as in every graph that takes one."""
    config, tokens = params.config, params.windows.tokens
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("B", tokens, config["in_channels"]),
        "encoder_hidden_states": ("B", "T", config["joint_attention_dim"]),
        "timestep": ("B",),
    }
    return (*(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()), LATENT_IDS)


def outputs(params: ElitQwenParams) -> tuple[TensorSpec, ...]:
    shape = ("B", params.windows.tokens, params.config["in_channels"])
    return (TensorSpec(name="prediction", dtype="float32", shape=shape),)


def feeds(params: ElitQwenParams, length: int, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, embeddings and times in (0, 1), the same at every budget, the first rows of a text of `length`; and the kept latents."""
    generator = np.random.default_rng(0)
    sizes, largest = {"B": batch, "T": budget.get("T", length)}, {"B": batch, "T": length}
    arrays = {spec.name: random_rows(generator, spec, largest, sizes) for spec in inputs(params) if len(spec.shape) > 1}
    arrays["timestep"] = generator.uniform(0.05, 0.95, batch).astype(np.float32)
    return arrays | latent_ids(params.windows, budget)


def flops(params: ElitQwenParams, latents: int, text: int) -> int:
    """FLOPs of one pass at batch 1 with `latents` kept (K) and `text` tokens (see `bricks` for what counts)."""
    config, tokens = params.config, params.windows.tokens
    outer = (config["num_layers"] - len(params.core)) * qwen_image.block_flops(config, tokens, text)
    core = len(params.core) * qwen_image.block_flops(config, latents, text)
    return outer + core + qwen_image.ends_flops(config, tokens, text) + interface.flops(params.interface)


def activation_values(params: ElitQwenParams, latents: int, text: int) -> int:
    """Most values alive at once at batch 1: in a block of head or tail, or in one of the core while the interface's tokens wait."""
    outer = params.head_blocks + params.tail_blocks
    whole = dit_activation_values(params.windows.tokens + text, params.width, params.heads) if outer else 0
    core = dit_activation_values(latents + text, params.width, params.heads)
    return max(whole, core + interface.waiting_values(params.interface))
