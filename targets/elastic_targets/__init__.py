"""The workshops: one room a compiler, each with `requires`, `lower` and `ensures`.

A room is entered through `load`, which turns the absence of its library into the line that installs it.
"""

import importlib
from types import ModuleType

from elastic_runtime.errors import MissingError, UsageError

# room -> (packages that it imports, extra that brings them)
ROOMS = {"onnx": (("torch", "onnx", "onnxscript"), "torch"), "trt": ((), "rtx")}


def load(name: str) -> ModuleType:
    """The room of a target; raises MissingError with the line to paste where its compiler is not installed."""
    if name not in ROOMS:
        raise UsageError(f"there is no target {name!r}; there are {', '.join(ROOMS)}")
    packages, extra = ROOMS[name]
    try:
        return importlib.import_module(f"elastic_targets.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in packages:
            raise
        raise MissingError(
            f"the {name} target needs {error.name}, which is not installed: pip install 'elastic-export[{extra}]'"
        ) from error
