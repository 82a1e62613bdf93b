"""What can be asked of the Core ML room, and what that means for a graph."""

import itertools
from dataclasses import dataclass

import coremltools as ct
import numpy as np

from elastic_runtime.contract.artifacts import dimension
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import UsageError
from elastic_targets.capture import DENOISER, GraphCapture
from elastic_targets.coreml.compress import METHODS, W8A8

SHAPES = ("functions", "enumerated", "range")
PRECISIONS = ("fp16", "fp32")
# Oldest systems to convert for; ML programs begin with iOS 15.
TARGETS = {
    name: getattr(ct.target, name)
    for name in ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26", "macOS12", "macOS13", "macOS14", "macOS15", "macOS26")
}
DEFAULT_TARGET = "iOS18"
# Each function takes memory when loaded and time when compiled; the list of sizes is Core ML's own limit.
MOST = {"functions": 16, "enumerated": 128}
_DEFAULT_BUDGETS = 8
# The first system that opens weights stored so, but for iOS 16.
_NEEDED = {"int4": "iOS18", W8A8: "iOS17"}


@dataclass(frozen=True)
class CoremlOptions:
    """How to make the package.

    shapes: `functions` (one static function a budget, sharing weights), `enumerated` (one function, a list of sizes) or `range` (one
    function for every budget: lengths are open, and a count that a value carries is that of a loop).
    target: the oldest system that must open it. precision: fp16 or fp32. reductions: precision of norms and sums in an fp16 program.
    compression: None, or how weights are stored; with `w8a8` a denoiser's activations are int8, too. budgets: for functions and enumerated,
    a number for a value of a model's one axis; empty for a graph's stages or, where it has none, both ends and the doublings between.
    conditions_apart: what a denoiser computes of time, class and pooled text alone is a function of its own.
    """

    shapes: str = "functions"
    target: str = DEFAULT_TARGET
    precision: str = "fp16"
    reductions: str = "fp32"
    compression: str | None = None
    budgets: tuple[Budget | int, ...] = ()
    conditions_apart: bool = False


def paths(graph: GraphCapture, options: CoremlOptions) -> tuple[str]:
    """Where the package lies in the bundle: `coreml/denoiser.mlpackage`, with what is not the default named."""
    default = CoremlOptions()
    reductions = f"{options.reductions}-reductions"
    words = [
        name
        for name, usual in (
            (options.shapes, default.shapes),
            (options.precision, default.precision),
            (reductions, f"{default.reductions}-reductions"),
            (compression(graph, options), default.compression),
            ("apart" if in_two(graph, options) else None, None),
        )
        if name and name != usual
    ]
    return (f"coreml/{'.'.join([graph.name, *words])}.mlpackage",)


def compression(graph: GraphCapture, options: CoremlOptions) -> str | None:
    """How a graph's weights are stored: int8 activations are for what runs at every step, so the other graphs hold int8 weights alone."""
    return "int8" if options.compression == W8A8 and graph.name != DENOISER else options.compression


def in_two(graph: GraphCapture, options: CoremlOptions) -> bool:
    """Whether a graph's conditions are a function of their own."""
    return options.conditions_apart and graph.name == DENOISER


def denoising(options: CoremlOptions) -> list[str]:
    """What was asked of a denoiser alone, as the command has it."""
    return ["--conditions-apart"] if options.conditions_apart else []


