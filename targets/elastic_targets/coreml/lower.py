"""Lower a captured graph to a Core ML package."""

import contextlib
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch

from elastic_runtime.contract.artifacts import CoremlArtifact, CoremlCall, dimension, factor, measure
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import entry
from elastic_runtime.sessions.coreml import sizes, taken
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml.compress import Compressor
from elastic_targets.coreml.functions import join
from elastic_targets.coreml.mends import mended, rewrite, save
from elastic_targets.coreml.options import PRECISIONS, TARGETS, CoremlOptions, budgets, opened, paths, proves, requires
from elastic_targets.coreml.precision import precision
from elastic_targets.coreml.session import EvaluatorSession
from elastic_targets.target import OnProgress, Target
from elastic_targets.weights import filled

Points = Mapping[Budget, Mapping[str, np.ndarray]]
_TYPES = {"float32": np.float32, "int64": np.int32}


class Baked(torch.nn.Module):
    """A graph's module with its 0-d inputs (a loop count) fixed: such a program is static, which Core ML runs best."""

    def __init__(self, module: torch.nn.Module, values: Mapping[str, int]):
        super().__init__()
        self.module = module
        self.values = dict(values)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.module(**inputs, **self.values)


def lower(graph: GraphCapture, options: CoremlOptions, folder: Path, on_progress: OnProgress | None = None) -> tuple[CoremlArtifact]:
    """Write the package into `folder` and return its manifest entry. It runs the smallest batch of the graph's span."""
    package = folder / paths(graph, options)[0]
    package.parent.mkdir(parents=True, exist_ok=True)
    graph = replace(graph, module=filled(graph.module))  # the converter takes them all at once
    batch = graph.batch.min
    points = {budget: graph.feeds(budget, batch) for budget in budgets(graph, options)}
    spans = opened(graph, options)
    compress = Compressor(options.compression)
    with _quiet(), torch.no_grad():
        if spans or len(points) == 1:
            save(compress(_convert(graph, options, points, spans)), package)
            names = dict.fromkeys(points, "main")
        else:
            names = {budget: "_".join(f"{axis}_{value}" for axis, value in budget.items()) for budget in points}
            with tempfile.TemporaryDirectory(dir=package.parent) as work:
                parts = {}
                for budget, feeds in points.items():
                    parts[names[budget]] = Path(work) / f"{names[budget]}.mlpackage"
                    save(compress(_convert(graph, options, {budget: feeds}, {})), parts[names[budget]])
                join(parts, package)
    shapes = options.shapes if spans else "functions"
    calls = [
        CoremlCall(function=names[budget], budget=dict(budget), sizes=sizes(graph.inputs, feeds) if shapes != "range" else {})
        for budget, feeds in points.items()
    ]
    artifact = CoremlArtifact(
        precision=options.precision,  # type: ignore[arg-type]
        package=paths(graph, options)[0],
        deployment_target=options.target,
        shapes=shapes,  # type: ignore[arg-type]
        batch=Span(batch, batch),
        calls=tuple(calls) if shapes != "range" else (CoremlCall(function="main", budget={}, sizes={}),),
        reductions=options.reductions if options.precision == "fp16" else "fp32",  # type: ignore[arg-type]
        compression=options.compression,  # type: ignore[arg-type]
        files=tuple(entry(folder, file) for file in sorted(package.rglob("*")) if file.is_file()),
        toolchain={name: version(name) for name in ("torch", "coremltools")},
    )
    return (artifact,)


