"""OpenVINO: processors, opening the same ONNX artifacts."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.device import Processor, busy_cores, thread_limit
from elastic_runtime.errors import BundleError, InferenceError, MissingError, UsageError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.lanes import Lanes, wanted
from elastic_runtime.sessions.session import Arrays, Session

# What it may compute in: our name -> its own, which is understood as well.
HINTS = {name: name.replace("fp", "f") for name, row in PRECISIONS.items() if "openvino" in row.backends and not row.pictured}
PROCESSORS: dict[str, Processor] = {"CPU": "cpu", "GPU": "gpu", "NPU": "npu"}
# Values of a row that share a scale where they meet bytes. OpenVINO's own is 32, which keeps a product of bytes from its speed: ELIT-B/2
# takes 30 to 40 % longer. ONNX Runtime, which proves the artifact, takes one for all rows, so that each of these is more exact.
GROUPS = (256, 128, 64)
FEW = 0.01  # of the weights
# A session's first run is alone. The bindings (2026.4) make C++ statics in it, for which a thread gives up the interpreter's
# lock and wants it back, while another holds that and waits for the static: about one process in ten hung for ever.
FIRST_RUN = threading.Lock()


def obstacle(artifact: Artifact) -> str | None:
    """Why this backend cannot run the artifact here, or None."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install 'elastic-export[openvino]'"
    if "openvino" not in (able := PRECISIONS[artifact.precision].backends):
        return f"{artifact.precision} graphs of ours are for {' and '.join(able)}: open an artifact of another precision"
    return None


class Requests:
    """A compiled model. Threads run it at once, each in an infer request with memory of its own, kept for the next run."""

    def __init__(self, model: Any, outputs: Sequence[str]):
        self._model, self._outputs = model, outputs
        self._idle = deque([model.create_infer_request()])
        self._warm = False

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._warm:
            return self._infer(feeds)
        with FIRST_RUN:
            outputs = self._infer(feeds)
            self._warm = True
            return outputs

    def _infer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        try:
            request = self._idle.pop()
        except IndexError:  # all are at work for other threads
            request = self._model.create_infer_request()
        try:
            # Inputs are read where they lie; outputs are copied, since the next run reuses their memory.
            outputs = request.infer({name: np.asarray(array, order="C") for name, array in feeds.items()}, share_inputs=True)
        except Exception as error:  # RuntimeError, whatever went wrong
            raise InferenceError(f"OpenVINO failed: {error}") from error
        self._idle.append(request)
        return {name: outputs[name] for name in self._outputs}

    def keep(self) -> None:
        """Never destroy any of it: that waits for OpenVINO's threads, which a fork does not copy."""
        for kept in (self._model, *self._idle):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


