"""What FLUX, SD3 and Qwen-Image share as graphs: transformers over packed patches with positions, in diffusers' words.

Legend: B batch, S image tokens, T text tokens, C values of a token, D the text's width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from elastic_export.families.family import random_rows
from elastic_export.families.layers import Constants
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.tokens import text_places

Config = Mapping[str, Any]
AXIS = "tokens"  # the elastic dimension: S is its budget
THETA = 10000.0


class Rope(Constants):
    """Rotary angles from positions (N, 3), in float32: diffusers' own puts float64 into FLUX's graph, for a difference of 6e-7, and
    complex numbers into Qwen-Image's."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.frequencies = [(1.0 / THETA ** (torch.arange(0, width, 2, dtype=torch.float64) / width)).float() for width in widths]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = [ids[:, axis, None].float() * frequencies for axis, frequencies in enumerate(self.frequencies)]
        angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # (N, sum of widths)
        return angle.cos(), angle.sin()


@dataclass(frozen=True)
class TokenFamily:
    """One kind of transformer over tokens, as a diffusers folder has it.

    name: as in the manifest. class_name: diffusers' class. wrap(transformer): the graph's module.
    patches(config): how it takes a latent. channels(config): of that latent. refusal(config): why one is not exported, after its
    folder's name. side(config): of its usual latent, None where the VAE tells. text_length(config): the most tokens that its pipeline
    takes from its last encoder. beside: those of CLIP that come before them.
    spaced: whether its pipeline gives the sigmas, evenly, before the shift; else they are the scheduler's own, down to its least.
    flops(config, image, text): of one forward pass over so many tokens at batch 1, 2 a multiply-add.
    rescale: see `manifest.Model.guidance_rescale`.
    few_steps(config, scheduler, distilled): see `manifest.Model.few_steps`; `distilled` is what `model_index.json` says (`is_distilled`).
    """

    name: str
    class_name: str
    wrap: Callable[[Any], nn.Module]
    patches: Callable[[Config], Patches]
    channels: Callable[[Config], int]
    refusal: Callable[[Config], str | None]
    side: Callable[[Config], int | None]
    text_length: Callable[[Config], int]
    beside: int
    spaced: bool
    flops: Callable[[Config, int, int], int]
    rescale: Literal["norm"] | None = None
    few_steps: Callable[[Config, Config, bool], int | None] = lambda config, scheduler, distilled: None


def draws_over(takes: int, gives: int) -> str | None:
    """Why a transformer that takes more channels than it gives is refused; None for one of as many."""
    if takes == gives:
        return None
    return (
        f"takes {takes} channels and gives {gives}: it draws over a picture that it is given (as FLUX Fill and Control do), which is not "
        "supported; export a model that draws from noise"
    )


def pooled(config: Config) -> int:
    """Width of the pooled text that it takes, 0 for one that takes none."""
    return config.get("pooled_projection_dim") or 0


def inputs(family: TokenFamily, config: Config) -> tuple[TensorSpec, ...]:
    """The contract's inputs: Qwen-Image takes no pooled text; FLUX has `txt_ids` and perhaps `guidance`, SD3 has neither."""
    patches = family.patches(config)
    values = family.channels(config) * patches.size**2
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("B", "S", values),
        "encoder_hidden_states": ("B", "T", config["joint_attention_dim"]),
        "pooled_projections": ("B", pooled(config)),
        "timestep": ("B",),
    }
    if not pooled(config):
        del shapes["pooled_projections"]
    shapes |= {"img_ids": ("S", 3), "txt_ids": ("T", 3)} if patches.positions == "img_ids" else {"pos_ids": ("S", 2)}
    if patches.guidance_embeds:
        shapes["guidance"] = ("B",)
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


def axis(span: Span) -> Axis:
    """`tokens`: S itself, every count in `span`."""
    return Axis(
        name=AXIS, min=span.min, max=span.max, step=1, default=span.max, input="hidden_states", carrier="shape", dimension="S",
    )  # fmt: skip


def named(specs: tuple[TensorSpec, ...], fixed: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """The specs with the dimensions in `fixed` no longer open."""
    shapes = [tuple(fixed.get(size, size) if isinstance(size, str) else size for size in spec.shape) for spec in specs]
    return tuple(TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape) for spec, shape in zip(specs, shapes, strict=True))


def outputs(family: TokenFamily, config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="prediction", dtype="float32", shape=("B", "S", family.channels(config) * family.patches(config).size ** 2)),)


def feeds(specs: tuple[TensorSpec, ...], patches: Patches, spans: Mapping[str, Span], budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, embeddings, times in (0, 1) and guidance scales for `batch` samples; `tokens` (S) and T as `budget` says, else the largest.

    Positions are rows and columns of a square picture of the largest S, halves among them, in no order: attention needs none. Text has
    the places that go with such a picture.
    """
    sizes = {"B": batch, "S": budget.get(AXIS, spans["S"].max), "T": budget.get("T", spans["T"].max)}
    side = patches.table or int(np.ceil(np.sqrt(spans["S"].max)))
    generator = np.random.default_rng(0)
    ranges = {"timestep": (0.05, 0.95), "guidance": (1.0, 5.0)}
    arrays = {}
    for spec in specs:
        if spec.name == "txt_ids":
            arrays[spec.name] = text_places(sizes["T"], (side, side), patches)
        elif spec.name in ("img_ids", "pos_ids"):
            places = generator.integers(0, 2 * side - 1, (spans["S"].max, 2)) / 2 - (-(-side // 2) if patches.centred else 0)
            arrays[spec.name] = np.pad(places, ((0, 0), (spec.shape[1] - 2, 0)))[: sizes["S"]].astype(np.float32)  # type: ignore[operator]
        elif spec.name in ranges:
            arrays[spec.name] = generator.uniform(*ranges[spec.name], batch).astype(np.float32)
        else:
            arrays[spec.name] = random_rows(generator, spec, {"B": batch} | {name: span.max for name, span in spans.items()}, sizes)
    return arrays
