"""Linear maps, convolutions, normalisations and resizing."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False) -> Tensor:
    return torch.matmul(x.mT if bool(transpose_x) else x, y.mT if bool(transpose_y) else y)


def einsum(values: tuple[Tensor, ...], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def conv(
    x: Tensor,
    weight: Tensor,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    spatial = x.dim() - 2
    stride, dilation = _sizes(strides, spatial), _sizes(dilations, spatial)
    edges = _edges(pad_type, pad, x.shape[2:], weight.shape[2:], stride, dilation)
    padded = F.pad(x, [size for pair in reversed(edges) for size in pair])
    return _CONV[spatial](padded, weight, bias, stride=stride, dilation=dilation, groups=int(groups))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
    bias: Tensor | None = None,
    output_shape: Tensor | None = None,
) -> Tensor:
    spatial = x.dim() - 2
    if pad_type not in ("valid", "custom"):
        raise NotImplementedError(f"conv_transpose with pad_type {pad_type!r}")
    full = _CONV_TRANSPOSE[spatial](
        x, weight, bias, stride=_sizes(strides, spatial), dilation=_sizes(dilations, spatial), groups=int(groups)
    )
    if pad_type == "custom" and pad is not None:
        for axis, (before, after) in enumerate(pad.reshape(-1, 2).tolist(), start=2):
            full = full.narrow(axis, before, full.shape[axis] - before - after)
    if output_shape is not None and list(full.shape) != output_shape.tolist():
        raise NotImplementedError(f"conv_transpose to {output_shape.tolist()} where its padding gives {list(full.shape)}")
    return full


def layer_norm(
    x: Tensor, axes: Tensor | None = None, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    dims = sorted(d % x.dim() for d in (range(x.dim()) if axes is None else axes.reshape(-1).tolist()))
    centred = x - x.mean(dims, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + epsilon)
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    normal = normal if gamma is None else normal * gamma.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Tensor | float = 1, scale_factor_width: Tensor | float = 1) -> Tensor:
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest")


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | float = 1,
    scale_factor_width: Tensor | float = 1,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | bool | None = None,
) -> Tensor:
    aligned = bool(align_corners)
    if half_pixel_centers is not None and bool(half_pixel_centers) == aligned:
        raise NotImplementedError(f"upsample_bilinear with align_corners and half_pixel_centers both {aligned}")
    size = [int(x.shape[-2] * float(scale_factor_height)), int(x.shape[-1] * float(scale_factor_width))]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=aligned)


def quantize(input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """`clip(round(input / scale) + zero_point)`, halves rounded to the even one."""
    codes = torch.round(input / _along(scale, input, axis)) + (0 if zero_point is None else _along(zero_point, input, axis))
    limits = torch.iinfo(torch.uint8 if output_dtype == "uint8" else torch.int8)
    return codes.clamp(limits.min, limits.max)


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """`scale * (input - zero_point)`."""
    codes = input if zero_point is None else input - _along(zero_point, input, axis)
    return _along(scale, input, axis) * codes


def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, int(downscale_factor))


def _along(values: Tensor, x: Tensor, axis: Tensor | None) -> Tensor:
    """One value, or one for each place along an axis of `x`."""
    return values if axis is None else values.reshape([-1 if i == int(axis) % x.dim() else 1 for i in range(x.dim())])


def _sizes(values: Tensor | None, spatial: int) -> list[int]:
    return [1] * spatial if values is None else values.tolist()


def _edges(pad_type: str, pad: Tensor | None, sizes: Any, kernel: Any, stride: list[int], dilation: list[int]) -> list[tuple[int, int]]:
    """Padding (before, after) of each spatial axis."""
    if pad_type == "valid":
        return [(0, 0)] * len(stride)
    if pad_type == "custom":
        return [(0, 0)] * len(stride) if pad is None else [(a, b) for a, b in pad.reshape(-1, 2).tolist()]
    if pad_type not in ("same", "same_lower"):
        raise NotImplementedError(f"conv with pad_type {pad_type!r}")
    edges = []
    for size, width, step, spread in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((-(-size // step) - 1) * step + (width - 1) * spread + 1 - size, 0)
        small, large = total // 2, total - total // 2
        edges.append((small, large) if pad_type == "same" else (large, small))
    return edges


OPERATIONS: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dequantize": dequantize,
    "einsum": einsum,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "quantize": quantize,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
