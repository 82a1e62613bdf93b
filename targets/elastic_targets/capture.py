"""What a workshop is given: one graph of a model, still in torch, with its open dimensions and a way to make feeds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_runtime.axis import Axis, Span
from elastic_runtime.budget import Budget
from elastic_runtime.manifest import TensorSpec


@dataclass(frozen=True)
class GraphCapture:
    """One graph: a `torch.nn.Module` whose forward takes the inputs by name and in order.

    `feeds(budget, batch)` gives numpy arrays for every input; the same arguments give the same arrays. `open_dimensions`
    are those that neither the batch nor an axis explains (S and T of FLUX, a decoder's h and w).
    """

    name: str
    module: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]
    batch: Span
    feeds: Callable[[Budget, int], dict[str, np.ndarray]]
    open_dimensions: dict[str, Span] = field(default_factory=dict)

    @property
    def dimensions(self) -> dict[str, Span]:
        """Span of each open dimension by name: `B`, then the axes', then the others."""
        carried = {axis.dimension: Span(axis.length(axis.min), axis.length(axis.max)) for axis in self.axes if axis.dimension}
        return {"B": self.batch} | carried | self.open_dimensions

    def dynamic(self, spec: TensorSpec) -> dict[int, str]:
        """Open dimensions of an input by position; a dimension with a single value is not open."""
        spans = self.dimensions
        return {i: size for i, size in enumerate(spec.shape) if isinstance(size, str) and spans[size].min < spans[size].max}

    def fixed(self, size: int | str) -> int:
        """Size of a dimension that is not open: itself, or the single value of its span."""
        return self.dimensions[size].min if isinstance(size, str) else size

    def example(self) -> dict[str, np.ndarray]:
        """Feeds to trace with: no open dimension is at 0, 1 or an end of its span where it can be avoided."""
        budget = Budget(**{axis.name: axis.values[max(len(axis.values) // 2 - 1, 0)] for axis in self.axes})
        return self.feeds(budget, min(max(2, self.batch.min), self.batch.max))
