"""Prove an artifact: run it at recorded budgets and hold it against the original model's outputs.

`record` runs the original in torch and is done once, while exporting. `verify` needs no torch, so it also runs on the device.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np

import elastic_targets
from elastic_export.rounding import answers, doubled, error, plain
from elastic_runtime.contract import reference
from elastic_runtime.contract.artifacts import Artifact, Verification
from elastic_runtime.contract.budget import Budget, key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import CONVOLVED
from elastic_runtime.contract.reference import unpack
from elastic_runtime.errors import BundleError, ModelError, VerificationError
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.opening import obstacles, open_artifact
from elastic_runtime.sessions.session import Session

BILLION = 1_000_000_000
LARGE = BILLION  # bytes of an artifact that is run in parts where memory is to be spared
UNPROVEN = "the original's answers were not recorded (--verify none): export it again with --verify ends or budgets"

if TYPE_CHECKING:
    from elastic_targets.capture import GraphCapture


def record(graph: "GraphCapture", budgets: list[Budget]) -> tuple[dict[str, np.ndarray], float | None]:
    """The original's outputs at each budget, batch as in tracing, as arrays for the bundle's reference file; and its own rounding: the
    largest error of a sample's outputs against float64, in units of max(1, |output|), None where that was not measured (of a billion
    weights and more at the first budget alone).

    The feeds are those of the largest shapes, of which each budget takes its first rows.

    Raises: ModelError for outputs that are not finite.
    """
    import torch

    outputs, exact, summed, rounding = {}, doubled(graph.module), plain(graph.module), []
    large = graph.parameters > BILLION
    carriers = {axis.input for axis in graph.axes if axis.carrier != "shape"}
    size = min(max(2, graph.batch.min), graph.batch.max)
    with torch.inference_mode():
        for budget in budgets:
            arrays = graph.feeds(budget, size)
            try:
                results = _answers(graph, arrays, size)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as failure:  # torch's, of shapes that do not meet
                why = " ".join(str(failure).split())[:300]
                raise ModelError(
                    f"the original {graph.name} cannot be run at {key(budget)}: {why}. Do the sizes in its config go together?"
                ) from None
            outputs[budget] = {spec.name: value for spec, value in zip(graph.outputs, results, strict=True)}
            if odd := [name for name, value in outputs[budget].items() if not np.isfinite(value).all()]:
                raise ModelError(
                    f"the original's {odd[0]} of {graph.name} at {key(budget)} has values that are not finite, so nothing can be held "
                    "against it: are the weights whole, and within float32?"
                )
            if exact and (budget == budgets[0] or not large):  # float64 takes twice as long, which is hours of a large model
                first = tuple(value[: graph.batch.min] for value in results)  # as many samples as a run needs tell it, and take less
                rows = _rows(graph, arrays, slice(0, graph.batch.min))
                doubles = exact(rows)
                rounding += [error(each, doubles) for each in ([first, summed(rows)] if summed else [first])]
    largest = {axis.name: axis.max for axis in graph.axes if axis.carrier == "shape"}
    largest |= {name: span.max for name, span in graph.open_dimensions.items()}
    shared = graph.feeds(Budget(**dict(budgets[-1]) | largest), size)
    packed = reference.pack(graph.name, {name: array for name, array in shared.items() if name not in carriers}, outputs)
    return packed, max(rounding, default=None)


def _answers(graph: "GraphCapture", arrays: Mapping[str, np.ndarray], size: int) -> tuple[np.ndarray, ...]:
    """What the original gives for `size` samples: pictures one after the other, whose activations are its memory."""
    import torch

    step = graph.batch.min if graph.name in CONVOLVED else size
    runs = []
    for first in range(0, size, step):
        rows = _rows(graph, arrays, slice(first, first + step))
        runs.append(answers(graph.module, {name: torch.from_numpy(array) for name, array in rows.items()}))
    return tuple(np.concatenate(values) for values in zip(*runs, strict=True)) if len(runs) > 1 else runs[0]


def _rows(graph: "GraphCapture", arrays: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    return {name: array[rows] if name in graph.batched else array for name, array in arrays.items()}


def verify(bundle: Bundle, tolerance: float | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> list[tuple[str, Artifact]]:
    """Run every artifact against the recorded reference (or `arrays` in its place); return each with what was measured.

    An artifact that nothing here can run comes back without rows (what was measured elsewhere proves nothing here) and says why in
    `unverified`. A missed tolerance does not raise: see `require`.
    """
    return [
        (name, verify_artifact(bundle, name, artifact, tolerance, arrays))
        for name, graph in bundle.manifest.graphs.items()
        for artifact in graph.artifacts
    ]


def verify_artifact(
    bundle: Bundle,
    graph: str,
    artifact: Artifact,
    tolerance: float | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    frugal: bool = False,
) -> Artifact:
    """Run one artifact at every recorded budget and return it with its rows; a large one in parts where `frugal`, for little memory."""
    if not arrays and _unrecorded(bundle, graph):
        return msgspec.structs.replace(artifact, verified=(), unverified=UNPROVEN)
    room, reasons = obstacles(artifact)
    large = frugal and sum(file.bytes for file in artifact.files) > LARGE
    opened = elastic_targets.evaluator(bundle, graph, artifact) if large or not room else None
    opened = opened or (open_artifact(bundle, graph, artifact) if room else None)
    if opened is None:
        return msgspec.structs.replace(artifact, verified=(), unverified=" ".join(reasons))
    limit = tolerance if tolerance is not None else bundle.manifest.graphs[graph].tolerance(artifact)
    with opened as session:
        rows = tuple(check(bundle, graph, session, limit, arrays))
    if not rows and bundle.manifest.graphs[graph].unproven:
        return msgspec.structs.replace(artifact, verified=(), unverified=UNPROVEN)
    if not rows:
        raise BundleError(f"the reference of {bundle.folder} has no outputs for {graph!r}: export the bundle again")
    return msgspec.structs.replace(artifact, verified=rows, unverified=None)


def verify_unrounded(bundle: Bundle, graph: str, session: Session, precision: str) -> None:
    """Hold what was lowered, before its weights were rounded to few bits, to the tolerance of the `precision` that it had then.

    Raises: VerificationError naming the first budget that missed it, and the figure.
    """
    if _unrecorded(bundle, graph):
        return
    with session:
        for row in check(bundle, graph, session, bundle.manifest.graphs[graph].tolerance(precision=precision)):
            _require(row, f"{graph} before its weights were rounded")


def _unrecorded(bundle: Bundle, graph: str) -> bool:
    """Whether the export was told to record nothing of the original's answers for a graph."""
    left = bundle.manifest.graphs[graph].unproven
    return bool(left) and not (bundle.manifest.reference and unpack(graph, bundle.reference())[1])


def require(graph: str, artifact: Artifact) -> None:
    """Raise VerificationError naming the first budget that missed its tolerance, and the figure."""
    for row in artifact.verified:
        _require(row, f"{graph} ({artifact.path})")


def _require(row: Verification, what: str) -> None:
    if not row.passed:
        raise VerificationError(
            f"{what} fails at {key(row.budget)}: {row.figure}, cosine {row.cosine:.6f}, where the tolerance is "
            f"{row.tolerance:.0e} of the largest reference value (at least 1). Measured with {row.where}."
        )
