"""Noise that makes grown patches white again (RALU, arXiv 2507.08422, section 3.3).

When a token becomes four, its noise is repeated too. Added noise of covariance `I + gamma 11^T` in each block of four siblings,
`gamma` a little above -1/Z^2, takes that correlation out.
"""

import math

import numpy as np

# As in the authors' code: it keeps the covariance positive definite at Z = 2.
SLACK = 1e-6


def siblings(white: np.ndarray, z: float) -> np.ndarray:
    """Correlated noise from white noise (..., 4, C), whose fourth to last but one axis are siblings.

    `I + (sqrt(1 + 4 gamma) - 1) 11^T / 4` is the symmetric root of the covariance, so nothing is factored or sampled densely.
    """
    gamma = -1 / z**2 + SLACK
    return white + (math.sqrt(1 + 4 * gamma) - 1) * white.mean(axis=-2, keepdims=True)


def renoising(white: np.ndarray, grew: slice, z: float) -> np.ndarray:
    """Noise of one transition from white noise (B, S, C): correlated in blocks of four where tokens `grew`, white elsewhere."""
    noise, (batch, _, channels) = white.copy(), white.shape
    noise[:, grew] = siblings(white[:, grew].reshape(batch, -1, 4, channels), z).reshape(batch, -1, channels)
    return noise
