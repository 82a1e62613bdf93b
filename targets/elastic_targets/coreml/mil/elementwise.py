"""Arithmetic, comparisons, activations and reductions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[..., Any]


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.clamp(x, alpha.item(), beta.item())


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.leaky_relu(x, alpha.item())


def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return torch.softmax(x, int(axis))


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def identity(x: Any) -> Any:
    return x


def cast(x: Tensor, dtype: str) -> Tensor:
    # The declared dtype of the output does the rounding; only a boolean differs from a plain conversion.
    return x != 0 if dtype == "bool" else x


def _reduce(function: Operation) -> Operation:
    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        dims = list(range(x.dim())) if axes is None else axes.reshape(-1).tolist()
        return function(x, dim=dims, keepdim=bool(keep_dims))

    return reduce


def _arg(function: Operation) -> Operation:
    def reduce(x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str | None = None) -> Tensor:
        return function(x, dim=int(axis), keepdim=bool(keep_dims))

    return reduce


def _product(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((d % x.dim() for d in dim), reverse=True):
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


def _binary(function: Operation) -> Operation:
    def binary(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return binary


def _unary(function: Operation) -> Operation:
    def unary(x: Tensor) -> Tensor:
        return function(x)

    return unary


_BINARY: dict[str, Operation] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": torch.true_divide,
    "floor_div": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}
_UNARY: dict[str, Operation] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_REDUCTIONS: dict[str, Operation] = {
    "reduce_sum": torch.sum,
    "reduce_mean": torch.mean,
    "reduce_max": torch.amax,
    "reduce_min": torch.amin,
    "reduce_prod": _product,
    "reduce_l1_norm": lambda x, dim, keepdim: x.abs().sum(dim, keepdim),
    "reduce_l2_norm": lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt(),
    "reduce_sum_square": lambda x, dim, keepdim: x.square().sum(dim, keepdim),
    "reduce_log_sum_exp": torch.logsumexp,
}

OPERATIONS: dict[str, Operation] = (
    {name: _binary(function) for name, function in _BINARY.items()}
    | {name: _unary(function) for name, function in _UNARY.items()}
    | {name: _reduce(function) for name, function in _REDUCTIONS.items()}
    | {"reduce_argmax": _arg(torch.argmax), "reduce_argmin": _arg(torch.argmin)}
    | {
        "cast": cast,
        "clip": clip,
        "gelu": gelu,
        "identity": identity,
        "inverse": inverse,
        "leaky_relu": leaky_relu,
        "log": log,
        "rsqrt": rsqrt,
        "select": select,
        "softmax": softmax,
    }
)
