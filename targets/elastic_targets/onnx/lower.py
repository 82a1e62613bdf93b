"""Lower a captured graph to an ONNX file."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript  # noqa: F401  torch imports it only while exporting; its absence is told at the door
import torch

from elastic_runtime.contract.artifacts import Graph, OnnxArtifact, TensorSpec
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.precision import CONVOLVED, ENCODER, EXACT, held
from elastic_runtime.contract.precision import PRECISIONS as TABLE
from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.sessions.ort import absence
from elastic_targets.capture import DENOISER, GraphCapture
from elastic_targets.onnx import fitting, keeping, qdq
from elastic_targets.onnx.apart import split
from elastic_targets.onnx.calibrate import largest
from elastic_targets.onnx.estimate import estimate
from elastic_targets.onnx.evaluate import PartSession, evaluator
from elastic_targets.onnx.matrices import Matrix
from elastic_targets.onnx.quantize import SCHEMES, quantize
from elastic_targets.onnx.stream import external, stream, write
from elastic_targets.target import OnProgress, Target
from elastic_targets.weights import held_in

OPSETS = (20, 23)
DEFAULT_OPSET = 23
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = (*_TYPES, *SCHEMES, *qdq.FORMS)
NEAREST, GPTQ = "nearest", "gptq"
ROUNDINGS = (NEAREST, GPTQ)
FITTED = tuple(name for name, scheme in SCHEMES.items() if not scheme.dynamic)  # that can be rounded by what they multiply
_DTYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}


TEXT, ENCODERS = "text", "text_encoder"  # what `--precision` calls every text encoder, and how the names of their graphs begin


@dataclass(frozen=True)
class OnnxOptions:
    """`precision` is that of weights and activations; inputs and outputs stay float32, reductions inside too. It is one for all graphs,
    of which a decoder and an encoder (convolutions) keep their floats where matrices are held in fewer bits, or one a graph:
    `denoiser=int4w,text=int8w,decoder=fp16`, fp32 for those that it does not name. `conditions_apart`: what a denoiser computes of time,
    class and pooled text alone lies in a file of its own.

    `rounding` is how a denoiser's matrices come to blocks of few bits: each weight to the nearest step, or (`gptq`) so that later columns
    make up for the errors of earlier ones, over a few runs of the model. `keep`: so many of a denoiser's matrices keep their floats, those
    whose rounding costs most, each tried in runs of the model."""

    opset: int = DEFAULT_OPSET
    precision: str = EXACT
    rounding: str = NEAREST
    keep: int = 0
    conditions_apart: bool = False

    @property
    def words(self) -> dict[str, str]:
        """The precision of each graph that is named; none where one is for all."""
        parts = self.precision.replace(" ", "").split(",") if set("=,") & set(self.precision) else []
        return dict(part.partition("=")[::2] for part in parts)

    def of(self, graph: str) -> str:
        """The precision of a graph.

        Raises: UsageError for text that says none.
        """
        if not (words := self.words):
            return held(self.precision, graph)
        graphs = (DENOISER, *CONVOLVED, TEXT)
        if unknown := [
            f"{name}={value}" if value else name
            for name, value in words.items()
            if value not in PRECISIONS or not (name in graphs or name.startswith(f"{TEXT}_"))
        ]:
            raise UsageError(
                f"--precision is one of {', '.join(PRECISIONS)}, or one a graph, as in denoiser=int4w,text=int8w,decoder=fp16; "
                f"got {unknown[0]!r}"
            )
        return words.get(graph) or (words.get(TEXT) if graph.startswith(ENCODERS) else None) or EXACT


def paths(graph: GraphCapture, options: OnnxOptions) -> tuple[str]:
    """Where the artifact lies in the bundle: `onnx/denoiser.onnx`, with what is not the default in its name."""
    opset = "" if options.opset == DEFAULT_OPSET else f".opset{options.opset}"
    precision = "" if options.of(graph.name) == EXACT else f".{options.of(graph.name)}"
    rest = ".rest" if _apart(graph, options) else ""
    return (f"onnx/{graph.name}{opset}{precision}{rest}.onnx",)


def _apart(graph: GraphCapture, options: OnnxOptions) -> bool:
    return options.conditions_apart and graph.name == DENOISER


def denoising(options: OnnxOptions) -> list[str]:
    """What was asked of a denoiser alone, as the command has it."""
    fitted = [] if options.rounding == NEAREST else [f"--rounding {options.rounding}"]
    kept = [f"--keep {options.keep}"] if options.keep else []
    return [*(["--conditions-apart"] if options.conditions_apart else []), *fitted, *kept]


def proves(graph: GraphCapture, options: OnnxOptions) -> list[Budget]:
    """Budgets to verify besides both ends, the middle and an untraced one: none, since one graph serves them all."""
    return []


def requires(graph: GraphCapture, options: OnnxOptions) -> None:
    """Raise UsageError unless the options make sense for this graph."""
    if options.opset not in OPSETS:
        raise UsageError(f"--opset must be one of {', '.join(map(str, OPSETS))}, got {options.opset}")
    precision = options.of(graph.name)
    if precision not in PRECISIONS:
        raise UsageError(f"--precision for onnx must be one of {', '.join(PRECISIONS)}, got {precision}")
    if precision not in _TYPES and graph.name in CONVOLVED:
        floats = ", ".join(_TYPES)
        raise UsageError(
            f"{'an' if graph.name == ENCODER else 'a'} {graph.name} is made of convolutions, which keep their floats: its precision is one "
            f"of {floats}, got {precision}"
        )
    if options.rounding not in ROUNDINGS:
        raise UsageError(f"--rounding must be one of {', '.join(ROUNDINGS)}, got {options.rounding}")
    if options.rounding != NEAREST and options.of(DENOISER) not in FITTED:
        raise UsageError(
            f"--rounding {options.rounding} is for a denoiser in {' or '.join(FITTED)}, and this one's precision is {options.of(DENOISER)}"
        )
    if isinstance(options.keep, bool) or not isinstance(options.keep, int) or options.keep < 0:
        raise UsageError(f"--keep is how many matrices keep their floats, a whole number from 0, got {options.keep!r}")
    if options.keep and options.of(DENOISER) not in SCHEMES:
        raise UsageError(
            f"--keep {options.keep} is for a denoiser in {', '.join(SCHEMES)}, and this one's precision is {options.of(DENOISER)}"
        )
    if precision == "bf16" and options.opset < 22:  # the first in which every operator takes bfloat16, Conv among them
        raise UsageError(f"--precision bf16 needs --opset {DEFAULT_OPSET}, got {options.opset}")
    if precision in qdq.FORMS and options.opset < qdq.FORMS[precision].opset:
        fewer = ", ".join(name for name, form in qdq.FORMS.items() if form.opset <= options.opset)
        raise UsageError(
            f"--precision {precision} needs --opset {DEFAULT_OPSET}, got {options.opset}, whose operators take no {precision} weights; "
            f"it has those of {fewer}"
        )
    if precision not in _TYPES and (reason := absence(options.opset)):
        raise MissingError(f"--precision {precision} runs the graph before its weights are rounded, and {reason}")


def lower(graph: GraphCapture, options: OnnxOptions, folder: Path, on_progress: OnProgress | None = None) -> tuple[OnnxArtifact]:
    """Write the graph (large weights beside it) into `folder` and return its manifest entry; `on_progress` is told of weights and
    of runs."""
    try:
        return (_lowered(graph, options, folder, on_progress),)
    except BaseException:
        _LAST.clear()  # which nothing will ask for
        raise


def _lowered(graph: GraphCapture, options: OnnxOptions, folder: Path, on_progress: OnProgress | None) -> OnnxArtifact:
    precision = options.of(graph.name)
    model = _floats(graph, precision, options.opset) if precision in _TYPES else _unrounded(graph, options).clone()
    path, conditions, kept = paths(graph, options)[0], None, list[Matrix]()
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    files = []
    with ExitStack() as stack:
        if precision in SCHEMES:
            rounder = None
            if options.keep and graph.name == DENOISER:
                kept = keeping.costliest(graph, model, precision, options.keep, on_progress)
            if options.rounding == GPTQ and graph.name == DENOISER:
                spill = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=(folder / path).parent)))
                rounder = partial(fitting.fitted, runs=fitting.feeds(graph), folder=spill, on_progress=on_progress)
            quantize(model, precision, rounder, [matrix.name for matrix in kept])
        elif precision in qdq.FORMS:
            qdq.insert(model, precision, largest(graph, model, qdq.activations(model, precision), on_progress))
        if _apart(graph, options):
            model, own, conditions = split(model, graph.inputs, path.replace(".rest.onnx", ".conditions.onnx"))
            files = write(own, folder / conditions.path, on_progress)
        files = write(model, folder / path, on_progress) + files
    return OnnxArtifact(
        precision=precision,  # type: ignore[arg-type]
        opset=options.opset,
        conditions=conditions,
        float_matrices=tuple(matrix.weight for matrix in kept),
        weight_rounding=options.rounding if graph.name == DENOISER else NEAREST,  # type: ignore[arg-type]
        files=tuple(entry(folder, each) for each in files),
        toolchain={name: version(name) for name in ("torch", "onnx", "onnxscript")},
    )


def unrounded(graph: GraphCapture, described: Graph, options: OnnxOptions) -> tuple[PartSession, str] | None:
    """The graph whose matrices `lower` held in fewer bits, before it did, and its precision, whose own tolerance finds what theirs is too
    wide for."""
    if (precision := options.of(graph.name)) in _TYPES:
        return None
    session = PartSession(described, _unrounded(graph, options))
    _LAST.clear()
    return session, TABLE[precision].base


def _unrounded(graph: GraphCapture, options: OnnxOptions) -> ir.Model:
    key = (TABLE[options.of(graph.name)].base, options.opset)
    if not (_LAST and _LAST[0] is graph.module and _LAST[1] == key):
        _LAST[:] = [graph.module, key, _floats(graph, *key)]
    model: ir.Model = _LAST[2]
    return model


def _floats(graph: GraphCapture, precision: str, opset: int) -> ir.Model:
    """The graph with every weight in floats; float32's own module is taken as it is."""
    return stream(graph, graph.module if precision == EXACT else held_in(graph.module, _TYPES[precision]), opset)


