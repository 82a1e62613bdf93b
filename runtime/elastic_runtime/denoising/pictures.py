"""From final latents to pictures: the decoder, and the form that was asked for."""

from typing import Any, Literal

import numpy as np
from PIL import Image

from elastic_runtime.contract.manifest import Vae
from elastic_runtime.errors import InferenceError
from elastic_runtime.sessions.session import Session

OutputType = Literal["pil", "np", "latent"]


def decode(decoder: Session, vae: Vae, latents: np.ndarray) -> np.ndarray:
    """Pictures (B, 3, H, W) with values in about [-1, 1] of latents (B, C, h, w), one at a time: decoders take much memory.

    Raises: InferenceError where a picture is not finite, as half precision can make it.
    """
    scaled = (latents / vae.scaling_factor + vae.shift_factor).astype(np.float32)
    decoded = np.concatenate([decoder.run({"latent": one[None]})["image"] for one in scaled])
    if not np.isfinite(decoded).all():
        raise InferenceError(f"the decoder on {decoder.where} gave values that are not finite; try --dtype fp32, and verify the bundle")
    return decoded


def pictures(decoded: np.ndarray, output_type: OutputType) -> Any:
    """PIL pictures, or float32 (B, H, W, C) in [0, 1] for `np`, of values in [-1, 1], (B, C, H, W)."""
    pixels = np.clip(decoded.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1).astype(np.float32)  # (B, H, W, C)
    if output_type == "np":
        return pixels
    quantized = (pixels * 255).round().astype(np.uint8)
    return [Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture) for picture in quantized]
