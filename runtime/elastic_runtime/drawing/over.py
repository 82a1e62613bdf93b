"""A picture that is drawn over, whole (image-to-image) or where a mask says (inpainting)."""

from dataclasses import dataclass

import numpy as np

from elastic_runtime.contract.manifest import Manifest, Vae
from elastic_runtime.denoising.sources import encode, masked, obstacle, pixels, resized
from elastic_runtime.drawing.drawing import Opener
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.patches import pack
from elastic_runtime.request import Request
from elastic_runtime.sampling.stages import Keep

STRENGTH = 0.6  # where nothing is asked for, as in diffusers' pipelines


@dataclass(frozen=True)
class Over:
    """Pictures uint8 (B, H, W, 3), masks uint8 (B, H, W) of what of them is drawn anew, and how much of that."""

    vae: Vae
    pictures: np.ndarray
    masks: np.ndarray | None
    strength: float

    @classmethod
    def of(cls, manifest: Manifest, request: Request) -> "Over | None":
        """What a request draws over, if anything.

        Raises: UsageError for a mask or strength without a picture, a mask of another size, and a bundle without an encoder.
        """
        if request.image is None:
            if beside := [name for name in ("strength", "mask_image") if getattr(request, name) is not None]:
                raise UsageError(f"{beside[0]} is of a picture that is drawn over: give image")
            return None
        if why := obstacle(manifest):
            raise UsageError(why)
        assert manifest.model.vae is not None
        pictures = pixels("image", request.image, "RGB")
        masks = None if request.mask_image is None else pixels("mask_image", request.mask_image, "L")
        if masks is not None and masks.shape[1:] != pictures.shape[1:3]:
            (height, width), (high, wide) = masks.shape[1:], pictures.shape[1:3]
            raise UsageError(f"mask_image has the size of image, {wide} x {high} px, got {width} x {height}: resize one of them")
        return cls(manifest.model.vae, pictures, masks, STRENGTH if request.strength is None else request.strength)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.pictures.shape[1:3]
        return height, width

    def check(self, count: int) -> None:
        """Raise UsageError unless there is a picture, and a mask, for all `count` drawings, or one for each."""
        for name, given in (("image", self.pictures), ("mask_image", self.masks)):
            if given is not None and count % len(given):
                raise UsageError(f"{name} is one for all {count} pictures, or one for each, got {len(given)}")

    def latents(self, open_graph: Opener, size: tuple[int, int], count: int) -> np.ndarray:
        """The pictures as latents (count, C, h, w), made of `size` first; the encoder is closed again."""
        pictures = self.pictures if self.size == size else resized(self.pictures, *size)
        with open_graph("encoder") as encoder:
            latents = encode(encoder, self.vae, pictures)
        return np.repeat(latents, count // len(latents), axis=0)

    def keep(self, latents: np.ndarray, noise: np.ndarray, patch: int) -> Keep | None:
        """What puts back, after each step, what the mask does not say is drawn anew: the picture with the noise of that sigma; without a
        mask there is nothing to."""
        if self.masks is None:
            return None
        size = latents.shape[2] * self.vae.upscale, latents.shape[3] * self.vae.upscale
        masks = self.masks if self.size == size else resized(self.masks, *size)
        anew = np.repeat(masked(masks, self.vae), len(latents) // len(masks), axis=0)
        drawn = pack(np.broadcast_to(anew, latents.shape), patch)
        picture, grain = pack(latents, patch), pack(noise, patch)
        return lambda x, sigma: np.where(drawn, x, sigma * grain + (1 - sigma) * picture)
