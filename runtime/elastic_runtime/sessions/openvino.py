"""OpenVINO: processors, opening the same ONNX artifacts."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.device import Processor, thread_limit
from elastic_runtime.errors import BundleError, InferenceError, MissingError, UsageError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.session import Arrays, Session

# What it may compute in: our name -> its own, which is understood as well.
HINTS = {name: name.replace("fp", "f") for name, row in PRECISIONS.items() if "openvino" in row.backends and not row.pictured}
PROCESSORS: dict[str, Processor] = {"CPU": "cpu", "GPU": "gpu", "NPU": "npu"}
# A session's first run is alone. The bindings (2026.4) make C++ statics in it, for which a thread gives up the interpreter's
# lock and wants it back, while another holds that and waits for the static: about one process in ten hung for ever.
FIRST_RUN = threading.Lock()


def obstacle(artifact: Artifact) -> str | None:
    """Why this backend cannot run the artifact here, or None."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install 'elastic-export[openvino]'"
    return None


class OpenvinoSession(Session):
    """An ONNX artifact in OpenVINO. Threads run it at once, each in an infer request with memory of its own, kept for
    the next run.

    It may be closed in a process that was forked from its own; what it holds is then freed when that process ends.

    `precision` is what it may compute in (`fp32`; `bf16` is faster where the processor has it, with errors near 1e-2 of
    the largest value); `threads` is the number of its threads on a CPU (0: one a core, of those that the process may
    use); `device` is CPU, GPU or NPU, or one of several GPUs, `GPU.1`.
    """

    def __init__(self, bundle: Bundle, graph: Graph, artifact: Artifact, precision: str = EXACT, threads: int = 0, device: str = "CPU"):
        super().__init__(graph)
        hint = HINTS.get(precision, precision)
        if hint not in HINTS.values():
            raise UsageError(f"OpenVINO's precision is one of {', '.join(HINTS)}, got {precision!r}")
        with without_telemetry():
            import openvino
        core = openvino.Core()
        kind = device.partition(".")[0]
        # One GPU is called GPU, several are GPU.0 and so on; of those, GPU alone is the first.
        if kind not in PROCESSORS or not any(name == device or name.startswith(f"{device}.") for name in core.available_devices):
            raise MissingError(f"OpenVINO has no device {device!r} here; it has {', '.join(core.available_devices)}")
        if hint == "bf16" and "BF16" not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
            raise MissingError(f"this {core.get_property(device, 'FULL_DEVICE_NAME')} computes no bfloat16: use precision {EXACT}")
        try:
            self._model = core.compile_model(str(bundle.file(artifact.path)), device, properties(hint, kind, threads))
            self._idle = deque([self._model.create_infer_request()])
        except Exception as error:  # RuntimeError, whatever went wrong
            raise BundleError(f"OpenVINO cannot open {bundle.file(artifact.path)}: {error}") from error
        self._warm = False
        self._process = os.getpid()
        self.processor = PROCESSORS[kind]
        self.where = f"openvino {openvino.__version__.split('-')[0]} {device} {hint}"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._warm:
            return self._infer(feeds)
        with FIRST_RUN:
            outputs = self._infer(feeds)
            self._warm = True
            return outputs

    def _infer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        model, idle = self._model, self._idle
        if model is None:
            raise InferenceError("this session is closed")
        try:
            request = idle.pop()
        except IndexError:  # all are at work for other threads
            request = model.create_infer_request()
        try:
            # Inputs are read where they lie; outputs are copied, since the next run reuses their memory.
            outputs = request.infer({name: np.asarray(array, order="C") for name, array in feeds.items()}, share_inputs=True)
        except Exception as error:  # RuntimeError, whatever went wrong
            raise InferenceError(f"OpenVINO failed: {error}") from error
        idle.append(request)
        return {spec.name: outputs[spec.name] for spec in self.graph.outputs}

    def close(self) -> None:
        if os.getpid() != self._process:
            # Destroying them waits for OpenVINO's threads, which a fork does not copy. So they are never destroyed
            # here.
            for kept in (self._model, *self._idle):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        self._model = None
        self._idle = deque()


def properties(precision: str, kind: str = "CPU", threads: int = 0) -> dict[str, Any]:
    """What OpenVINO is told where it compiles a model for a `kind` of device: single answers soon, in this precision."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS.get(precision, precision), "PERFORMANCE_HINT": "LATENCY"}
    if kind == "CPU" and (threads := threads or thread_limit()):
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Within the block OpenVINO finds no telemetry package: importing it would otherwise report the import to its
    vendor.
    """
    name = "openvino_telemetry"
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules.update({name: None})  # type: ignore[dict-item]  # Python's own way to make an import fail
    try:
        yield
    finally:
        sys.modules.pop(name, None)  # another thread may have done so
        sys.modules.update(before)


BACKEND = Backend(
    name="openvino",
    opens=("onnx",),
    obstacle=obstacle,
    open=OpenvinoSession,
    threads=True,
    ways={"openvino": Way("cpu"), "openvino-bf16": Way("cpu", {"precision": "bf16"}, precision="bf16")},
)
