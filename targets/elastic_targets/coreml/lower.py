"""Lower a captured graph to a Core ML package."""

import contextlib
import io
import itertools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch

from elastic_runtime.axis import Span
from elastic_runtime.budget import Budget
from elastic_runtime.bundle import CoremlArtifact, CoremlCall, entry
from elastic_runtime.errors import UsageError
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml.compress import METHODS, compress
from elastic_targets.coreml.functions import join
from elastic_targets.coreml.mends import mended, rewrite
from elastic_targets.coreml.precision import precision

SHAPES = ("functions", "enumerated", "range")
# Oldest systems to convert for; ML programs begin with iOS 15.
TARGETS = {
    name: getattr(ct.target, name)
    for name in ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26", "macOS12", "macOS13", "macOS14", "macOS15", "macOS26")
}
DEFAULT_TARGET = "iOS18"
# Each function takes memory when loaded and time when compiled; the list of sizes is Core ML's own limit.
MOST = {"functions": 16, "enumerated": 128}
_DEFAULT_BUDGETS = 8
_TYPES = {"float32": np.float32, "int64": np.int32}


@dataclass(frozen=True)
class CoremlOptions:
    """How to make the package.

    shapes: `functions` (one static function a budget, sharing weights), `enumerated` (one function, a list of sizes) or `range`.
    target: the oldest system that must open it. precision: fp16 or fp32. reductions: precision of norms and sums in an fp16 program.
    compression: None, or how weights are stored. budgets: for functions and enumerated; empty for both ends and the doublings between.
    """

    shapes: str = "functions"
    target: str = DEFAULT_TARGET
    precision: str = "fp16"
    reductions: str = "fp32"
    compression: str | None = None
    budgets: tuple[Budget, ...] = ()


def path(graph: str, options: CoremlOptions) -> str:
    """Where the package lies in the bundle: `coreml/denoiser.mlpackage`, with what is not the default named."""
    default = CoremlOptions()
    reductions = f"{options.reductions}-reductions"
    said = [
        name
        for name, usual in (
            (options.shapes, default.shapes),
            (options.precision, default.precision),
            (reductions, f"{default.reductions}-reductions"),
            (options.compression, default.compression),
        )
        if name and name != usual
    ]
    return f"coreml/{'.'.join([graph, *said])}.mlpackage"


def budgets(graph: GraphCapture, options: CoremlOptions) -> list[Budget]:
    """Budgets that the package is made for; every one of them for an open range."""
    if options.budgets:
        return sorted({budget.on(graph.axes) for budget in options.budgets}, key=lambda budget: tuple(budget.values()))
    grids = []
    for axis in graph.axes:
        wanted = axis.min * 2.0 ** np.arange(np.ceil(np.log2(axis.max / axis.min)) + 1)
        if len(wanted) > _DEFAULT_BUDGETS:
            wanted = np.geomspace(axis.min, axis.max, _DEFAULT_BUDGETS)
        grids.append(sorted({min(axis.values, key=lambda value: abs(value - want)) for want in wanted} | {axis.max}))
    names = [axis.name for axis in graph.axes]
    return [Budget(**dict(zip(names, point, strict=True))) for point in itertools.product(*grids)]


def proves(graph: GraphCapture, options: CoremlOptions) -> list[Budget]:
    """Budgets to verify besides both ends, the middle and an untraced one: those that the package is made for."""
    return [] if options.shapes == "range" else budgets(graph, options)


