"""Reference pictures of editing: their tokens stand beside the picture's own in every run, and nothing is predicted for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_runtime.contract.manifest import Model
from elastic_runtime.errors import UsageError

APART = 10  # places along the first axis between one reference and the next (FLUX.2)


@dataclass(frozen=True)
class References:
    """`tokens` (R, C) at places `ids` (R, columns), float32."""

    tokens: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, image_latents: Any, model: Model) -> "References":
        """Those of latents (C, h, w), one or several of sizes of their own, scaled as the model draws them.

        Raises: UsageError for what are no such latents.
        """
        assert model.patches is not None  # a model without draws beside none
        several = [image_latents] if isinstance(image_latents, np.ndarray) else image_latents
        if not isinstance(several, Sequence) or not several:
            raise UsageError(f"image_latents are one array or several, got {image_latents!r}")
        channels, tokens, ids = model.sample_shape[0], [], []
        for number, latent in enumerate(several):
            array = _latent(latent, channels)
            rows, columns = array.shape[1:]
            tokens.append(array.reshape(channels, -1).T)
            places = np.zeros((rows * columns, model.patches.columns), np.float32)
            places[:, 0] = APART * (1 + number)
            places[:, 1], places[:, 2] = np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)
            ids.append(places)
        return cls(np.concatenate(tokens), np.concatenate(ids))

    def __len__(self) -> int:
        return len(self.tokens)


def _latent(latent: Any, channels: int) -> np.ndarray:
    try:
        array = np.asarray(latent, dtype=np.float32)
    except (TypeError, ValueError):  # ragged, or no numbers
        raise UsageError(f"image_latents are arrays of numbers, got {type(latent).__name__}") from None
    if array.ndim != 3 or array.shape[0] != channels or not array.size:
        raise UsageError(f"image_latents are of shape ({channels}, h, w), one for each reference picture, got {array.shape}")
    if not np.isfinite(array).all():
        raise UsageError("image_latents are finite numbers, and these are not")
    return array
