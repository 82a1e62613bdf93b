"""The decoder graph of a diffusers `AutoencoderKL` folder."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from elastic_export.families.family import random_rows
from elastic_export.foreign.component import Component, diffusers_class
from elastic_export.foreign.weights import Naming
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Vae
from elastic_runtime.contract.schedule import is_number
from elastic_runtime.errors import ModelError
from elastic_targets.capture import GraphCapture

# Attention's projections by the names of older files.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(.*\.attentions\.\d+\.)({'|'.join(_OLDER)})(\.\w+)")


class Decoder(nn.Module):
    """`latent (B, C, h, w) -> image (B, 3, 8h, 8w)` in [-1, 1]; the latent is already scaled and shifted."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.autoencoder.decode(latent.to(self.autoencoder.dtype), return_dict=False)[0]
        return image.float()


def read_vae(folder: Path, channels: int) -> Vae:
    """The facts of a diffusers VAE folder that decodes latents of so many channels.

    Raises: ModelError for a folder that is not an AutoencoderKL, has other channels, or has facts that are no numbers.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: give the folder of a diffusers AutoencoderKL")
    config = Component(folder).config
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ModelError(f"{folder} is not a diffusers AutoencoderKL: it is a {kind}")
    if (has := config.get("latent_channels", 4)) != channels:
        raise ModelError(f"the VAE {folder} decodes {has} channels, but the model draws {channels}: it is another model's")
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    shift = 0.0 if shift is None else shift  # which is written where a model has none
    widths = config.get("block_out_channels", (64,))
    if not is_number(scale) or not is_number(shift) or not scale > 0:
        raise ModelError(f"{folder / 'config.json'}: scaling_factor is a number above 0 and shift_factor one, got {scale} and {shift}")
    if not isinstance(widths, list | tuple) or not widths:
        raise ModelError(f"{folder / 'config.json'}: block_out_channels is a list of widths, got {widths!r}")
    try:
        return Vae(scaling_factor=float(scale), shift_factor=float(shift), upscale=2 ** (len(widths) - 1))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def load_vae(folder: Path) -> Decoder:
    """The half of an AutoencoderKL that decodes, in float32; the other half's weights may be there or not.

    Raises: MissingError without diffusers; ModelError for a folder that is not an AutoencoderKL, or weights that do not fit.
    """
    return Decoder(Component(folder).fill(_built(folder), _NAMING))


def _built(folder: Path) -> Any:
    vae: Any = Component(folder).build(diffusers_class("AutoencoderKL"))
    vae.encoder = vae.quant_conv = None
    return vae


def _renamed(name: str) -> str:
    old = _OLD.fullmatch(name)
    return f"{old[1]}{_OLDER[old[2]]}{old[3]}" if old else name


_NAMING = Naming(_renamed, extra=re.compile(r"encoder\.|quant_conv\."))


def decoder(folder: Path, facts: Vae, channels: int, height: Span, width: Span, batch: Span) -> GraphCapture:
    """Capture the decoder of a diffusers VAE folder for latents of these sides; a span of more than one size stays open.

    Raises: what `load_vae` does.
    """
    spans = {name: span for name, span in (("h", height), ("w", width)) if span.min < span.max}
    sides = ["h" if "h" in spans else height.max, "w" if "w" in spans else width.max]
    latent = TensorSpec(name="latent", dtype="float32", shape=("B", channels, *sides))
    image = [side if facts.upscale == 1 else f"{facts.upscale}*{side}" if isinstance(side, str) else side * facts.upscale for side in sides]

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        largest = {"B": size} | {name: span.max for name, span in spans.items()}
        chosen = largest | {name: value for name, value in budget.items() if name in spans}
        return {"latent": random_rows(np.random.default_rng(0), latent, largest, chosen)}

    # A preview, which has half the sides, and a picture.
    sizes = ((height.max // 2, width.max // 2), (height.max, width.max))
    stages = [Budget(**{name: value for name, value in zip("hw", size, strict=True) if name in spans}) for size in sizes]
    return GraphCapture(
        name="decoder",
        module=load_vae(folder),
        inputs=(latent,),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("B", 3, *image)),),
        axes=(),
        batch=batch,
        feeds=feeds,
        open_dimensions=spans,
        stages=tuple(dict.fromkeys(stages)) if spans else (),
    )