def requires(graph: GraphCapture, options: CoremlOptions) -> None:
    """Raise UsageError unless the options make sense for this graph; a target that is too old is named with the one that is needed."""
    for flag, value, choices in (
        ("--shapes", options.shapes, SHAPES),
        ("--target", options.target, tuple(TARGETS)),
        ("--dtype", options.precision, ("fp16", "fp32")),
        ("--reductions", options.reductions, ("fp32", "fp16")),
        ("--compress", options.compression, (None, *METHODS)),
    ):
        if value not in choices:
            raise UsageError(f"{flag} for coreml must be one of {', '.join(filter(None, choices))}, got {value}")
    if carried := [axis.name for axis in graph.axes if axis.carrier == "value"]:
        raise UsageError(f"coreml carries a budget by a length; {carried[0]} is carried by a value, which it cannot lower yet. Use onnx.")
    points = budgets(graph, options)
    most = MOST.get(options.shapes)
    if most and len(points) > most:
        raise UsageError(f"{len(points)} budgets are more than {options.shapes} make sense for ({most}): give fewer --budgets, or --shapes range")
    if options.shapes == "functions" and len(points) > 1:
        _require(options.target, "iOS18", f"a package of {len(points)} functions")
    if options.shapes != "functions" and _open(graph, options):
        _require(options.target, "iOS18", f"--shapes {options.shapes}")
    if options.compression:
        _require(options.target, "iOS16", f"--compress {options.compression}")
        if options.precision != "fp16":
            raise UsageError(f"--compress {options.compression} stores tables of fp16: use --dtype fp16, got {options.precision}")


def lower(graph: GraphCapture, options: CoremlOptions, folder: Path) -> CoremlArtifact:
    """Write the package into `folder` and return its manifest entry. It runs the smallest batch of the graph's span."""
    package = folder / path(graph.name, options)
    package.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(package, ignore_errors=True)  # an extended bundle's old one
    batch = graph.batch.min
    points = {budget: graph.feeds(budget, batch) for budget in budgets(graph, options)}
    opened = _open(graph, options)
    with _quiet(), torch.no_grad():
        if opened:
            compress(_convert(graph, options, points, opened), options.compression).save(str(package))
            names = dict.fromkeys(points, "main")
        elif len(points) == 1:
            compress(_convert(graph, options, points, {}), options.compression).save(str(package))
            names = dict.fromkeys(points, "main")
        else:
            names = {budget: "_".join(f"{axis}_{value}" for axis, value in budget.items()) for budget in points}
            with tempfile.TemporaryDirectory(dir=package.parent) as work:
                parts = {}
                for budget, feeds in points.items():
                    parts[names[budget]] = Path(work) / f"{names[budget]}.mlpackage"
                    compress(_convert(graph, options, {budget: feeds}, {}), options.compression).save(str(parts[names[budget]]))
                join(parts, package)
    shapes = options.shapes if opened else "functions"
    calls = [
        CoremlCall(function=names[budget], budget=dict(budget), sizes=_sizes(graph, feeds) if shapes != "range" else {})
        for budget, feeds in points.items()
    ]
    return CoremlArtifact(
        precision=options.precision,  # type: ignore[arg-type]
        package=path(graph.name, options),
        deployment_target=options.target,
        shapes=shapes,  # type: ignore[arg-type]
        batch=Span(batch, batch),
        calls=tuple(calls) if shapes != "range" else (CoremlCall(function="main", budget={}, sizes={}),),
        reductions=options.reductions if options.precision == "fp16" else "fp32",  # type: ignore[arg-type]
        compression=options.compression,  # type: ignore[arg-type]
        files=tuple(entry(folder, file) for file in sorted(package.rglob("*")) if file.is_file()),
        toolchain={name: version(name) for name in ("torch", "coremltools")},
    )


