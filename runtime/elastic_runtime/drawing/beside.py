"""Reference pictures that others are edited after (FLUX.2): latents, or pictures that the bundle's encoder makes latents of."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from elastic_runtime.contract.manifest import Manifest, Model
from elastic_runtime.denoising.pictures import sides
from elastic_runtime.denoising.references import References
from elastic_runtime.denoising.sources import encode, obstacle, resized, several
from elastic_runtime.drawing.drawing import Opener
from elastic_runtime.errors import UsageError
from elastic_runtime.request import Request

# Of a reference picture, as diffusers' FLUX.2 pipelines have it: the pixels above which it is made smaller, the least side, and how many
# times as long as the other a side may be.
MOST_PIXELS, LEAST_SIDE, MOST_ASPECT = 1024 * 1024, 64, 8


@dataclass(frozen=True)
class Beside:
    """References as they were given, latents, or pictures uint8 (H, W, 3), each of a size of its own that divides into tokens."""

    model: Model
    latents: References | None = None
    pictures: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, request: Request) -> "Beside | None":
        """What a request edits after, if anything.

        Raises: UsageError for a model that takes none, for both of the ways, for latents or pictures that are none, and for pictures where
            the bundle has no encoder or one of other sizes.
        """
        given, model = [name for name in ("image_latents", "image_reference") if getattr(request, name) is not None], manifest.model
        if not given:
            return None
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are two ways to give reference pictures: give one of them")
        if not edits(model):
            raise UsageError(f"{model.name} draws beside no reference pictures: leave {given[0]} out")
        if given == ["image_latents"]:
            return cls(model, References.of(request.image_latents, model))
        if why := obstacle(manifest):
            raise UsageError(f"{why}; or give the references as image_latents")
        assert model.vae is not None
        pictures = tuple(fitted(each, _unit(model)) for each in several("a reference picture", request.image_reference, "RGB"))
        if not pictures:
            raise UsageError("image_reference is a picture or several, got none")
        for each in pictures:
            _check_encoder(manifest, each, model.vae.upscale)
        return cls(model, None, pictures)

    def __len__(self) -> int:
        """Tokens of all."""
        if self.latents:
            return len(self.latents)
        unit = _unit(self.model)
        return sum((each.shape[0] // unit) * (each.shape[1] // unit) for each in self.pictures)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the first picture, which what is drawn has unless others are asked for; None of latents."""
        return self.pictures[0].shape[:2] if self.pictures else None

    def references(self, open_graph: Opener) -> References:
        """Their tokens and places; an encoder is closed again."""
        if self.latents:
            return self.latents
        assert self.model.vae is not None
        with open_graph("encoder") as encoder:
            latents = [encode(encoder, self.model.vae, each[None])[0] for each in self.pictures]
        return References.of(latents, self.model)


def edits(model: Model, *beside: Any) -> bool:
    """Whether the `image` of a call are reference pictures: so it is in the pipelines of a model that edits after them, unless something
    `beside` it is given, not None, which says that it is drawn over, as in its inpainting pipeline."""
    return model.patches is not None and model.patches.references and all(value is None for value in beside)


def fitted(picture: np.ndarray, unit: int) -> np.ndarray:
    """A reference picture, uint8 (H, W, 3), of at most `MOST_PIXELS`, by Lanczos' filter, and of its middle as much as divides into tokens
    of `unit` pixels a side.

    Raises: UsageError for one that is smaller, or longer, than diffusers' pipelines take.
    """
    height, width = picture.shape[:2]
    if min(height, width) < max(LEAST_SIDE, unit) or max(height, width) > MOST_ASPECT * min(height, width):
        raise UsageError(
            f"a reference picture has sides of {max(LEAST_SIDE, unit)} px or more, one at most {MOST_ASPECT} times as long as the other, "
            f"got {width} x {height} px"
        )
    if height * width > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (height * width))
        height, width = int(height * scale), int(width * scale)
        picture = resized(picture[None], height, width, Image.Resampling.LANCZOS)[0]
    high, wide = height // unit * unit, width // unit * unit
    top, left = (height - high) // 2, (width - wide) // 2
    return picture[top : top + high, left : left + wide]


def _unit(model: Model) -> int:
    """Pixels of a token's side."""
    assert model.patches is not None
    assert model.vae is not None
    return model.patches.size * model.vae.upscale


def _check_encoder(manifest: Manifest, picture: np.ndarray, upscale: int) -> None:
    """Raise UsageError unless the encoder takes a picture of this size."""
    for name, side, span in zip(("height", "width"), picture.shape, sides(manifest, "encoder") or (), strict=False):
        if side // upscale not in span:
            raise UsageError(
                f"this bundle encodes {name}s of {span.min * upscale} to {span.max * upscale} px, and a reference picture, made to fit, "
                f"has {side}: give it in another size, or export the bundle for that size with --size"
            )
