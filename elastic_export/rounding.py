"""How far the original itself is off: its answers in float32 against float64, which no lowering can be asked to beat.

Float32 is what the sums make of it. torch adds a million pixels of a group norm in pairs of pairs, and runtimes a vector after the other,
which is ten times further off and no fault of theirs: the original is measured in both.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic_runtime.device import probe

if TYPE_CHECKING:
    import torch

DOUBLE = 8  # bytes
ROOM = 0.5  # of the free memory, for the original in float64
COLUMNS = 256_000_000  # bytes
LANES = 16  # float32 values of a vector of 512 bits
_log = logging.getLogger(__name__)


class Doubled:
    """A module in float64, in whose forward pass what asks for float32 gets float64."""

    def __init__(self, module: "torch.nn.Module"):
        import torch

        from elastic_targets.weights import cast

        self._module = cast(module, torch.float64)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs for numpy feeds, float64."""
        import torch
        from torch.overrides import TorchFunctionMode

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func in (torch.conv2d, torch.conv3d):
                    func = partial(_by_strips, func)
                func = torch.Tensor.double if func is torch.Tensor.float else func
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
                return func(*args, **named)

        arrays = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with Mode():
            return answers(self._module, {name: array.double() if array.is_floating_point() else array for name, array in arrays.items()})


class Plain:
    """A module in float32 whose group norms are summed a vector after the other."""

    def __init__(self, module: "torch.nn.Module"):
        self._module = module

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs for numpy feeds, float32."""
        import torch
        from torch.overrides import TorchFunctionMode

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                normed = func in (torch.nn.functional.group_norm, torch.group_norm)
                return (_by_vectors if normed else func)(*args, **(kwargs or {}))

        with Mode():
            return answers(self._module, {name: torch.from_numpy(array) for name, array in feeds.items()})


def answers(module: Any, feeds: Mapping[str, "torch.Tensor"]) -> tuple[np.ndarray, ...]:
    """Outputs of a module for its feeds."""
    import torch

    with torch.inference_mode():
        result = module(**feeds)
    return tuple(value.numpy() for value in (result if isinstance(result, tuple) else (result,)))


def _by_vectors(
    input: "torch.Tensor",
    num_groups: int,
    weight: "torch.Tensor | None" = None,
    bias: "torch.Tensor | None" = None,
    eps: float = 1e-5,
    *_: Any,
) -> "torch.Tensor":
    """A group norm of float32 sums, by the names of torch's own."""
    import torch

    from elastic_targets.weights import values

    rows = input.reshape(len(input) * num_groups, -1).numpy()
    centered = rows - _sums(rows) / np.float32(rows.shape[1])
    normed = centered / np.sqrt(_sums(centered**2) / np.float32(rows.shape[1]) + np.float32(eps))
    answer = torch.from_numpy(normed).view(input.shape)
    shape = (1, -1, *[1] * (input.ndim - 2))
    answer = answer if weight is None else answer * values(weight).view(shape)
    return answer if bias is None else answer + values(bias).view(shape)


def _sums(rows: np.ndarray) -> np.ndarray:
    """The sum of each row, float32, `LANES` values at a time onto the sum of those before."""
    whole = rows.shape[1] // LANES * LANES
    lanes = np.zeros((len(rows), LANES), np.float32)
    for row, sums in zip(rows[:, :whole], lanes, strict=True):
        np.add.reduce(row.reshape(-1, LANES), axis=0, out=sums)  # along the first axis numpy adds in order
    return lanes.sum(1, keepdims=True) + rows[:, whole:].sum(1, keepdims=True)


def _by_strips(
    convolution: Callable[..., "torch.Tensor"],
    taken: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor | None" = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> "torch.Tensor":
    """A convolution, so many rows of its answer at a time as have `COLUMNS` bytes of columns: in float64 torch writes them all out, 9 times
    what a 3x3 kernel is given, which is 10 GB of a picture of 512 pixels and 40 of one of 1024.
    """
    import torch

    from elastic_targets.weights import values

    count = weight.ndim - 2
    strides, paddings, dilations = ([each] * count if isinstance(each, int) else list(each) for each in (stride, padding, dilation))
    if isinstance(padding, str) or taken.ndim != weight.ndim:
        return convolution(taken, weight, bias, stride, padding, dilation, groups)
    reach = [1 + spread * (size - 1) for spread, size in zip(dilations, weight.shape[2:], strict=True)]
    given = [size + 2 * margin for size, margin in zip(taken.shape[2:], paddings, strict=True)]
    sizes = [(size - far) // step + 1 for size, far, step in zip(given, reach, strides, strict=True)]
    high = count - 2  # rows, of the dimensions that it goes along
    row = DOUBLE * len(taken) * weight[0].numel() * math.prod(sizes) // sizes[high]
    rows = max(1, COLUMNS // row)
    if rows >= sizes[high] or paddings[high] >= reach[high]:  # in which a strip might be of margins alone
        return convolution(taken, weight, bias, stride, padding, dilation, groups)
    weight, bias = values(weight), None if bias is None else values(bias)
    answer = taken.new_empty(len(taken), len(weight), *sizes)
    margins = [margin for each in reversed(paddings) for margin in (each, each)]  # the last dimension first, as torch has it
    along, side = 2 + high, 2 * (count - 1 - high)  # where rows stand in a shape, and in the margins
    for first in range(0, sizes[high], rows):
        height = min(rows, sizes[high] - first)
        begin = first * strides[high] - paddings[high]
        end = begin + (height - 1) * strides[high] + reach[high]
        margins[side : side + 2] = max(0, -begin), max(0, end - taken.shape[along])
        strip = taken.narrow(along, max(0, begin), min(end, taken.shape[along]) - max(0, begin))
        strip = torch.nn.functional.pad(strip, margins)  # here and not of the whole, which would stand there twice
        answer.narrow(along, first, height).copy_(convolution(strip, weight, bias, stride, 0, dilation, groups))
    return answer


def doubled(module: "torch.nn.Module") -> Doubled | None:
    """The module in float64, where there is room for it; else None, and the log says so. Weights that stay on disk need none."""
    from elastic_targets.weights import Streamed

    needed = DOUBLE * sum(parameter.numel() for parameter in module.parameters() if not isinstance(parameter, Streamed))
    free = probe().memory.available
    if free is not None and needed > ROOM * free:
        _log.warning("the original's own rounding is not measured: %d MB are needed and %d MB free", needed >> 20, free >> 20)
        return None
    return Doubled(module)


def plain(module: "torch.nn.Module") -> Plain | None:
    """The module whose group norms are summed a vector after the other; None where it has none."""
    import torch

    return Plain(module) if any(isinstance(each, torch.nn.GroupNorm) for each in module.modules()) else None


def error(outputs: tuple[np.ndarray, ...], exact: tuple[np.ndarray, ...]) -> float:
    """The largest difference, in units of max(1, the largest exact value of its output)."""
    pairs = zip(outputs, exact, strict=True)
    return max(float(np.abs(one - other).max() / max(1.0, np.abs(other).max())) for one, other in pairs)
