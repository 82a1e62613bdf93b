"""Canny's edge detector in numpy, pixel for pixel what OpenCV's `Canny(image, low, high)` gives.

It keeps a library of 150 MB off the device. Sobel 3x3 with replicated borders, L1 norm, non-maximum suppression in four sectors
with OpenCV's fixed-point tangent and its rules for ties, hysteresis over 8 neighbours (Canny 1986).
"""

import numpy as np

from elastic_runtime.errors import UsageError

# tan(22.5 degrees) in units of 2^-15; tan(67.5 degrees) is 2 more.
BITS = 15
TANGENT = 13573


def canny(image: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Edge pixels of a grey picture: uint8 (H, W) -> bool (H, W).

    Raises: UsageError for another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 2 or not image.size:
        raise UsageError(f"canny takes uint8 (H, W), got {image.dtype} {image.shape}")
    dx, dy = _sobel(image)
    strength = np.pad(np.abs(dx) + np.abs(dy), 1)  # beyond the border nothing is stronger: (H + 2, W + 2)
    # Few pixels pass the lower threshold, so the rest works on their flat indices in the padded picture.
    width = strength.shape[1]
    flat = strength.ravel()
    there = np.flatnonzero(flat > low)
    inner = (there // width - 1) * image.shape[1] + there % width - 1
    peak = there[_is_peak(flat, there, width, dx.ravel()[inner], dy.ravel()[inner])]
    return _grow(peak, flat[peak] > high, strength.shape)[1:-1, 1:-1]


def _sobel(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal and vertical derivatives, int16 (H, W): at most 1020 either way."""
    x = np.pad(image, 1, mode="edge").astype(np.int16)
    down, across = x[:-2] + 2 * x[1:-1] + x[2:], x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return down[:, 2:] - down[:, :-2], across[2:] - across[:-2]


def _is_peak(strength: np.ndarray, there: np.ndarray, width: int, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether each pixel is the strongest along its gradient, of two equal ones the later (but on diagonals neither)."""
    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << BITS
    flat, steep = y < x * TANGENT, y > x * (TANGENT + (2 << BITS))
    slope = np.where((dx ^ dy) < 0, -1, 1)
    before = np.where(flat, 1, np.where(steep, width, width + slope))
    here, early, late = strength[there], strength[there - before], strength[there + before]
    return (here > early) & np.where(flat | steep, here >= late, here > late)


def _grow(peak: np.ndarray, strong: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Strong peaks and what is connected to them over peaks, bool of the padded shape."""
    edge, open_ = np.zeros(shape, bool), np.zeros(shape, bool)
    neighbours = np.array([-shape[1] - 1, -shape[1], -shape[1] + 1, -1, 1, shape[1] - 1, shape[1], shape[1] + 1])
    edges, weak = edge.ravel(), open_.ravel()  # views
    front = peak[strong]
    edges[front] = True
    weak[peak[~strong]] = True
    while front.size:
        around = (front[:, None] + neighbours).ravel()
        front = np.unique(around[weak[around]])
        edges[front], weak[front] = True, False
    return edge