def ensures(graph: GraphCapture, artifact: CoremlArtifact, folder: Path) -> None:
    """Check the written package: its functions, and the contract's names, types and static shapes in each.

    Raises: RuntimeError, since a failure here is a fault of this library or its converter and not of the user.
    """
    spec = ct.utils.load_spec(str(folder / artifact.path))
    functions = {each.name: each for each in spec.description.functions} or {"main": spec.description}
    if set(functions) != {call.function for call in artifact.calls}:
        raise RuntimeError(f"{artifact.path} has functions {sorted(functions)}, made for {sorted(call.function for call in artifact.calls)}")
    if spec.specificationVersion != TARGETS[artifact.deployment_target].value:
        raise RuntimeError(f"{artifact.path} has specification {spec.specificationVersion}, asked for {artifact.deployment_target}")
    kinds = {"float32": ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32, "int64": ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32}
    for call in artifact.calls:
        described = functions[call.function]
        for specs, features in ((graph.inputs, described.input), (graph.outputs, described.output)):
            if [each.name for each in specs] != [feature.name for feature in features]:
                raise RuntimeError(f"{call.function} of {artifact.path} has {[f.name for f in features]}, not {[each.name for each in specs]}")
            for each, feature in zip(specs, features, strict=True):
                array = feature.type.multiArrayType
                wanted = [call.sizes.get(size, -1) if isinstance(size, str) else size for size in each.shape]
                if array.dataType != kinds[each.dtype]:
                    raise RuntimeError(f"{call.function} of {artifact.path}: {each.name} is not {each.dtype}")
                if artifact.shapes == "functions" and list(array.shape) != wanted:
                    raise RuntimeError(f"{call.function} of {artifact.path}: {each.name} has shape {list(array.shape)}, not {wanted}")


def _convert(graph: GraphCapture, options: CoremlOptions, points: Mapping[Budget, Mapping[str, np.ndarray]], opened: Mapping[str, Span]) -> Any:
    """An ML program of the graph at one point, or open along `opened` and traced away from the ends."""
    feeds = graph.feeds(_traced(graph), graph.batch.min) if opened else next(iter(points.values()))
    example = {name: torch.from_numpy(array) for name, array in feeds.items()}
    dynamic = {
        spec.name: {i: torch.export.Dim.DYNAMIC for i, size in enumerate(spec.shape) if size in opened} or None for spec in graph.inputs
    }
    exported = torch.export.export(graph.module, (), example, dynamic_shapes=dynamic if opened else None, strict=False)
    with mended():
        return ct.convert(
            rewrite(exported.run_decompositions({})),
            inputs=[_tensor(graph, options, spec, feeds, points, opened) for spec in graph.inputs],
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
    points: Mapping[Budget, Mapping[str, np.ndarray]],
    opened: Mapping[str, Span],
) -> Any:
    shape: Any = feeds[spec.name].shape
    if any(size in opened for size in spec.shape):
        if options.shapes == "enumerated":
            every = dict.fromkeys(each[spec.name].shape for each in points.values())
            shape = ct.EnumeratedShapes(shapes=[list(each) for each in every], default=list(max(every)))
        else:
            shape = [
                ct.RangeDim(opened[size].min, opened[size].max, default=opened[size].max) if size in opened else length
                for size, length in zip(spec.shape, shape, strict=True)
            ]
    return ct.TensorType(name=spec.name, shape=shape, dtype=_TYPES[spec.dtype])


def _traced(graph: GraphCapture) -> Budget:
    """A budget away from the ends, where exporting would take an open length for a fixed one."""
    return Budget(**{axis.name: axis.values[max(len(axis.values) // 2 - 1, 0)] for axis in graph.axes})


def _open(graph: GraphCapture, options: CoremlOptions) -> dict[str, Span]:
    """Dimensions that one function leaves open: none for functions, and the batch never."""
    if options.shapes == "functions" or (options.shapes == "enumerated" and len(budgets(graph, options)) == 1):
        return {}
    return {name: span for name, span in graph.dimensions.items() if name != "B" and span.min < span.max}


def _sizes(graph: GraphCapture, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {
        name: size for spec in graph.inputs for name, size in zip(spec.shape, feeds[spec.name].shape, strict=True) if isinstance(name, str)
    }


def _require(target: str, needed: str, what: str) -> None:
    if TARGETS[target] < TARGETS[needed]:
        twin = next(name for name, value in TARGETS.items() if value == TARGETS[needed] and name.startswith("macOS"))
        raise UsageError(f"--target {target} is too old for {what}, which needs {needed} or {twin}: raise --target, or choose otherwise")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no deprecations of the libraries' own, unless their messages were asked for."""
    with contextlib.ExitStack() as stack:
        if not logging.getLogger().isEnabledFor(logging.INFO):
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
