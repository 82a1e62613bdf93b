"""From pictures that are given to latents: what is drawn over or edited after, and the mask of what is drawn anew."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from elastic_runtime.contract.manifest import Manifest, Vae
from elastic_runtime.errors import InferenceError, UsageError
from elastic_runtime.sessions.session import Session

Picture = Any  # a PIL picture, or an array (H, W), (H, W, 1) or (H, W, 3): uint8, or floats in [0, 1]
CHANNELS = (1, 3)  # of one picture, as the last side of an array
DRAWN = 0.5  # grey of a mask from which on a pixel is drawn anew, as diffusers has it


def several(name: str, given: Picture | Sequence[Picture], mode: str) -> list[np.ndarray]:
    """Pictures, or one alone, as uint8 (H, W) of mode L or (H, W, 3) of mode RGB, each of a size of its own.

    Raises: UsageError for something else than pictures.
    """
    grey = mode == "L" and isinstance(given, np.ndarray) and given.ndim == 3 and given.shape[2] not in CHANNELS
    more = grey or isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim == 4)
    return [_one(name, each, mode) for each in (given if more else [given])]


def pixels(name: str, given: Picture | Sequence[Picture], mode: str) -> np.ndarray:
    """Pictures as uint8 (B, H, W) of mode L or (B, H, W, 3) of mode RGB, which may be given again; one alone is a batch of one.

    Raises: UsageError for something else than pictures of one size.
    """
    pictures = several(name, given, mode)
    if not pictures or len({each.shape for each in pictures}) > 1:
        sizes = ", ".join(dict.fromkeys(f"{each.shape[1]} x {each.shape[0]}" for each in pictures)) or "none"
        raise UsageError(f"{name} is a picture, or several of one size, got {sizes}")
    return np.stack(pictures)


def _one(name: str, given: Picture, mode: str) -> np.ndarray:
    if isinstance(given, Image.Image):
        return converted(name, given, mode)
    array = np.asarray(given) if isinstance(given, np.ndarray) else np.empty(0, dtype=object)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    floats, shaped = array.dtype.kind == "f", array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not (floats or array.dtype in (np.uint8, np.bool_)) or not shaped or not array.size:
        raise UsageError(
            f"{name} is a PIL picture, or an array (H, W, 3) or (H, W) of uint8 or of floats from 0 to 1, got "
            f"{f'{array.dtype} {array.shape}' if isinstance(given, np.ndarray) else type(given).__name__}"
        )
    if floats and not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise UsageError(f"{name} has floats from 0 to 1, got {array.min():g} to {array.max():g}")
    scaled = (array * 255).round().astype(np.uint8) if floats or array.dtype == np.bool_ else array
    return np.asarray(Image.fromarray(scaled).convert(mode))


def converted(name: str, picture: Image.Image, mode: str) -> np.ndarray:
    """A PIL picture's pixels, uint8; grey of 16 bits keeps its range, which Pillow would cut off at 255.

    Raises: UsageError for whole numbers and floats whose range nothing tells, as which Pillow opens grey PGM of 16 bits, too.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) / 257).round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UsageError(f"{name} has pixels of mode {picture.mode}, of which nothing tells what is white: save it with 8 bits")
    return np.asarray(picture.convert(mode))


def resized(pictures: np.ndarray, height: int, width: int, how: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """Pictures (B, h, w) or (B, h, w, 3) of uint8 in another size; by Lanczos' filter, as diffusers does it."""
    return np.stack([np.asarray(Image.fromarray(each).resize((width, height), how)) for each in pictures])


def encode(encoder: Session, vae: Vae, pictures: np.ndarray) -> np.ndarray:
    """Latents (B, C, h, w) as the denoiser has them of pictures (B, H, W, 3) of uint8, one at a time: encoders take much memory.

    Raises: InferenceError where they are not finite.
    """
    values = (pictures / 255 * 2 - 1).astype(np.float32).transpose(0, 3, 1, 2)
    latents = np.concatenate([encoder.run({"image": np.ascontiguousarray(one[None])})["latent"] for one in values]).astype(np.float64)
    if not np.isfinite(latents).all():
        raise InferenceError(f"the encoder on {encoder.where} gave values that are not finite; try --precision fp32, and verify the bundle")
    return (latents - vae.shift_factor) * vae.scaling_factor


def masked(masks: np.ndarray, vae: Vae) -> np.ndarray:
    """Which latents are drawn anew, bool (B, 1, h, w), of masks (B, H, W) of uint8: the pixel in a latent's corner says it, as in
    diffusers."""
    return (masks[:, None, :: vae.upscale, :: vae.upscale] / 255) >= DRAWN


def obstacle(manifest: Manifest) -> str | None:
    """Why no picture becomes latents with this bundle, and what to do; None where one does."""
    if "encoder" in manifest.graphs and manifest.model.vae:
        return None
    return (
        "this bundle holds no encoder, without which no picture that is given becomes latents: export it again with its VAE's encoder "
        "(--components transformer,vae,encoder, and text where it has text encoders)"
    )