_LAST: list[Any] = []  # module, precision with opset, and graph of the last one, which is lowered and then proven


def ensures(graph: GraphCapture, artifact: OnnxArtifact, folder: Path) -> None:
    """Check the written files: ONNX's own checker, the contract's names, types and open dimensions, no float64 inside.

    Raises: RuntimeError, since a failure here is a fault of this library or its exporter and not of the user.
    """
    inputs, apart = graph.inputs, artifact.conditions
    if apart:
        _ensure(graph, artifact, folder / apart.path, apart.own(inputs), apart.outputs)
        inputs = apart.rest(inputs)
    _ensure(graph, artifact, folder / artifact.path, inputs, graph.outputs)


def _ensure(
    graph: GraphCapture, artifact: OnnxArtifact, file: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    onnx.checker.check_model(str(file), full_check=False)
    model = onnx.load(str(file), load_external_data=False)
    if lost := set(external(model)) - {Path(each.path).name for each in artifact.files}:
        raise RuntimeError(f"{file.name} has weights in {', '.join(sorted(lost))}, which the artifact does not list")
    if (opset := {item.domain: item.version for item in model.opset_import}.get("")) != artifact.opset:
        raise RuntimeError(f"{file.name} has opset {opset}, asked for {artifact.opset}")
    for specs, values in ((inputs, model.graph.input), (outputs, model.graph.output)):
        if [spec.name for spec in specs] != [value.name for value in values]:
            names = [value.name for value in values]
            raise RuntimeError(f"{file.name} has {names} where the contract says {[spec.name for spec in specs]}")
        for spec, value in zip(specs, values, strict=True):
            kind = value.type.tensor_type
            if kind.elem_type != _DTYPES[spec.dtype]:
                raise RuntimeError(f"{file.name}: {spec.name} is not {spec.dtype}")
            contract = [size if i in graph.dynamic(spec) else graph.fixed(size) for i, size in enumerate(spec.shape)]
            shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
            if shape != contract:
                raise RuntimeError(f"{file.name}: {spec.name} has shape {shape}, the contract says {contract}")
    if doubles := [tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.DOUBLE]:
        raise RuntimeError(f"{file.name} holds float64 constants: {', '.join(doubles[:3])}")


TARGET = Target(
    name="onnx",
    takes="torch",
    options=OnnxOptions,
    precisions=PRECISIONS,
    requires=requires,
    paths=paths,
    lower=lower,
    ensures=ensures,
    proves=proves,
    estimate=lambda graph, options: estimate(
        graph,
        options.of(graph.name),
        apart=_apart(graph, options),
        fitted=options.rounding == GPTQ and graph.name == DENOISER,
        kept=options.keep if graph.name == DENOISER else 0,
    ),
    evaluator=evaluator,
    denoising=denoising,
    addressed=lambda options: {name: f"--precision {name}={value}" for name, value in options.words.items()},
    unrounded=unrounded,
)
