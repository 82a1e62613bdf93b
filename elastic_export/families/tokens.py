"""What FLUX, FLUX.2, SD3 and Qwen-Image share as graphs: transformers over packed patches with positions, in diffusers' words.

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
from elastic_export.families.prompts import PromptRule
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.tokens import place, text_places

Config = Mapping[str, Any]
AXIS = "tokens"  # the elastic dimension: S is its budget
PADDED = 1.0  # above which a normal value makes a row of feeds a pad token: one in six


class Rope(Constants):
    """Rotary angles from positions (N, columns), in float32: diffusers' own puts float64 into FLUX's graph, for a difference of 6e-7, and
    complex numbers into Qwen-Image's. `widths` are those of a head's values that turn with each column."""

    def __init__(self, widths: tuple[int, ...], theta: float):
        super().__init__()
        self.frequencies = [(1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)).float() for width in widths]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = [ids[:, axis, None].float() * frequencies for axis, frequencies in enumerate(self.frequencies)]
        angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # (N, sum of widths)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring values of `x` (B, H, N, W/H) turned as pairs by the angles of these cosines and sines (N, W/H), in float32."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + across.float() * sin).to(x.dtype)


@dataclass(frozen=True)
class TokenFamily:
    """One kind of transformer over tokens, as a diffusers folder has it.

    name: as in the manifest. class_name: diffusers' class. wrap(transformer): the graph's module.
    patches(config): how it takes a latent. channels(config): of that latent. refusal(config): why one is not exported, after its
    folder's name. side(config): of its usual latent, None where the VAE tells. text_length(config): the most tokens that its pipeline
    takes from its last encoder. beside: those of CLIP that come before them.
    spaced: whether its pipeline gives the sigmas, evenly, before the shift; else they are the scheduler's own, down to its least.
    flops(config, image, text): of one forward pass over so many tokens at batch 1, 2 a multiply-add. width(config), heads(config) and
    text_width(config): of the model, and of a text token that it takes.
    rescale, off: see `guidance_rescale` and `guidance_off` of `manifest.Model`. distilled(config, stated): see the field of that name;
    `stated` is what the folder says. few_steps: those that its distilled models draw in. mu(stated): where its pipeline has a rule of its
    own for the scheduler's dynamic shift, see `ralu.plan.full`. fusion(transformer), layers(config): what makes one text token of so many
    tapped layers, a graph of its own; see `manifest.Text`. fusion_flops(config, text): of a run of that. prompts: how its pipelines read
    them, each with a language model of its own; none where it has CLIP and T5.
    """

    name: str
    class_name: str
    wrap: Callable[[Any], nn.Module]
    patches: Callable[[Config], Patches]
    channels: Callable[[Config], int]
    flops: Callable[[Config, int, int], int]
    refusal: Callable[[Config], str | None] = lambda config: None
    side: Callable[[Config], int | None] = lambda config: None
    text_length: Callable[[Config], int] = lambda config: 512
    beside: int = 0
    spaced: bool = True
    rescale: Literal["norm"] | None = None
    few_steps: int | None = None
    off: Literal[0, 1] = 1
    distilled: Callable[[Config, bool], bool] = lambda config, stated: False
    width: Callable[[Config], int] = lambda config: config["attention_head_dim"] * config["num_attention_heads"]
    heads: Callable[[Config], int] = lambda config: config["num_attention_heads"]
    text_width: Callable[[Config], int] = lambda config: config["joint_attention_dim"]
    mu: Callable[[bool], float | Literal["empirical"] | None] = lambda stated: None
    fusion: Callable[[Any], nn.Module] | None = None
    fusion_flops: Callable[[Config, int], int] = lambda config, text: 0
    layers: Callable[[Config], int | None] = lambda config: None
    prompts: tuple[PromptRule, ...] = ()


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
    """The contract's inputs: FLUX.2 and Qwen-Image take no pooled text; FLUX has `txt_ids` and perhaps `guidance`, SD3 has neither."""
    patches = family.patches(config)
    values = family.channels(config) * patches.size**2
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("B", "S", values),
        "encoder_hidden_states": ("B", "T", family.text_width(config)),
        "pooled_projections": ("B", pooled(config)),
        "timestep": ("B",),
    }
    if not pooled(config):
        del shapes["pooled_projections"]
    shapes[patches.positions] = ("S", patches.columns)
    if patches.positions == "img_ids":
        shapes["txt_ids"] = ("T", patches.columns)
    if patches.guidance_embeds:
        shapes["guidance"] = ("B",)
    if patches.multiple is not None:
        shapes |= {"img_pad": ("B", "S"), "txt_pad": ("B", "T")}
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


def axis(span: Span, patches: Patches) -> Axis:
    """`tokens`: S itself, every count in `span` that the graph takes."""
    low, high = patches.filled_all((span.min, span.max))
    return Axis(
        name=AXIS, min=low, max=high, step=patches.multiple or 1, default=high, input="hidden_states", carrier="shape", dimension="S",
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
    the places that go with such a picture, which lies where it would beside the longest text. Some rows are pad tokens, anywhere.
    """
    sizes = {"B": batch, "S": budget.get(AXIS, spans["S"].max), "T": budget.get("T", spans["T"].max)}
    side = patches.table or int(np.ceil(np.sqrt(spans["S"].max)))
    largest = {"B": batch} | {name: span.max for name, span in spans.items()}
    generator = np.random.default_rng(0)
    ranges = {"timestep": (0.05, 0.95), "guidance": (1.0, 5.0)}
    arrays = {}
    for spec in specs:
        if spec.name == "txt_ids":
            arrays[spec.name] = text_places(sizes["T"], (side, side), patches)
        elif spec.name in ("img_ids", "pos_ids"):
            places = generator.integers(0, 2 * side - 1, (spans["S"].max, 2)) / 2
            arrays[spec.name] = place(places, (side, side), spans["T"].max, patches)[: sizes["S"]]
        elif spec.name in ("img_pad", "txt_pad"):
            arrays[spec.name] = (random_rows(generator, spec, largest, sizes) > PADDED).astype(np.float32)
        elif spec.name in ranges:
            arrays[spec.name] = generator.uniform(*ranges[spec.name], batch).astype(np.float32)
        else:
            arrays[spec.name] = random_rows(generator, spec, largest, sizes)
    return arrays
