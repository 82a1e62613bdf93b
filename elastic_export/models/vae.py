"""The decoder graph of a diffusers `AutoencoderKL` folder."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from elastic_runtime.axis import Span
from elastic_runtime.budget import Budget
from elastic_runtime.errors import MissingError, ModelError
from elastic_runtime.manifest import TensorSpec, Vae
from elastic_targets.capture import GraphCapture


class Decoder(nn.Module):
    """`latent (B, C, h, w) -> image (B, 3, 8h, 8w)` in [-1, 1]; the latent is already scaled and shifted."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.autoencoder.decode(latent.to(self.autoencoder.dtype), return_dict=False)[0]
        return image.float()


def load_decoder(folder: Path, shape: tuple[int, int, int], batch: Span) -> tuple[GraphCapture, Vae]:
    """Capture the decoder of a diffusers VAE folder for latents of `shape` (C, h, w).

    Raises: MissingError without diffusers; ModelError for a folder that is not an AutoencoderKL or has other channels.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise MissingError(f"--vae needs diffusers ({error}): pip install 'elastic-export[flux]'") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"--vae {folder} holds no config.json: give the folder of a diffusers AutoencoderKL")
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"--vae {folder} is not a diffusers AutoencoderKL: {str(error).splitlines()[0]}") from None
    channels, height, width = shape
    if vae.config.latent_channels != channels:
        raise ModelError(f"--vae {folder} decodes {vae.config.latent_channels} channels, but the model draws {channels}")
    facts = Vae(
        scaling_factor=float(vae.config.scaling_factor),
        shift_factor=float(vae.config.shift_factor or 0.0),
        upscale=2 ** (len(vae.config.block_out_channels) - 1),
    )

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        return {"latent": np.random.default_rng(0).standard_normal((size, channels, height, width)).astype(np.float32)}

    graph = GraphCapture(
        name="decoder",
        module=Decoder(vae),
        inputs=(TensorSpec(name="latent", dtype="float32", shape=("B", channels, height, width)),),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("B", 3, height * facts.upscale, width * facts.upscale)),),
        axes=(),
        batch=batch,
        feeds=feeds,
    )
    return graph, facts
