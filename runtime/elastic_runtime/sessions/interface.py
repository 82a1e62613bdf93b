"""What a graph takes and answers, read once: every run is held against it, and a small step has no time for more."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from elastic_runtime.contract.artifacts import Graph, TensorSpec, dimension, factor
from elastic_runtime.errors import InferenceError


@dataclass(frozen=True)
class Port:
    """An input or output: its `sizes` are numbers where they are fixed, else an open dimension and how many of it, `("h", 8)` of `8*h`."""

    spec: TensorSpec
    dtype: np.dtype
    sizes: tuple[int | tuple[str, int], ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> "Port":
        sizes = (size if isinstance(size, int) else (dimension(size), factor(size)) for size in spec.shape)
        return cls(spec, np.dtype(spec.dtype), tuple(sizes))

    @property
    def ordered(self) -> bool:
        """Whether it carries a budget by its length: an int64 vector that has no entry for each sample."""
        return self.spec.dtype == "int64" and len(self.sizes) == 1 and self.spec.shape != ("B",)

    def takes(self, shape: tuple[int, ...], known: dict[str, int], learns: bool) -> bool:
        """Whether an array may have this shape, by what is `known` of the open dimensions; where it `learns`, new ones are known from
        now on, else they may be of any size."""
        if len(shape) != len(self.sizes):
            return False
        for size, length in zip(self.sizes, shape, strict=True):
            if isinstance(size, int):
                if size != length:
                    return False
                continue
            name, times = size
            if name in known:
                if known[name] * times != length:
                    return False
            elif learns:
                if length % times:
                    return False
                known[name] = length // times
        return True

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.spec.shape))})"


class Interface:
    """The inputs and outputs of a graph."""

    def __init__(self, graph: Graph):
        self._dimensions = graph.dimensions
        self._inputs, self._outputs = _ports(graph.inputs), _ports(graph.outputs)
        self._ordered = frozenset(name for name, port in self._inputs.items() if port.ordered)

    def check(self, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The sizes of the open dimensions; raises InferenceError unless `feeds` are exactly the graph's inputs, with equal ones.

        What carries a budget by its length is always arange: graphs read nothing else of it, so another selection would silently be
        taken for a prefix.
        """
        if self._inputs.keys() != feeds.keys():
            raise InferenceError(f"the graph takes {sorted(self._inputs)}, got {sorted(feeds)}")
        known: dict[str, int] = {}
        for name, port in self._inputs.items():
            array = feeds[name]
            if array.dtype != port.dtype:
                raise InferenceError(f"{name} must be {port.spec.dtype}, got {array.dtype.name}")
            if not port.takes(array.shape, known, learns=True):
                raise InferenceError(f"{name} must have shape {port} with equal letters equal, got {array.shape}")
            if name in self._ordered and (array != np.arange(len(array))).any():
                raise InferenceError(f"{name} must be arange({len(array)}): kept ones are always the first, got {array[:8].tolist()}")
        for name, size in known.items():
            span = self._dimensions[name]
            if not span.min <= size <= span.max:
                raise InferenceError(f"this graph takes {name} of {span}, got {size}")
        return known

    def check_answer(self, outputs: Mapping[str, np.ndarray], sizes: dict[str, int], where: str) -> None:
        """Raise InferenceError where what `where` answered to feeds of such `sizes` is of another shape than they ask for, which a
        backend was seen to do (the shape of the run before) without an error."""
        for name, array in outputs.items():
            port = self._outputs.get(name)
            if port is not None and not port.takes(array.shape, sizes, learns=False):
                raise InferenceError(f"{where} answered {name} in shape {array.shape}, and the graph's is {port} of {sizes}")


def _ports(specs: Iterable[TensorSpec]) -> dict[str, Port]:
    return {spec.name: Port.of(spec) for spec in specs}
