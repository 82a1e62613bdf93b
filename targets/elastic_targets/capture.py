"""What a workshop is given: one graph of a model, still in torch, with its open dimensions and a way to make feeds; or of a bundle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_runtime.contract.artifacts import Graph, TensorSpec, batched, dimension, measure
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import BudgetError

DENOISER = "denoiser"  # the name of the graph that draws


@dataclass(frozen=True)
class GraphCapture:
    """One graph: a `torch.nn.Module` whose forward takes the inputs by name and in order; in its attribute `exact` it may name
    submodules that stay float32 whatever the precision.

    `feeds(budget, batch)` gives numpy arrays for every input; the same arguments give the same arrays. `open_dimensions`
    are those that neither the batch nor an axis explains (T of FLUX, a decoder's h and w): a budget names sizes for them as it
    names values for axes, the largest ones where it is silent. Where data carry a budget by their shape, as they carry these
    sizes, smaller feeds are the first rows of larger ones.
    `stages` are budgets with a static function of their own where a target keeps no dimension open. A module that was read from files
    holds no weights: see `weights.Streamed`.
    """

    name: str
    module: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]
    batch: Span
    feeds: Callable[[Budget, int], dict[str, np.ndarray]]
    open_dimensions: dict[str, Span] = field(default_factory=dict)
    stages: tuple[Budget, ...] = ()

    @property
    def dimensions(self) -> dict[str, Span]:
        """Span of each open dimension by name: `B`, then the axes', then the others."""
        carried = {axis.dimension: Span(axis.length(axis.min), axis.length(axis.max)) for axis in self.axes if axis.dimension}
        return {"B": self.batch} | carried | self.open_dimensions

    @property
    def batched(self) -> tuple[str, ...]:
        """Inputs that have a row for each sample."""
        return batched(self.inputs)

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return sum(weight.numel() for weight in self.module.parameters())

    def dynamic(self, spec: TensorSpec) -> dict[int, str]:
        """Open dimensions of an input by position; a dimension with a single value is not open."""
        spans = self.dimensions
        named = {i: (size, spans[dimension(size)]) for i, size in enumerate(spec.shape) if isinstance(size, str)}
        return {i: size for i, (size, span) in named.items() if span.min < span.max}

    def fixed(self, size: int | str) -> int:
        """Size of a dimension that is not open: itself, or the single value of its span."""
        return measure(size, {name: span.min for name, span in self.dimensions.items()})

    def at(self, budget: Budget) -> Budget:
        """`budget` with every axis and every open dimension filled in and checked.

        Raises: BudgetError for a name that is neither, or a value that is not offered.
        """
        sizes = {name: size for name, size in budget.items() if name in self.open_dimensions}
        for name, size in sizes.items():
            if size not in self.open_dimensions[name]:
                raise BudgetError(f"{name} {size} is not available: {self.name} takes {self.open_dimensions[name]}")
        point = Budget(**{name: value for name, value in budget.items() if name not in sizes}).on(self.axes)
        return Budget(**point, **{name: span.max for name, span in self.open_dimensions.items()} | sizes)

    @property
    def traced(self) -> Budget:
        """A budget to trace at: away from the ends, where exporting would take an open length for a fixed one, and from 0 and 1."""
        budgets = {axis.name: axis.values for axis in self.axes}
        sizes = {name: range(span.min, span.max + 1) for name, span in self.open_dimensions.items()}
        point = {name: values[max(len(values) // 2 - 1, 0)] for name, values in budgets.items()}
        # Each open dimension is a little off the others' middle and the axes', so that no two are taken for one.
        for i, (name, values) in enumerate(sizes.items(), start=len(budgets)):
            point[name] = values[min(max(len(values) // 2 - 1 + i, 0), len(values) - 1)]
        return Budget(**point)

    def example(self) -> dict[str, np.ndarray]:
        """Feeds to trace with."""
        return self.feeds(self.traced, min(max(2, self.batch.min), self.batch.max))


@dataclass(frozen=True)
class BundleGraph:
    """One graph of an open bundle, for a target that takes the artifact of another."""

    bundle: Bundle
    name: str

    @property
    def described(self) -> Graph:
        """What the manifest says of it, its artifacts among that."""
        return self.bundle.manifest.graphs[self.name]
