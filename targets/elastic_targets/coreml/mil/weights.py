"""Compressed weights, as numbers: what `constexpr_*` operations hold.

These get their inputs as numpy arrays, because a table's indices are read as bits of their own width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def constexpr_affine_dequantize(quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """`scale * (data - zero_point)`, both along `axis` (iOS 16)."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero, size = (value.reshape(shape) if value.ndim else value for value in (np.asarray(zero_point), np.asarray(scale)))
    return size.astype(np.float32) * (quantized_data.astype(np.float32) - zero.astype(np.float32))


def constexpr_blockwise_shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """`scale * (data - offset)`, both given for equal blocks along each axis (iOS 18)."""
    shifted = data.astype(np.float32) - (0.0 if offset is None else _blocks(offset, data.shape).astype(np.float32))
    return _blocks(scale, data.shape).astype(np.float32) * shifted


def constexpr_lut_to_dense(
    indices: np.ndarray, lut: np.ndarray, shape: np.ndarray | None = None, vector_axis: np.ndarray | None = None
) -> np.ndarray:
    """Look each index up: packed bits and one table (iOS 16), or whole indices and a table for each block (iOS 18)."""
    if shape is not None:
        bits = int(np.log2(lut.size))
        packed = np.unpackbits(indices, bitorder="little")[: int(np.prod(shape)) * bits].reshape(-1, bits)
        return lut[packed @ (1 << np.arange(bits))].reshape(shape)
    if lut.shape[-1] != 1:
        raise NotImplementedError(f"palettes of vectors of {lut.shape[-1]}")
    tables = _blocks(lut[..., 0], indices.shape)  # (*indices, palette)
    return np.take_along_axis(tables, indices.astype(np.int64)[..., None], axis=-1)[..., 0]


def constexpr_cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    return source_val


def _blocks(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`values`, given for equal blocks of an array of `shape`, repeated to that shape (further axes stay)."""
    for axis, size in enumerate(shape):
        if values.shape[axis] not in (1, size):
            values = values.repeat(size // values.shape[axis], axis)
    return np.broadcast_to(values, (*shape, *values.shape[len(shape) :]))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
}
