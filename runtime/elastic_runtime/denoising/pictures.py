"""From final latents to pictures: the decoder, and the form that was asked for."""

from typing import Any, Literal

import numpy as np
from PIL import Image

from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.manifest import Manifest, Vae
from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.errors import InferenceError
from elastic_runtime.sessions.session import Session

OutputType = Literal["pil", "np", "latent"]


def drawable(manifest: Manifest) -> bool:
    """Whether the model's final state can become a picture in this bundle."""
    model = manifest.model
    return model.pixels or model.tokens == "grey" or (model.vae is not None and "decoder" in manifest.graphs)


def obstacle(manifest: Manifest) -> str | None:
    """Why final latents cannot become a picture, and what to do; None where they can."""
    model = manifest.model
    if drawable(manifest):
        return None
    if model.tokens:
        return "this bundle's model draws token codes, and their decoder is not part of it: ask for output_type='latent'"
    if model.patches:
        return (
            "this bundle holds no decoder, without which there is no picture and no preview whose edges a plan could follow: "
            "export it again with its VAE (--components transformer,vae), or take latents in Python: plan='full', output_type='latent'"
        )
    return (
        f"this bundle's model draws {model.sample_shape[0]}-channel latents and it holds no decoder: "
        "export it again with --vae DIR, or ask for output_type='latent'"
    )


def sides(manifest: Manifest, half: Literal["decoder", "encoder"] = "decoder") -> tuple[Span, Span] | None:
    """Heights and widths of the latents that the decoder takes, or the encoder gives; None where the bundle holds none."""
    if half not in manifest.graphs:
        return None
    graph = manifest.graphs[half]
    latent = next(spec for spec in (*graph.inputs, *graph.outputs) if spec.name == "latent")
    height, width = (graph.dimensions[side] if isinstance(side, str) else Span(int(side), int(side)) for side in latent.shape[2:])
    return height, width


def nearest(manifest: Manifest) -> tuple[int, int]:
    """Height and width of the latents nearest to the model's own that the bundle makes pictures of."""
    height, width = manifest.model.sample_shape[1:]
    if takes := sides(manifest):
        height, width = (min(max(side, span.min), span.max) for side, span in zip((height, width), takes, strict=True))
    return height, width


def previewed(manifest: Manifest) -> tuple[int, int] | None:
    """Height and width of the latents of a preview; None where no plan of this bundle has one."""
    patches, takes = manifest.model.patches, sides(manifest)
    height, width = (side // 2 for side in nearest(manifest))
    if patches is None or height % patches.size or width % patches.size:
        return None
    if takes and (height not in takes[0] or width not in takes[1]):
        return None
    return height, width


def values(manifest: Manifest, decoder: Session | None, latents: np.ndarray) -> np.ndarray:
    """Final latents (B, C, h, w) as values in about [-1, 1], (B, C, H, W): through the decoder, or as they are."""
    model, schedule = manifest.model, manifest.model.schedule
    if decoder and model.vae:
        return decode(decoder, model.vae, latents)
    if isinstance(schedule, CosineMask):
        white = schedule.vocabulary - 1
        return np.where(latents > white, 0.0, latents / white * 2 - 1)  # what is still masked is grey
    return latents


def preview(manifest: Manifest, decoder: Session | None, seen: np.ndarray, height: int, width: int) -> list[Image.Image]:
    """Latents (B, C, h, w) that a model saw in a step as PIL pictures of `height` x `width` px.

    Those of half the sides, as the first stage of a plan has them, are decoded as they are, and their pictures enlarged; where the decoder
    takes no latents so small, each latent becomes several first.
    """
    upscale, takes = manifest.model.vae.upscale if manifest.model.vae else 1, sides(manifest)
    if takes and any(side not in span for side, span in zip(seen.shape[2:], takes, strict=True)):
        seen = seen.repeat(height // upscale // seen.shape[2], axis=2).repeat(width // upscale // seen.shape[3], axis=3)
    made = pictures(values(manifest, decoder, seen), "pil")
    return [each if each.size == (width, height) else each.resize((width, height), Image.Resampling.BICUBIC) for each in made]


def decode(decoder: Session, vae: Vae, latents: np.ndarray) -> np.ndarray:
    """Pictures (B, 3, H, W) with values in about [-1, 1] of latents (B, C, h, w), one at a time: decoders take much
    memory.

    Raises: InferenceError where a picture is not finite, as half precision can make it.
    """
    scaled = (latents / vae.scaling_factor + vae.shift_factor).astype(np.float32)
    decoded = np.concatenate([decoder.run({"latent": one[None]})["image"] for one in scaled])
    if not np.isfinite(decoded).all():
        raise InferenceError(f"the decoder on {decoder.where} gave values that are not finite; try --precision fp32, and verify the bundle")
    return decoded


def pictures(decoded: np.ndarray, output_type: OutputType) -> Any:
    """PIL pictures, or float32 (B, H, W, C) in [0, 1] for `np`, of values in [-1, 1], (B, C, H, W)."""
    pixels = np.clip(decoded.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1).astype(np.float32)  # (B, H, W, C)
    if output_type == "np":
        return pixels
    quantized = (pixels * 255).round().astype(np.uint8)
    return [Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture) for picture in quantized]
