"""Lower a captured graph to a Core ML package."""

import contextlib
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
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
from elastic_targets import feeds as calibration
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml.activations import Activations
from elastic_targets.coreml.compress import W8A8, Compressor
from elastic_targets.coreml.functions import join
from elastic_targets.coreml.mends import mended, rewrite, save
from elastic_targets.coreml.options import PRECISIONS, TARGETS, CoremlOptions, budgets, compression, opened, paths, proves, requires
from elastic_targets.coreml.precision import precision
from elastic_targets.coreml.session import EvaluatorSession
from elastic_targets.target import OnProgress, Target
from elastic_targets.weights import filled

Points = Mapping[Budget, Mapping[str, np.ndarray]]
Model = Callable[[], Any]  # makes one of coremltools'
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
    shapes = options.shapes if spans else "functions"
    names = dict.fromkeys(points, "main")
    if not spans and len(points) > 1:
        names = {budget: "_".join(f"{axis}_{value}" for axis, value in budget.items()) for budget in points}
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=package.parent) as work:
        own = {name: {budget: feeds for budget, feeds in points.items() if names[budget] == name} for name in names.values()}
        models: dict[str, Model] = {name: partial(_convert, graph, options, some, spans) for name, some in own.items()}
        if compression(graph, options) == W8A8:
            every = dict.fromkeys(models, calibration.budgets(graph)) if shapes == "range" else own
            models = _calibrated(graph, shapes, models, every, Path(work))
        parts = {name: package if name == "main" else Path(work) / f"{name}.mlpackage" for name in models}
        compress = Compressor(compression(graph, options))
        for name, part in parts.items():
            save(compress(models[name]()), part)
        if package not in parts.values():
            join(parts, package)
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
        compression=compression(graph, options),  # type: ignore[arg-type]
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


def _calibrated(
    graph: GraphCapture, shapes: str, models: Mapping[str, Model], every: Mapping[str, Iterable[Budget]], work: Path
) -> dict[str, Model]:
    """The models of functions with int8 activations, by scales over `every` budget of all of them; in `work` they lie in floats."""
    activations, floats = Activations(graph.batch.min), {name: work / f"{name}.floats.mlpackage" for name in models}
    for name, model in models.items():
        save(model(), floats[name])
        runs = (
            {spec.name: np.atleast_1d(fed[spec.name]) for spec in taken(graph.inputs, shapes)}
            for budget in every[name]
            for fed in calibration.feeds(graph, budget, graph.batch.min)
        )
        activations.observe(floats[name], runs)
    return {name: partial(activations.insert, path) for name, path in floats.items()}


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
