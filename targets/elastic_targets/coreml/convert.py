"""From a captured graph to ML programs: static at one point or open along its sizes, whole or in two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import coremltools as ct
import msgspec
import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from elastic_runtime.contract.artifacts import Apart, TensorSpec, dimension, factor
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.sessions.coreml import taken
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml.apart import Halves, split
from elastic_targets.coreml.mends import mended, rewrite
from elastic_targets.coreml.options import TARGETS, CoremlOptions, enumerated, paths
from elastic_targets.coreml.precision import precision

_TYPES = {"float32": np.float32, "int64": np.int32}


class Baked(torch.nn.Module):
    """A graph's module with its 0-d inputs (a loop count) fixed: such a program is static, which Core ML runs best."""

    def __init__(self, module: torch.nn.Module, values: Mapping[str, int]):
        super().__init__()
        self.module = module
        self.values = dict(values)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.module(**inputs, **self.values)


@dataclass(frozen=True)
class Conversion:
    """What one function is made of: a graph, static at the first of its points, or open along `spans` and traced away from the ends."""

    graph: GraphCapture
    options: CoremlOptions
    points: Mapping[Budget, Mapping[str, np.ndarray]]
    spans: Mapping[str, Span]

    def model(self, cut: Apart | None = None) -> Any:
        """An ML program of the graph; where it has a `cut`, of the rest of it."""
        batch = self.graph.batch.min
        inputs, feeds = self._inputs, self._fed(batch)
        if cut is None:
            return self._program(self._whole(batch), inputs, feeds, self.graph.outputs)
        halves = self.halves(batch)
        if msgspec.structs.replace(halves.apart, call=cut.call) != cut:
            raise RuntimeError(f"{self.graph.name} is cut behind {halves.apart} at {next(iter(self.points))}, and behind {cut} elsewhere")
        inputs, feeds = cut.rest(inputs), halves.left(feeds)
        return self._program(_exported(halves.rest, inputs, feeds, self.spans), inputs, feeds, self.graph.outputs)

    def conditions(self, halves: Halves) -> Any:
        """An ML program of what is computed of conditions alone, for as many rows as the halves were exported with."""
        cut = halves.apart
        inputs, feeds = cut.own(self.graph.inputs), self._fed(halves.rows)
        return self._program(_exported(halves.conditions, inputs, feeds, {}), inputs, feeds, cut.outputs)

    def halves(self, rows: int) -> Halves:
        """The graph in two, of so many samples.

        Raises: UsageError for a model that multiplies nothing by its conditions alone.
        """
        return split(self._whole(rows), self._inputs, paths(self.graph, self.options)[0])

    @property
    def _inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(taken(self.graph.inputs, self.options.shapes if self.spans else "functions"))

    def _fed(self, size: int) -> Mapping[str, np.ndarray]:
        point = next(iter(self.points))
        if self.spans:  # what all points have in common is fixed, and the rest is traced away from the ends
            closed = {name: point[name] for name in self.graph.open_dimensions if name in point and name not in self.spans}
            point = Budget(**{**self.graph.traced, **closed})
        return self.graph.feeds(point, size)

    def _whole(self, size: int) -> ExportedProgram:
        inputs, feeds, module = self._inputs, self._fed(size), self.graph.module
        values = {name: int(array) for name, array in feeds.items() if name not in {spec.name for spec in inputs}}
        if values:  # with one no length is open, so the wrapper hides no names
            module = Baked(module, values)
        return _exported(module, inputs, feeds, self.spans)

    def _program(
        self, exported: ExportedProgram, inputs: Sequence[TensorSpec], feeds: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec]
    ) -> Any:
        with mended():
            return ct.convert(
                rewrite(exported.run_decompositions({})),
                inputs=[self._tensor(spec, feeds) for spec in inputs],
                outputs=[ct.TensorType(name=spec.name, dtype=_TYPES[spec.dtype]) for spec in outputs],
                minimum_deployment_target=TARGETS[self.options.target],
                compute_precision=precision(self.options.precision, self.options.reductions),
                skip_model_load=True,
            )

    def _tensor(self, spec: TensorSpec, feeds: Mapping[str, np.ndarray]) -> Any:
        shape: Any = feeds[spec.name].shape or (1,)  # there are no scalars in Core ML
        if any(_open(size, self.spans) for size in spec.shape):
            if self.options.shapes == "enumerated":
                every = [each[spec.name].shape for each in self.points.values()]
                if len(enumerated(self.graph, self.options)) == 1:  # else each input has an entry for each point
                    every = list(dict.fromkeys(every))
                shape = ct.EnumeratedShapes(shapes=[list(each) for each in every], default=list(max(every)))
            else:
                sizes = zip(spec.shape, shape, strict=True)
                shape = [_range(size, self.spans) if _open(size, self.spans) else length for size, length in sizes]
        return ct.TensorType(name=spec.name, shape=shape, dtype=_TYPES[spec.dtype])


def _exported(
    module: torch.nn.Module, inputs: Sequence[TensorSpec], feeds: Mapping[str, np.ndarray], spans: Mapping[str, Span]
) -> ExportedProgram:
    example = {spec.name: torch.from_numpy(feeds[spec.name]) for spec in inputs}
    dynamic = {spec.name: {i: Dim.DYNAMIC for i, size in enumerate(spec.shape) if _open(size, spans)} or None for spec in inputs}
    return torch.export.export(module, (), example, dynamic_shapes=dynamic if spans else None, strict=False)


def _open(size: int | str, spans: Mapping[str, Span]) -> TypeGuard[str]:
    return isinstance(size, str) and dimension(size) in spans


def _range(size: str, spans: Mapping[str, Span]) -> Any:
    """From the least to the most of an open size; of `8*h` Core ML takes what lies between the multiples too, and a session does not."""
    span, times = spans[dimension(size)], factor(size)
    return ct.RangeDim(times * span.min, times * span.max, default=times * span.max)
