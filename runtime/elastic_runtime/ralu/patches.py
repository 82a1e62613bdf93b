"""Image tokens with positions: packing of latents, which patches have edges, and how a patch becomes four.

A token is a patch of `size` x `size` latents in channel order (c, row, column); tokens of a whole picture are in raster order.
B batch, C latent channels, h x w latents, S tokens.
"""

import numpy as np

from elastic_runtime.ralu.canny import canny

# Of a patch grown into four, relative to its own position, in its own units.
CHILDREN = np.array([(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)])
LUMA = np.array([0.299, 0.587, 0.114])


def pack(latents: np.ndarray, size: int) -> np.ndarray:
    """Tokens (B, S, C * size^2) of latents (B, C, h, w)."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // size, size, width // size, size)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size**2)


def unpack(tokens: np.ndarray, rows: int, columns: int, size: int) -> np.ndarray:
    """Latents (B, C, h, w) of `rows` x `columns` tokens in raster order: the inverse of `pack`."""
    batch, _, width = tokens.shape
    split = tokens.reshape(batch, rows, columns, width // size**2, size, size)
    return split.transpose(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * size, columns * size)


def raster(batch: int, rows: int, columns: int) -> np.ndarray:
    """Positions (B, S, 2) of a whole picture's tokens, (row, column)."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2)
    return np.broadcast_to(grid.astype(np.float64), (batch, rows * columns, 2))


def edge_scores(pictures: np.ndarray, cell: int) -> np.ndarray:
    """Edge pixels in each `cell` x `cell` square: pictures (B, 3, H, W) -> int (B, cells) in raster order.

    The luma of the decoder's values in [-1, 1] is clipped to [0, 1] as it is, not rescaled first, as in the authors' code, with which
    the plans were made: what is darker than mid-grey has no edges.
    """
    luma = np.tensordot(pictures, LUMA, axes=([1], [0]))  # (B, H, W)
    grey = (np.clip(luma, 0, 1) * 255).astype(np.uint8)
    edges = np.stack([canny(one) for one in grey])
    batch, height, width = edges.shape
    return edges.reshape(batch, height // cell, cell, width // cell, cell).sum(axis=(2, 4)).reshape(batch, -1)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices (B, count) of the highest scores (B, S), ascending; of equal scores the first."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1)


def grow(tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token (B, k, C) four times, at the positions (B, 4k, 2) of its children."""
    batch, count, _ = positions.shape
    placed = (positions[:, :, None] + CHILDREN).reshape(batch, 4 * count, 2)
    return np.repeat(tokens, 4, axis=1), placed


def mixed(tokens: np.ndarray, positions: np.ndarray, coarse: int, rows: int, columns: int, size: int) -> np.ndarray:
    """Latents (B, C, h, w) of the `rows` x `columns` tokens that a picture has where those at `positions`, in units of the low resolution,
    have all grown: of the first `coarse`, which have not, each latent is four."""
    (batch, _, width), kept = tokens.shape, tokens[:, :coarse]
    large = unpack(kept.reshape(-1, 1, width), 1, 1, size).repeat(2, axis=2).repeat(2, axis=3)
    placed = np.concatenate([grow(kept, positions[:, :coarse])[1], positions[:, coarse:]], axis=1)
    fine = np.concatenate([pack(large, size).reshape(batch, 4 * coarse, width), tokens[:, coarse:]], axis=1)
    return unpack(take(fine, order(placed)), rows, columns, size)


def take(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Rows `indices` (B, k) of values (B, S, C), each picture its own."""
    return np.take_along_axis(values, indices[:, :, None], axis=1)


def others(indices: np.ndarray, count: int) -> np.ndarray:
    """The indices below `count` that are not among `indices` (B, k), ascending: (B, count - k)."""
    kept = np.ones((len(indices), count), dtype=bool)
    np.put_along_axis(kept, indices, False, axis=1)
    return np.nonzero(kept)[1].reshape(len(indices), -1)


def order(positions: np.ndarray) -> np.ndarray:
    """Indices (B, S) that put tokens at `positions` (B, S, 2) into raster order."""
    return np.lexsort((positions[:, :, 1], positions[:, :, 0]), axis=1)
