"""Latents of twice the height and width between two stages of a plan, in their spectrum (SPEED, arXiv 2605.18736)."""

import functools

import numpy as np

from elastic_runtime.ralu.plan import scale
from elastic_runtime.sampling.flow import Draw


def spectral(latents: np.ndarray, sigma: float, draw: Draw) -> np.ndarray:
    """Latents (B, C, 2h, 2w) at sigma `scale(sigma) * sigma` from latents (B, C, h, w) at `sigma`.

    Their low frequencies are those that there are, and the others are noise as there is at `sigma`. In an orthonormal transform of four
    times as many values the noise of each is what it was, and the picture half of what it should be: hence `scale`.
    """
    batch, channels, height, width = latents.shape
    spectrum = sigma * draw((batch, channels, 2 * height, 2 * width))
    spectrum[..., :height, :width] = cosines(height) @ latents @ cosines(width).T
    return scale(sigma) * (cosines(2 * height).T @ spectrum @ cosines(2 * width))


@functools.lru_cache(maxsize=16)
def cosines(size: int) -> np.ndarray:
    """The orthonormal discrete cosine transform (type II) of `size` values as a matrix, a frequency a row. scipy has a faster one, and is
    no part of a runtime that only draws: two products of a latent's sides are nothing beside a step."""
    place = np.arange(size)
    matrix: np.ndarray = np.cos(np.pi * place[:, None] * (2 * place + 1) / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    matrix.setflags(write=False)
    return matrix
