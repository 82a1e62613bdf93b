"""The decoder graph of a diffusers `AutoencoderKL` folder."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from elastic_export.families.family import random_rows
from elastic_export.foreign.folder import diffusers_class, read_json
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Vae
from elastic_runtime.errors import ModelError
from elastic_targets.capture import GraphCapture


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

    Raises: ModelError for a folder that is not an AutoencoderKL or has other channels.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: give the folder of a diffusers AutoencoderKL")
    config = read_json(folder / "config.json")
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ModelError(f"{folder} is not a diffusers AutoencoderKL: it is a {kind}")
    if (has := config.get("latent_channels", 4)) != channels:
        raise ModelError(f"the VAE {folder} decodes {has} channels, but the model draws {channels}: it is another model's")
    return Vae(
        scaling_factor=float(config.get("scaling_factor", 0.18215)),
        shift_factor=float(config.get("shift_factor") or 0.0),
        upscale=2 ** (len(config.get("block_out_channels", (64,))) - 1),
    )


def load_vae(folder: Path) -> Decoder:
    """Raises: MissingError without diffusers; ModelError for a folder that is not an AutoencoderKL."""
    autoencoder: Any = diffusers_class("AutoencoderKL")
    try:
        # Its other way of loading needs one more package, and says so; a VAE is small.
        vae = autoencoder.from_pretrained(folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} is not a diffusers AutoencoderKL: {' '.join(str(error).split())[:300]}") from None
    return Decoder(vae.float().eval().requires_grad_(False))


def decoder(folder: Path, facts: Vae, channels: int, height: Span, width: Span, batch: Span) -> GraphCapture:
    """Capture the decoder of a diffusers VAE folder for latents of these sides; a span of more than one size stays open.

    It is loaded when it is asked for. Raises: MissingError without diffusers.
    """
    diffusers_class("AutoencoderKL")  # its absence should not wait for the other graphs
    spans = {name: span for name, span in (("h", height), ("w", width)) if span.min < span.max}
    sides = ["h" if "h" in spans else height.max, "w" if "w" in spans else width.max]
    latent = TensorSpec(name="latent", dtype="float32", shape=("B", channels, *sides))
    image = [f"{facts.upscale}*{side}" if isinstance(side, str) else side * facts.upscale for side in sides]

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        largest = {"B": size} | {name: span.max for name, span in spans.items()}
        chosen = largest | {name: value for name, value in budget.items() if name in spans}
        return {"latent": random_rows(np.random.default_rng(0), latent, largest, chosen)}

    # A preview, which has half the sides, and a picture.
    sizes = ((height.max // 2, width.max // 2), (height.max, width.max))
    stages = [Budget(**{name: value for name, value in zip("hw", size, strict=True) if name in spans}) for size in sizes]
    return GraphCapture(
        name="decoder",
        module=None,
        load=lambda: load_vae(folder),
        inputs=(latent,),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("B", 3, *image)),),
        axes=(),
        batch=batch,
        feeds=feeds,
        open_dimensions=spans,
        stages=tuple(dict.fromkeys(stages)) if spans else (),
    )