def budgets(graph: GraphCapture, options: CoremlOptions) -> list[Budget]:
    """Budgets that the package is made for; every one of them for an open range."""
    asked = [_point(budget, graph.axes) for budget in options.budgets if graph.axes or isinstance(budget, Budget)]
    if graph.stages or not graph.axes:  # one of several graphs with sizes of their own: budgets that name none of these are another's
        own = {axis.name for axis in graph.axes} | set(graph.open_dimensions)
        asked = [budget for budget in asked if own & set(budget)]
    if asked:
        return sorted({graph.at(budget) for budget in asked}, key=lambda budget: tuple(budget.values()))
    if graph.stages or not graph.axes:
        return list(graph.stages) or [graph.at(Budget())]
    grids = []
    for axis in graph.axes:
        marks = axis.min * 2.0 ** np.arange(np.ceil(np.log2(axis.max / axis.min)) + 1)
        if len(marks) > _DEFAULT_BUDGETS:
            marks = np.geomspace(axis.min, axis.max, _DEFAULT_BUDGETS)
        grids.append(sorted({min(axis.values, key=lambda value: abs(value - mark)) for mark in marks} | {axis.max}))
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
        ("--precision", options.precision, PRECISIONS),
        ("--reductions", options.reductions, ("fp32", "fp16")),
        ("--compress", options.compression, (None, *METHODS)),
    ):
        if value not in choices:
            raise UsageError(f"{flag} for coreml must be one of {', '.join(filter(None, choices))}, got {value}")
    if options.shapes == "enumerated" and (carried := [axis.name for axis in graph.axes if axis.carrier == "value"]):
        raise UsageError(f"--shapes enumerated lists lengths, and {carried[0]} is carried by a value: use --shapes functions or range")
    if options.shapes == "range" and options.budgets and graph.axes:
        raise UsageError("--shapes range takes every budget of the span: leave --budgets out, or choose --shapes functions")
    points = budgets(graph, options)
    most = MOST.get(options.shapes)
    if most and len(points) > most:
        raise UsageError(
            f"{len(points)} budgets are more than {options.shapes} make sense for ({most}): give fewer --budgets, or --shapes range"
        )
    if options.shapes == "functions" and len(points) > 1:
        _require(options.target, "iOS18", f"a package of {len(points)} functions")
    if options.shapes == "enumerated" and len(listed := enumerated(graph, options)) > 1:
        _require(options.target, "iOS18", f"lists of sizes of more than one input ({', '.join(listed)})")
    if in_two(graph, options):
        _require(options.target, "iOS18", "--conditions-apart, a package of two functions or more")
    if options.compression:
        _require(options.target, _NEEDED.get(options.compression, "iOS16"), f"--compress {options.compression}")
        if options.precision != "fp16":
            raise UsageError(f"--compress {options.compression} stores tables of fp16: use --precision fp16, got {options.precision}")


def opened(graph: GraphCapture, options: CoremlOptions) -> dict[str, Span]:
    """What one function leaves open: dimensions (never the batch), and for `range` inputs that carry a value; nothing for functions."""
    if options.shapes == "functions" or (options.shapes == "enumerated" and len(budgets(graph, options)) == 1):
        return {}
    values = {axis.input: Span(axis.min, axis.max) for axis in graph.axes if axis.carrier == "value"}
    spans = {name: span for name, span in (graph.dimensions | values).items() if name != "B" and span.min < span.max}
    if options.shapes == "range":
        return spans
    points = budgets(graph, options)
    same = {name for name in graph.open_dimensions if len({point.get(name) for point in points}) == 1}
    return {name: span for name, span in spans.items() if name not in same}


def enumerated(graph: GraphCapture, options: CoremlOptions) -> list[str]:
    """Inputs whose sizes are listed where one function lists them."""
    spans = opened(graph, options)
    return [spec.name for spec in graph.inputs if any(isinstance(size, str) and dimension(size) in spans for size in spec.shape)]


def _point(budget: Budget | int, axes: tuple[Axis, ...]) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if len(axes) != 1:
        names = " and ".join(axis.name for axis in axes)
        raise UsageError(f"--budgets takes values of one axis, and this model has {names}: leave it out for the ends of each and between")
    return Budget(**{axes[0].name: budget})


def _require(target: str, needed: str, what: str) -> None:
    if TARGETS[target] < TARGETS[needed]:
        twin = next(name for name, value in TARGETS.items() if value == TARGETS[needed] and name.startswith("macOS"))
        raise UsageError(f"--target {target} is too old for {what}, which needs {needed} or {twin}: raise --target, or choose otherwise")
