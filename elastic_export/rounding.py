"""How far the original itself is off: its answers in float32 against float64, which no lowering can be asked to beat."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic_runtime.device import probe

if TYPE_CHECKING:
    import torch

DOUBLE = 8  # bytes
ROOM = 0.5  # of the free memory, for the original in float64
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
                func = torch.Tensor.double if func is torch.Tensor.float else func
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
                return func(*args, **named)

        arrays = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.inference_mode(), Mode():
            result = self._module(**{name: array.double() if array.is_floating_point() else array for name, array in arrays.items()})
        return tuple(value.numpy() for value in (result if isinstance(result, tuple) else (result,)))


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