def ensures(graph: GraphCapture, artifact: CoremlArtifact, folder: Path) -> None:
    """Check the written package: its functions, and the contract's names, types and static shapes in each.

    Raises: RuntimeError, since a failure here is a fault of this library or its converter and not of the user.
    """
    spec = ct.utils.load_spec(str(folder / artifact.path))
    functions = {each.name: each for each in spec.description.functions} or {"main": spec.description}
    if set(functions) != {call.function for call in artifact.calls}:
        raise RuntimeError(
            f"{artifact.path} has functions {sorted(functions)}, made for {sorted(call.function for call in artifact.calls)}"
        )
    if spec.specificationVersion != TARGETS[artifact.deployment_target].value:
        raise RuntimeError(f"{artifact.path} has specification {spec.specificationVersion}, asked for {artifact.deployment_target}")
    kinds = {"float32": ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32, "int64": ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32}
    for call in artifact.calls:
        described = functions[call.function]
        for specs, features in ((taken(graph.inputs, artifact.shapes), described.input), (graph.outputs, described.output)):
            if [each.name for each in specs] != [feature.name for feature in features]:
                raise RuntimeError(
                    f"{call.function} of {artifact.path} has {[f.name for f in features]}, not {[each.name for each in specs]}"
                )
            for each, feature in zip(specs, features, strict=True):
                array = feature.type.multiArrayType
                contract = [measure(size, call.sizes) for size in each.shape or (1,)] if call.sizes else []
                if array.dataType != kinds[each.dtype]:
                    raise RuntimeError(f"{call.function} of {artifact.path}: {each.name} is not {each.dtype}")
                if artifact.shapes == "functions" and list(array.shape) != contract:
                    raise RuntimeError(f"{call.function} of {artifact.path}: {each.name} has shape {list(array.shape)}, not {contract}")


def _convert(graph: GraphCapture, options: CoremlOptions, points: Points, spans: Mapping[str, Span]) -> Any:
    """An ML program of the graph at one point, or open along `spans` and traced away from the ends."""
    feeds = graph.feeds(graph.traced, graph.batch.min) if spans else next(iter(points.values()))
    inputs = taken(graph.inputs, options.shapes if spans else "functions")
    example = {spec.name: torch.from_numpy(feeds[spec.name]) for spec in inputs}
    values = {name: int(array) for name, array in feeds.items() if name not in example}
    module = Baked(graph.module, values) if values else graph.module  # with a value no length is open, so the wrapper hides no names
    dynamic = {
        spec.name: {i: torch.export.Dim.DYNAMIC for i, size in enumerate(spec.shape) if _open(size, spans)} or None for spec in inputs
    }
    exported = torch.export.export(module, (), example, dynamic_shapes=dynamic if spans else None, strict=False)
    with mended():
        return ct.convert(
            rewrite(exported.run_decompositions({})),
            inputs=[_tensor(graph, options, spec, feeds, points, spans) for spec in inputs],
            outputs=[ct.TensorType(name=spec.name, dtype=_TYPES[spec.dtype]) for spec in graph.outputs],
            minimum_deployment_target=TARGETS[options.target],
            compute_precision=precision(options.precision, options.reductions),
            skip_model_load=True,
        )


def _tensor(
    graph: GraphCapture,
    options: CoremlOptions,
    spec: Any,
    feeds: Mapping[str, np.ndarray],
    points: Points,
    spans: Mapping[str, Span],
) -> Any:
    shape: Any = feeds[spec.name].shape or (1,)  # there are no scalars in Core ML
    if any(_open(size, spans) for size in spec.shape):
        if options.shapes == "enumerated":
            every = dict.fromkeys(each[spec.name].shape for each in points.values())
            shape = ct.EnumeratedShapes(shapes=[list(each) for each in every], default=list(max(every)))
        else:
            shape = [_range(size, spans) if _open(size, spans) else length for size, length in zip(spec.shape, shape, strict=True)]
    return ct.TensorType(name=spec.name, shape=shape, dtype=_TYPES[spec.dtype])


def _open(size: int | str, spans: Mapping[str, Span]) -> bool:
    return isinstance(size, str) and dimension(size) in spans


def _range(size: str, spans: Mapping[str, Span]) -> Any:
    """From the least to the most of an open size; of `8*h` Core ML takes what lies between the multiples too, and a session does not."""
    span, times = spans[dimension(size)], factor(size)
    return ct.RangeDim(times * span.min, times * span.max, default=times * span.max)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no deprecations of the libraries' own, unless their messages were asked for."""
    with contextlib.ExitStack() as stack:
        if not logging.getLogger().isEnabledFor(logging.INFO):
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
        gc.collect()  # coremltools leaves its temporary folders to the collector, each of which would warn later


TARGET = Target(
    name="coreml",
    takes="torch",
    options=CoremlOptions,
    precisions=PRECISIONS,
    requires=requires,
    paths=paths,
    lower=lower,
    ensures=ensures,
    proves=proves,
    evaluator=EvaluatorSession,
)