class OpenvinoSession(Session):
    """An ONNX artifact in OpenVINO. Threads run it at once.

    It may be closed in a process that was forked from its own; what it holds is then freed when that process ends.

    `precision` is what it computes in (`fp32`; `bf16` is faster where the processor has it, with errors near 1e-2 of
    the largest value, and the default of an artifact that is held in it); `threads` is the number of its threads on a
    CPU (0: one a core, of those that the process may use); `device` is CPU, GPU or NPU, or one of several GPUs, `GPU.1`.
    `lanes` is how many rows of a batch may run side by side on the CPU, each on a stream of one thread (1: none do); by
    default it is measured for a denoiser of less than 256 MB, which is then compiled twice.

    Raises: UsageError for a precision or threads that are none; MissingError for a device that is not here, or one that
    computes in another precision; BundleError for a file that is no graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        artifact: Artifact,
        precision: str | None = None,
        threads: int = 0,
        device: str = "CPU",
        lanes: int | None = None,
    ):
        super().__init__(graph)
        if precision is not None and precision not in {*HINTS, *HINTS.values()}:
            raise UsageError(f"OpenVINO's precision is one of {', '.join(HINTS)}, got {precision!r}")
        cores = busy_cores(threads)
        count = wanted(bundle, graph, artifact, cores, lanes)
        with without_telemetry():
            import openvino
        core = openvino.Core()
        kind = device.partition(".")[0]
        # One GPU is called GPU, several are GPU.0 and so on; of those, GPU alone is the first.
        if kind not in PROCESSORS or not any(name == device or name.startswith(f"{device}.") for name in core.available_devices):
            raise MissingError(f"OpenVINO has no device {device!r} here; it has {', '.join(core.available_devices)}")
        narrow = (precision or artifact.precision) == "bf16"
        able = narrow and "BF16" in core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        if precision and narrow and not able:
            raise MissingError(f"this {core.get_property(device, 'FULL_DEVICE_NAME')} computes no bfloat16: use precision {EXACT}")
        precision = precision or ("bf16" if able else EXACT)
        hint = HINTS.get(precision, precision)
        path, names = str(bundle.file(artifact.path)), [spec.name for spec in graph.outputs]
        dynamic = kind == "CPU" and artifact.precision == "int8"

        def compiled(**more: Any) -> Requests:
            try:
                source = core.read_model(path) if dynamic else path
                if dynamic and (size := group(source)):
                    more = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": size} | more
                model = core.compile_model(source, device, properties(hint, kind, threads) | more)
            except Exception as error:  # RuntimeError, whatever went wrong
                raise BundleError(f"OpenVINO cannot open {path}: {error}") from error
            require_precision(model, precision, device)
            return Requests(model, names)

        self._models: tuple[Requests, ...] = (compiled(),)
        self._lanes: Lanes | None = None
        self._process = os.getpid()
        self.processor = PROCESSORS[kind]
        self.where = f"openvino {openvino.__version__.split('-')[0]} {device} {hint}"
        if kind == "CPU" and count > 1:
            streams = min(count, cores)
            whole, lane = self._models = *self._models, compiled(NUM_STREAMS=streams, INFERENCE_NUM_THREADS=streams)
            self._lanes = Lanes(graph, whole.run, lane.run, streams)
            self._lanes.choose(bundle.manifest, graph, lanes is not None)

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return (self._lanes or self._open()).run(feeds)

    def _several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        lanes = self._lanes
        return lanes.several(runs) if lanes else super()._several(runs)

    def _open(self) -> Requests:
        if not self._models:
            raise InferenceError("this session is closed")
        return self._models[0]

    def close(self) -> None:
        lanes, self._lanes = self._lanes, None
        if os.getpid() != self._process:
            for model in self._models:
                model.keep()
        elif lanes:
            lanes.close()
        self._models = ()


def properties(precision: str, kind: str = "CPU", threads: int = 0) -> dict[str, Any]:
    """What OpenVINO is told where it compiles a model for a `kind` of device: single answers soon, in this precision."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS.get(precision, precision), "PERFORMANCE_HINT": "LATENCY"}
    if kind == "CPU" and (threads := threads or thread_limit()):
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def group(model: Any) -> int | None:
    """How many values of a row are to share a scale where they meet matrices of bytes; None where there are none.

    A matrix whose rows are shorter would be multiplied in floats: those may be few.
    """
    values = Counter[int]()
    for inner, outer in _matrices(model):
        values[inner] += inner * outer
    fitting = (size for size in GROUPS if sum(count for inner, count in values.items() if inner < size) <= FEW * values.total())
    return next(fitting, None) if values else None


def _matrices(model: Any) -> Iterator[tuple[int, int]]:
    """The sizes of matrices that are held in int8, a column a scale, in loops, too."""
    for operation in model.get_ops():
        if operation.get_type_name() == "Loop":
            yield from _matrices(operation.get_function())
        elif operation.get_type_name() == "Constant" and operation.get_output_element_type(0).get_type_name() == "i8":
            users = {use.get_node().get_type_name() for use in operation.output(0).get_target_inputs()}
            if users == {"Convert"} and len(shape := tuple(operation.get_output_shape(0))) == 2:  # rows of a table are gathered before
                yield shape


def require_precision(model: Any, precision: str, device: str) -> None:
    """Raise MissingError where a compiled model computes in another precision than it was asked to, which OpenVINO passes over."""
    granted = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if granted != HINTS.get(precision, precision):
        own = next((name for name, hint in HINTS.items() if hint == granted), granted)
        raise MissingError(f"this {device} computes no {precision}, and OpenVINO would run it in {own}: use precision {own}")


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
