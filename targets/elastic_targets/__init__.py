"""The workshops: one room a compiler, each with `requires`, `lower` and `ensures`.

A room is entered through `load`, which turns the absence of its library into the line that installs it.
"""

import importlib
import logging
from types import ModuleType

from elastic_runtime.contract.artifacts import Artifact
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.sessions.session import Session

# room -> (packages that it imports, extra that brings them)
ROOMS = {"onnx": (("torch", "onnx", "onnxscript"), "torch"), "trt": ((), "rtx"), "coreml": (("torch", "coremltools"), "torch,coreml")}
# Rooms that can compute their artifacts where no device for them is, far slower: room -> the session that does
EVALUATORS = {"coreml": "EvaluatorSession"}


def load(name: str) -> ModuleType:
    """The room of a target; raises MissingError with the line to paste where its compiler is not installed."""
    if name not in ROOMS:
        raise UsageError(f"there is no target {name!r}; there are {', '.join(ROOMS)}")
    packages, extra = ROOMS[name]
    if not logging.getLogger().isEnabledFor(logging.INFO):
        # On Linux coremltools warns at import that it cannot run models there; that is why there is an evaluator.
        logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"elastic_targets.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in packages:
            raise
        raise MissingError(
            f"the {name} target needs {error.name}, which is not installed: pip install 'elastic-export[{extra}]'"
        ) from error


def evaluator(bundle: Bundle, graph: str, artifact: Artifact) -> Session | None:
    """A session that computes `artifact` on any machine, to prove it; None where its room has none or is not installed."""
    if artifact.target not in EVALUATORS:
        return None
    try:
        room = load(artifact.target)
    except MissingError:
        return None
    session: Session = getattr(room, EVALUATORS[artifact.target])(bundle, bundle.manifest.graphs[graph], artifact)
    return session
