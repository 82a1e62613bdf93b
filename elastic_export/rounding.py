"""How far the original itself is off: its answers in float32 against float64, which no lowering can be asked to beat."""

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
        with torch.inference_mode(), Mode():
            result = self._module(**{name: array.double() if array.is_floating_point() else array for name, array in arrays.items()})
        return tuple(value.numpy() for value in (result if isinstance(result, tuple) else (result,)))


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
    if rows >= sizes[high]:
        return convolution(taken, weight, bias, stride, padding, dilation, groups)
    padded = torch.nn.functional.pad(taken, [margin for each in reversed(paddings) for margin in (each, each)])
    weight, bias = values(weight), None if bias is None else values(bias)
    strips = []
    for first in range(0, sizes[high], rows):
        length = (min(rows, sizes[high] - first) - 1) * strides[high] + reach[high]
        strip = padded.narrow(2 + high, first * strides[high], length)
        strips.append(convolution(strip, weight, bias, stride, 0, dilation, groups))
    return torch.cat(strips, 2 + high)


def doubled(module: "torch.nn.Module") -> Doubled | None:
    """The module in float64, where there is room for it; else None, and the log says so. Weights that stay on disk need none."""
    from elastic_targets.weights import Streamed

    needed = DOUBLE * sum(parameter.numel() for parameter in module.parameters() if not isinstance(parameter, Streamed))
    free = probe().memory.available
    if free is not None and needed > ROOM * free:
        _log.warning("the original's own rounding is not measured: %d MB are needed and %d MB free", needed >> 20, free >> 20)
        return None
    return Doubled(module)


def error(answers: tuple[np.ndarray, ...], exact: tuple[np.ndarray, ...]) -> float:
    """The largest difference, in units of max(1, the largest exact value of its output)."""
    pairs = zip(answers, exact, strict=True)
    return max(float(np.abs(one - other).max() / max(1.0, np.abs(other).max())) for one, other in pairs)
