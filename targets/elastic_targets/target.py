"""What a compiler is to the rest of the house: a record, `Target`, and the door to the rooms that hold one each."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from elastic_runtime.contract.artifacts import Artifact, Graph
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.sessions.session import Session

# on_progress(what, done, total): how far a lowering that takes its time has come
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Estimate:
    """Bytes on disk of an artifact, and of memory at most while it is written; `waiting_bytes` lie on disk beside it until it is."""

    file_bytes: int
    peak_bytes: int
    waiting_bytes: int = 0


@dataclass(frozen=True)
class Target:
    """One compiler. `Graph` below is a `GraphCapture` where it takes torch, and a `BundleGraph` where it takes ONNX.

    name: as in the manifest. takes: what it lowers: a model in torch, or the ONNX artifact of a bundle, without torch.
    options: the record of what can be asked of it. precisions: those of its artifacts.
    requires(Graph, options): raises UsageError or MissingError unless it can be made as asked; reads no weights.
    paths(Graph, options): where the artifacts will lie in the bundle.
    lower(Graph, options, folder, on_progress): writes them into the bundle to be and returns their manifest entries.
    ensures(Graph, artifact, folder): checks one that was written; raises RuntimeError for a fault of this library.
    proves(Graph, options): budgets to verify besides both ends, the middle and an untraced one.
    available(options): raises MissingError or UsageError where no compiler here fits; before any graph is there to ask about.
    fits(Manifest, options): raises UsageError and its kinds for what its axes and graphs do not offer, before there is an artifact of any.
    estimate(Graph, options): what it will take, of a graph whose sizes the module tells; reads no weights.
    evaluator(Bundle, Graph of the manifest, artifact): a session that computes it, far slower, where no device for it is, or no memory;
        None for an artifact that it cannot compute.
    denoising(options): what was asked of a denoiser alone, in the command's words: without one it would have no effect.
    addressed(options): the graphs that options name, each with the word of the command that does.
    unrounded(Graph, Graph of the manifest, options): a session of what was lowered before weights were rounded to few bits, and the
        precision that it is in, to whose tolerance it is held; None where they keep their floats.
    """

    name: str
    takes: Literal["torch", "onnx"]
    options: type[Any]
    precisions: tuple[str, ...]
    requires: Callable[[Any, Any], None]
    paths: Callable[[Any, Any], tuple[str, ...]]
    lower: Callable[[Any, Any, Path, OnProgress], tuple[Artifact, ...]]
    ensures: Callable[[Any, Any, Path], None]
    proves: Callable[[Any, Any], list[Budget]]
    available: Callable[[Any], object] | None = None
    fits: Callable[[Manifest, Any], None] | None = None
    estimate: Callable[[Any, Any], Estimate] | None = None
    evaluator: Callable[[Bundle, Graph, Any], Session | None] | None = None
    denoising: Callable[[Any], list[str]] | None = None
    addressed: Callable[[Any], dict[str, str]] | None = None
    unrounded: Callable[[Any, Graph, Any], tuple[Session, str] | None] | None = None


class Needs(NamedTuple):
    """Packages that a room imports, and the extra that brings them: known before the room is entered."""

    packages: tuple[str, ...]
    extra: str


TARGETS = {
    "onnx": Needs(("torch", "onnx", "onnxscript"), "torch"),
    "trt": Needs((), "rtx"),  # its builders are chosen when something is built
    "coreml": Needs(("torch", "coremltools"), "torch,coreml"),
}


def target(name: str) -> Target:
    """The target of that name, its room entered.

    Raises: UsageError listing the targets there are; MissingError with the line to paste where its compiler is not installed.
    """
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    needs = TARGETS[name]
    if not logging.getLogger().isEnabledFor(logging.INFO):
        # On Linux coremltools warns at import that it cannot run models there; that is why there is an evaluator.
        logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        record: Target = importlib.import_module(f"elastic_targets.{name}").TARGET
        return record
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in needs.packages:
            raise
        raise MissingError(
            f"the {name} target needs {error.name}, which is not installed: pip install 'elastic-export[{needs.extra}]'"
        ) from error


def evaluator(bundle: Bundle, graph: str, artifact: Artifact) -> Session | None:
    """A session that computes `artifact` on any machine, to prove it; None where its target has none or is not installed."""
    try:
        evaluate = target(artifact.target).evaluator
    except MissingError:
        return None
    return evaluate(bundle, bundle.manifest.graphs[graph], artifact) if evaluate else None
