"""How a matrix is rounded to few bits: to the nearest step, or so that later columns make up for the errors of earlier ones.

What blocks stand for is ONNX Runtime's `MatMulNBits`: `(code - zero) * scale`, a scale and a zero point for so many weights of a row.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

CHUNK = 1 << 22  # weights that are rounded at once
# Columns that make up for each other's errors: what is held of their products is a square of them, and its inverse in float64 besides.
SLAB = 2048
DAMPING = 0.01  # of the mean square of a column, added to each, so that columns that were hardly seen do not explode
Blocks: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def blocks(weights: np.ndarray, bits: int, block: int) -> Blocks:
    """Round `weights` (N, K) to the nearest of 2^bits steps between the least and the largest of each block of a row.

    Returns: (N, K / block, block * bits / 8) packed, low bits first; scales (N * K / block) float32; zero points, packed, by row.
    """
    step = max(1, CHUNK // weights.shape[1])
    parts = [_nearest(weights[first : first + step], bits, block) for first in range(0, len(weights), step)]
    return _joined(parts, bits)


def rows(weights: np.ndarray, most: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Round `weights` (N, K) to int8 of at most `most`, a scale for each row: (N, K) and (N,)."""
    scales = np.abs(weights).max(axis=1).astype(np.float32) / most
    scales[scales == 0] = 1
    return np.rint(weights / scales[:, None]).astype(np.int8), scales


def slabs(columns: int, block: int) -> list[slice]:
    """The columns of a matrix in runs that `compensated` takes together, whole blocks each."""
    width = SLAB // block * block
    return [slice(first, min(columns, first + width)) for first in range(0, columns, width)]


def compensated(weights: np.ndarray, grams: Sequence[np.ndarray], bits: int, block: int) -> Blocks:
    """Round `weights` (N, K) column by column, each error made up for by the columns after it, in the way that `grams` say costs least.

    A row's error is `e @ gram @ e` for the difference `e` of its weights: the square of what its products are off by, over inputs that the
    gram matrix is the sum of `x.T @ x` of. Rows that the nearest steps suit better (few do) take those.

    Args:
        grams: for each of `slabs(K, block)` the inputs' products (k, k) of its columns.

    Returns: as `blocks` does.

    Source: GPTQ (Frantar et al., 2023, arXiv 2210.17323), algorithm 1 with steps for each block of columns, found when it is reached.
    """
    count = -(-weights.shape[1] // block)
    codes = np.empty((len(weights), count, block), np.uint8)
    scales, zeros = np.empty((len(weights), count), np.float32), np.empty((len(weights), count), np.uint8)
    for columns, gram in zip(slabs(weights.shape[1], block), grams, strict=True):
        place = slice(columns.start // block, -(-columns.stop // block))
        exact = weights[:, columns].astype(np.float32)
        fitted, plain = _descended(exact, gram, bits, block), _nearest(exact, bits, block)
        better = _error(exact, fitted, gram) < _error(exact, plain, gram)
        for whole, new, old in zip((codes, scales, zeros), fitted, plain, strict=True):
            whole[:, place] = np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return _joined([(codes, scales, zeros)], bits)


def _descended(weights: np.ndarray, gram: np.ndarray, bits: int, block: int) -> Blocks:
    """The descent itself: codes (N, count, block), scales and zero points (N, count)."""
    upper = _propagation(gram)
    left = np.array(weights.T, order="C")  # (K, N): what is still to be rounded, with the errors so far on top
    errors, parts = np.empty_like(left), []

    def descend(first: int, last: int) -> None:
        if last - first > block:  # halves, so that what comes after is passed over a few times and not once a block
            middle = first + -(-(last - first) // block // 2) * block
            descend(first, middle)
            left[middle:last] -= upper[first:middle, middle:last].T @ errors[first:middle]
            descend(middle, last)
            return
        padded = np.zeros((len(weights), 1, block), np.float32)
        padded[:, 0, : last - first] = left[first:last].T
        scales, zeros = _grid(padded, bits)
        scale, zero = scales[:, 0], zeros[:, 0]
        codes = np.repeat(zeros[:, :, None], block, axis=2)  # what is beyond the last column stands for 0
        for column in range(first, last):
            code = np.clip(np.rint(left[column] / scale) + zero, 0, 2**bits - 1)
            codes[:, 0, column - first] = code
            errors[column] = (left[column] - (code - zero) * scale) / upper[column, column]
            left[column + 1 : last] -= upper[column, column + 1 : last, None] * errors[column]
        parts.append((codes.astype(np.uint8), scales, zeros.astype(np.uint8)))

    descend(0, len(left))
    codes, scales, zeros = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return codes, scales, zeros


def _propagation(gram: np.ndarray) -> np.ndarray:
    """How an error of a column goes on to those after it: the upper Cholesky factor of the damped gram matrix's inverse.

    With the columns in reverse, the gram matrix's own factor is upper, too, and the one that is wanted is its inverse.
    """
    damped = torch.from_numpy(gram).double()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1)
    reverse = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    upper: np.ndarray = torch.linalg.solve_triangular(reverse, torch.eye(len(gram), dtype=torch.float64), upper=True).float().numpy()
    return upper


def _error(weights: np.ndarray, rounded: Blocks, gram: np.ndarray) -> np.ndarray:
    """Of each row (N,): the square of what its products are off by, in units of its largest weight, so that none is too small to square."""
    codes, scales, zeros = rounded
    wide = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    largest = np.abs(weights).max(axis=1, keepdims=True)
    off = (wide.reshape(len(weights), -1)[:, : weights.shape[1]] - weights) / np.where(largest > 0, largest, 1)
    error: np.ndarray = ((off @ gram) * off).sum(axis=1)
    return error


def _nearest(weights: np.ndarray, bits: int, block: int) -> Blocks:
    """Codes (N, count, block), scales and zero points (N, count)."""
    count = -(-weights.shape[1] // block)
    padded = np.pad(weights.astype(np.float32), ((0, 0), (0, count * block - weights.shape[1]))).reshape(len(weights), count, block)
    scales, zeros = _grid(padded, bits)
    codes = np.clip(np.rint(padded / scales[..., None]) + zeros[..., None], 0, 2**bits - 1)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _grid(padded: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (N, count), in floats, of blocks (N, count, block), 0 among what they stand for."""
    most = 2**bits - 1
    least, largest = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    scales = (largest - least) / most
    scales[scales == 0] = 1
    return scales.astype(np.float32), np.clip(np.rint(-least / scales), 0, most)


def _joined(parts: Sequence[Blocks], bits: int) -> Blocks:
    """Rows after rows, as `MatMulNBits` takes them."""
    codes, scales, zeros = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _packed(codes, bits), scales.reshape(-1), _packed(zeros, bits).reshape(-1)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., ::2] | (codes[..., 1::2] << 4)
