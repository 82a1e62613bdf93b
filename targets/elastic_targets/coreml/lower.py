"""Lower a captured graph to a Core ML package."""

import contextlib
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch

from elastic_runtime.contract.artifacts import CoremlArtifact, CoremlCall, TensorSpec, measure
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import entry
from elastic_runtime.sessions.apart import ROWS
from elastic_runtime.sessions.coreml import sizes, taken
from elastic_targets import feeds as calibration
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import options as asked
from elastic_targets.coreml.activations import Activations
from elastic_targets.coreml.apart import FUNCTION, Halves
from elastic_targets.coreml.compress import W8A8, Compressor
from elastic_targets.coreml.convert import Conversion
from elastic_targets.coreml.functions import join
from elastic_targets.coreml.mends import save
from elastic_targets.coreml.options import PRECISIONS, TARGETS, CoremlOptions, budgets, compression, in_two, opened, paths
from elastic_targets.coreml.session import evaluator
from elastic_targets.target import OnProgress, Target
from elastic_targets.weights import filled

Model = Callable[[], Any]  # makes one of coremltools'


def lower(graph: GraphCapture, options: CoremlOptions, folder: Path, on_progress: OnProgress | None = None) -> tuple[CoremlArtifact]:
    """Write the package into `folder` and return its manifest entry. It runs the smallest batch of the graph's span."""
    path = paths(graph, options)[0]
    package = folder / path
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
        functions = {name: Conversion(graph, options, some, spans) for name, some in own.items()}
        first = next(iter(functions.values()))
        halves = first.halves(ROWS) if in_two(graph, options) else None
        cut = halves.apart if halves else None
        models: dict[str, Model] = {name: partial(each.model, cut) for name, each in functions.items()}
        if compression(graph, options) == W8A8:
            every = dict.fromkeys(models, calibration.budgets(graph)) if shapes == "range" else own
            models = _calibrated(graph, shapes, models, every, Path(work), first.halves(batch) if cut else None)
        if halves:  # its activations stay floats, as those of all that has one row a sample do
            models = {FUNCTION: partial(first.conditions, halves)} | models
        parts = {name: package if len(models) == 1 else Path(work) / f"{name}.mlpackage" for name in models}
        compress = Compressor(compression(graph, options))
        for name, part in parts.items():
            save(compress(models[name]()), part)
        if len(parts) > 1:
            join(parts, package)
    calls = [
        CoremlCall(function=names[budget], budget=dict(budget), sizes=sizes(graph.inputs, feeds) if shapes != "range" else {})
        for budget, feeds in points.items()
    ]
    artifact = CoremlArtifact(
        precision=options.precision,  # type: ignore[arg-type]
        package=path,
        deployment_target=options.target,
        shapes=shapes,  # type: ignore[arg-type]
        batch=Span(batch, batch),
        calls=tuple(calls) if shapes != "range" else (CoremlCall(function="main", budget={}, sizes={}),),
        reductions=options.reductions if options.precision == "fp16" else "fp32",  # type: ignore[arg-type]
        compression=compression(graph, options),  # type: ignore[arg-type]
        files=tuple(entry(folder, file) for file in sorted(package.rglob("*")) if file.is_file()),
        toolchain={name: version(name) for name in ("torch", "coremltools")},
        conditions=cut,
    )
    return (artifact,)


def ensures(graph: GraphCapture, artifact: CoremlArtifact, folder: Path) -> None:
    """Check the written package: its functions, and the contract's names, types and static shapes in each.

    Raises: RuntimeError, since a failure here is a fault of this library or its converter and not of the user.
    """
    spec = ct.utils.load_spec(str(folder / artifact.path))
    functions = {each.name: each for each in spec.description.functions} or {"main": spec.description}
    cut, calls = artifact.conditions, [call.function for call in artifact.calls]
    if cut and cut.call:
        calls.append(cut.call.function)
    if set(functions) != set(calls):
        raise RuntimeError(f"{artifact.path} has functions {sorted(functions)}, made for {sorted(calls)}")
    if spec.specificationVersion != TARGETS[artifact.deployment_target].value:
        raise RuntimeError(f"{artifact.path} has specification {spec.specificationVersion}, asked for {artifact.deployment_target}")
    inputs = tuple(taken(graph.inputs, artifact.shapes))
    for call in artifact.calls:
        _ensure(artifact, functions[call.function], call, cut.rest(inputs) if cut else inputs, graph.outputs, artifact.shapes)
    if cut and cut.call:
        _ensure(artifact, functions[cut.call.function], cut.call, cut.own(inputs), cut.outputs, "functions")


def _ensure(
    artifact: CoremlArtifact, described: Any, call: CoremlCall, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], shapes: str
) -> None:
    """Check one function: its description against what the contract says that it takes and gives."""
    where = f"{call.function} of {artifact.path}"
    kinds = {"float32": ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32, "int64": ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32}
    for specs, features in ((inputs, described.input), (outputs, described.output)):
        if [each.name for each in specs] != [feature.name for feature in features]:
            raise RuntimeError(f"{where} has {[f.name for f in features]}, not {[each.name for each in specs]}")
        for each, feature in zip(specs, features, strict=True):
            array = feature.type.multiArrayType
            contract = [measure(size, call.sizes) for size in each.shape or (1,)] if call.sizes else []
            if array.dataType != kinds[each.dtype]:
                raise RuntimeError(f"{where}: {each.name} is not {each.dtype}")
            if shapes == "functions" and list(array.shape) != contract:
                raise RuntimeError(f"{where}: {each.name} has shape {list(array.shape)}, not {contract}")


def _calibrated(
    graph: GraphCapture,
    shapes: str,
    models: Mapping[str, Model],
    every: Mapping[str, Iterable[Budget]],
    work: Path,
    halves: Halves | None = None,
) -> dict[str, Model]:
    """The models of functions with int8 activations, by scales over `every` budget of all of them; in `work` they lie in floats. Those of
    the rest of the graph take what its conditions' half, of as many samples, makes."""
    specs = tuple(taken(graph.inputs, shapes))
    specs = halves.apart.rest(specs) if halves else specs
    activations, floats = Activations(graph.batch.min), {name: work / f"{name}.floats.mlpackage" for name in models}
    for name, model in models.items():
        save(model(), floats[name])
        runs = (
            {spec.name: np.atleast_1d(fed[spec.name]) for spec in specs}
            for budget in every[name]
            for whole in calibration.feeds(graph, budget, graph.batch.min)
            for fed in [halves.left(whole) if halves else whole]
        )
        activations.observe(floats[name], runs)
    return {name: partial(activations.insert, path) for name, path in floats.items()}


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
    requires=asked.requires,
    paths=paths,
    lower=lower,
    ensures=ensures,
    proves=asked.proves,
    evaluator=evaluator,
    denoising=asked.denoising,
)
