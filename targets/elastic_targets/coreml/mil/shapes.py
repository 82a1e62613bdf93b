"""Reshaping, slicing, gathering, scattering and sorting."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if len(sizes) == x.dim():  # there, 0 keeps a dimension
        sizes = [size or kept for size, kept in zip(sizes, x.shape, strict=True)]
    return x.reshape(sizes)


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(perm.tolist())


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(a % rank for a in axes.reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes.reshape(-1).tolist())


def concat(values: tuple[Tensor, ...], axis: Tensor | int, interleave: Tensor | bool = False) -> Tensor:
    if bool(interleave):
        raise NotImplementedError("concat with interleave")
    return torch.cat([value.reshape(1) if value.dim() == 0 else value for value in values], int(axis))


def stack(values: tuple[Tensor, ...], axis: Tensor | int) -> Tensor:
    return torch.stack(values, int(axis))


def split(x: Tensor, axis: Tensor | int, num_splits: Tensor | None = None, split_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(split_sizes.tolist(), int(axis))
    assert num_splits is not None
    return x.chunk(int(num_splits), int(axis))


def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(reps.tolist())


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    edges = pad.reshape(-1, 2).tolist()  # of the last axes, first to last
    if mode == "constant":
        return F.pad(x, [size for pair in reversed(edges) for size in pair], value=float(constant_val))
    for axis, (before, after) in enumerate(edges, start=x.dim() - len(edges)):
        last = x.shape[axis] - 1
        index = torch.arange(-before, last + 1 + after)
        x = x.index_select(axis, last - (last - index.abs()).abs() if mode == "reflect" else index.clamp(0, last))
    return x


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape)


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item())


def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.full(shape.tolist(), value.item() if isinstance(value, Tensor) else value)


def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.full(ref_tensor.shape, value.item() if isinstance(value, Tensor) else value)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor | int = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    hot = F.one_hot(indices, int(one_hot_vector_size))
    return torch.where(hot.bool(), torch.as_tensor(on_value), torch.as_tensor(off_value)).movedim(-1, int(axis))


def cumsum(x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False) -> Tensor:
    dim = int(axis)
    x = x.flip(dim) if bool(reverse) else x
    total = x.cumsum(dim)
    total = total - x if bool(exclusive) else total
    return total.flip(dim) if bool(reverse) else total


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes.reshape(-1).tolist())


def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    low = torch.ones(1, dtype=torch.bool) if int(lower) < 0 else rows - columns <= int(lower)
    high = torch.ones(1, dtype=torch.bool) if int(upper) < 0 else columns - rows <= int(upper)
    return torch.where(low & high, x, torch.zeros_like(x))


def _slices(
    x: Tensor, begin: Tensor, end: Tensor, stride: Tensor | None, begin_mask: Tensor | None, end_mask: Tensor | None, squeeze: Tensor | None
) -> tuple[list[Tensor], list[int]]:
    """Index of each axis, and the axes that the squeeze mask drops."""
    rank = x.dim()
    none = [False] * rank
    begin_free, end_free, dropped = ([*none] if mask is None else mask.tolist() for mask in (begin_mask, end_mask, squeeze))
    steps = [1] * rank if stride is None else stride.tolist()
    index, gone = [], []
    for axis, (size, low, high, step) in enumerate(zip(x.shape, begin.tolist(), end.tolist(), steps, strict=True)):
        if dropped[axis]:
            index.append(torch.tensor([low % size]))
            gone.append(axis)
        else:
            chosen = range(size)[slice(None if begin_free[axis] else low, None if end_free[axis] else high, step)]
            index.append(torch.tensor(chosen, dtype=torch.int64))
    return index, gone


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    index, gone = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    picked = x[torch.meshgrid(*index, indexing="ij")] if index else x
    return picked.squeeze(gone) if gone else picked


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    index, gone = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis in gone:
        update = update.unsqueeze(axis)
    result = x.clone()
    result[torch.meshgrid(*index, indexing="ij")] = update
    return result


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (low, length) in enumerate(zip(begin.tolist(), size.tolist(), strict=True)):
        x = x.narrow(axis, low, x.shape[axis] - low if length == -1 else length)
    return x


def _inside(indices: Tensor, size: int) -> Tensor:
    # From iOS 17 an index outside, negative ones among them, is undefined behaviour: never a number to compare.
    if indices.numel() and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"index {int(indices.min())} to {int(indices.max())} outside 0 to {size - 1}")
    return indices


def gather(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    dim, batches = int(axis) % x.dim(), int(batch_dims)
    _inside(indices, x.shape[dim])
    if not batches:
        return x.index_select(dim, indices.reshape(-1)).reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])
    if batches != 1:
        raise NotImplementedError(f"gather with {batches} batch dimensions")
    return torch.stack([gather(row, picks, dim - 1) for row, picks in zip(x, indices, strict=True)])


def gather_along_axis(x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool = False) -> Tensor:
    return x.gather(int(axis), _inside(indices, x.shape[int(axis)]))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool = False) -> Tensor:
    if int(batch_dims):
        raise NotImplementedError("gather_nd with batch dimensions")
    return x[tuple(_inside(part, x.shape[axis]) for axis, part in enumerate(indices.unbind(-1)))]


def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Tensor | int = 0, mode: str = "add", validate_indices: Tensor | bool = False
) -> Tensor:
    dim = int(axis)
    _inside(indices, data.shape[dim])
    if mode == "update":
        return data.scatter(dim, indices, updates)
    return data.scatter_reduce(dim, indices, updates, _SCATTER[mode])


def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Tensor | int = 0, mode: str = "add", validate_indices: Tensor | bool = False
) -> Tensor:
    dim = int(axis) % data.dim()
    shape = [-1 if d == dim else 1 for d in range(data.dim())]
    return scatter_along_axis(data, indices.reshape(shape).expand_as(updates), updates, dim, mode)


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Tensor | bool = False) -> Tensor:
    if mode not in ("update", "add"):
        raise NotImplementedError(f"scatter_nd with mode {mode!r}")
    index = tuple(_inside(part, data.shape[axis]) for axis, part in enumerate(indices.unbind(-1)))
    return data.index_put(index, updates, accumulate=mode == "add")


def topk(
    x: Tensor,
    k: Tensor | int = 1,
    axis: Tensor | int = -1,
    ascending: Tensor | bool = False,
    sort: Tensor | bool = True,
    return_indices: Tensor | bool = True,
    output_indices_dtype: str | None = None,
) -> tuple[Tensor, ...]:
    # Equal values keep their order, as a stable sort gives it; a device may break ties otherwise.
    values, indices = x.sort(dim=int(axis), descending=not bool(ascending), stable=True)
    values, indices = values.narrow(int(axis), 0, int(k)), indices.narrow(int(axis), 0, int(k))
    return (values, indices) if bool(return_indices) else (values,)


def argsort(x: Tensor, axis: Tensor | int = -1, ascending: Tensor | bool = False) -> Tensor:
    return x.argsort(dim=int(axis), descending=not bool(ascending), stable=True)


def non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        argsort, band_part, concat, cumsum, expand_dims, fill, fill_like, gather, gather_along_axis, gather_nd, non_zero, one_hot, pad,
        range_1d, reshape, reverse, scatter, scatter_along_axis, scatter_nd, shape, slice_by_index, slice_by_size, slice_update, split,
        squeeze, stack, tile, topk, transpose,
    )
}  # fmt: skip
