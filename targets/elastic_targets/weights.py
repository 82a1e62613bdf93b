"""Weights that stay on disk: a module whose every weight is read when it is used, and let go after that."""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from typing import Self  # since Python 3.11


class Streamed(Tensor):
    """A tensor of known shape and type whose values are `read` whenever something computes with them; it holds none."""

    _read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, read: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype) -> "Self":
        self = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"), requires_grad=False)
        self._read = read
        return self

    def values(self) -> Tensor:
        """What it holds, an ordinary tensor of its type."""
        return self._read().to(self.dtype)

    def cast(self, dtype: torch.dtype) -> "Streamed":
        """The same in another type."""
        return Streamed(self.values, self.shape, dtype)

    # Every operation arrives below with its arguments as they are.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # as becoming a parameter does
            return args[0].cast(args[0].dtype)
        with torch.inference_mode(False), torch.no_grad():  # a view that inference mode makes of no tensor of its own is refused
            args, kwargs = tree_map_only(Streamed, Streamed.values, (args, kwargs or {}))
            return func(*args, **kwargs)


def values(weight: Tensor) -> Tensor:
    """A weight's values, wherever they are."""
    return weight.values() if isinstance(weight, Streamed) else weight.detach()


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, also those that are one tensor."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def mapped(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of `module` whose parameters and buffers `change` made; one that stands at two places is made once."""
    copied = copy.deepcopy(module, {id(value): value for _, value in weights(module)})  # but for these, which are taken over
    made: dict[int, Tensor] = {}
    for part in copied.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(value) not in made:
                made[id(value)] = change(value)
            new = made[id(value)]
            setattr(part, name, nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new)
    return copied


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` in another precision."""

    def change(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.cast(dtype) if isinstance(value, Streamed) else value.to(dtype)

    return mapped(module, change)


def held_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` in another precision, but for the children that it names in `exact`."""
    held = cast(module, dtype)
    for name in getattr(module, "exact", ()):
        parent, _, child = name.rpartition(".")
        setattr(held.get_submodule(parent), child, module.get_submodule(name))  # what was rounded stays rounded
    return held


def filled(module: nn.Module) -> nn.Module:
    """A copy of `module` with its weights in memory, for what needs them all at once."""
    return mapped(module, values)
