"""TensorRT and TensorRT-RTX: one engine, an execution context a profile, a CUDA graph for the shape that is hot.

What users of the library met before shapes this file: contexts share scratch memory but never a profile; a context's
CUDA graph is captured again whenever its shapes change, after one plain run at the new shapes
(https://github.com/NVIDIA/TensorRT issues 2648 and 3798); buffers are allocated once, at the largest profile, so that
no captured address goes stale.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph, Profile, TrtArtifact, open_sizes
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.device import PACKAGES, Processor
from elastic_runtime.errors import BundleError, InferenceError, MissingError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.cuda import Cuda
from elastic_runtime.sessions.kernels import KernelCache
from elastic_runtime.sessions.session import Arrays, Session

# GPU generations that TensorRT-RTX builds for (`ComputeCapability` of 1.7); full TensorRT builds for the GPU that it
# runs on.
RTX_SMS = (75, 80, 86, 89, 120, 121)
HOST_CODE = "ELASTIC_TRT_HOST_CODE"  # environment: engines with code of their own may run it
_own: set[str] = set()  # SHA-256 of those that this process built
_log = logging.getLogger(__name__)


def built(sha256: str) -> None:
    """Tell of an engine that this process built, whose host code is thus the installed library's."""
    _own.add(sha256)


def gpu() -> tuple[int | None, str]:
    """Compute capability of the GPU here (89 for 8.9) and its name, or None and why there is none."""
    try:
        return Cuda().device()
    except ImportError:
        return None, "the CUDA bindings are not installed (pip install cuda-bindings)"
    except InferenceError as error:
        return None, f"there is no CUDA device here ({error})"


def obstacle(artifact: Artifact) -> str | None:
    """Why the engine cannot run here, or None: its GPU generation, its library and the version of that must all be
    here.
    """
    assert isinstance(artifact, TrtArtifact)
    whose = f"the engine is for sm {', '.join(map(str, artifact.sms))} and {artifact.builder} {artifact.builder_version}"
    sm, name = gpu()
    if sm is None:
        return f"{whose}, and {name}."
    if sm not in artifact.sms:
        way = f"elastic-export trt BUNDLE --sm {sm}"
        if sm not in RTX_SMS:
            full = PACKAGES["tensorrt"]
            way = f"elastic-export trt BUNDLE --builder tensorrt (TensorRT-RTX is not for it: pip install 'elastic-export[{full.extra}]')"
        return f"{whose}, and this GPU is an sm {sm} ({name}). Add an engine for it with: {way}"
    package = PACKAGES[artifact.builder.replace("_", "-")]
    try:
        version = str(importlib.import_module(artifact.builder).__version__)
    except (ImportError, OSError) as error:
        return f"{whose}, and {package.name} is not installed ({error}): pip install 'elastic-export[{package.extra}]'"
    if not _opens(artifact, version):
        return (
            f"{whose}, and here is {version}. Install that version (pip install {package.name}=={artifact.builder_version}) "
            "or add an engine for this one with: elastic-export trt BUNDLE"
        )
    if artifact.version_compatible and not _allowed() and not {file.sha256 for file in artifact.files} <= _own:
        return (
            f"{whose}, and brings a runtime of its own (--version-compatible), native code that would run with your rights: set "
            f"{HOST_CODE}=1 if you trust who built it, or build one without: elastic-export trt BUNDLE --overwrite"
        )
    return None


def _allowed() -> bool:
    """Whether the user lets engines run code of their own."""
    return os.environ.get(HOST_CODE) == "1"


def _opens(artifact: TrtArtifact, version: str) -> bool:
    """Whether version `found` of the builder's library opens the engine."""
    if not artifact.version_compatible:
        return version == artifact.builder_version
    installed, built = ([int(part) for part in words.split(".")[:3]] for words in (version, artifact.builder_version))
    return installed[0] == built[0] and installed >= built


@dataclass
class _Slot:
    """An execution context bound to one profile. `shapes` is what it is set to, `executable` the CUDA graph captured
    there.
    """

    context: Any
    shapes: tuple[tuple[int, ...], ...] = ()
    state: tuple[object, ...] = ()
    executable: Any = None
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


class TrtSession(Session):
    """An engine on this machine's GPU. Threads run it one after the other: they would share its buffers, its stream and
    its contexts.

    `cuda_graphs` captures a graph at the second run in a row of a profile at the same shapes; `weight_streaming_bytes`
    is how much of a weight-streaming engine's weights may stay on the GPU (by default what the library thinks best).
    Inputs run at their own shapes, in the smallest profile that contains them; nothing is padded.

    Raises: InferenceError where the GPU has too little memory; BundleError where the library refuses the engine;
    MissingError for `weight_streaming_bytes` of an engine that was not built for it.
    """

    processor: Processor = "gpu"
    _resources: contextlib.ExitStack | None = None  # None before it is open and after it is closed

    def __init__(
        self, bundle: Bundle, graph: Graph, artifact: TrtArtifact, cuda_graphs: bool = True, weight_streaming_bytes: int | None = None
    ):
        spans = {name: Span(*_ends(artifact.profiles, name)) for name in graph.dimensions}
        batch = spans.pop("B", None)
        super().__init__(graph, batch, spans={name: span for name, span in spans.items() if span != graph.dimensions[name]})
        if weight_streaming_bytes is not None and not artifact.weight_streaming:
            raise MissingError(f"{artifact.path} does not stream weights; build it with: elastic-export trt BUNDLE --weight-streaming")
        self._profiles = artifact.profiles
        self._library = importlib.import_module(artifact.builder)
        self._graphs = cuda_graphs
        self._slots: dict[int, _Slot] = {}
        self._kernels = KernelCache(next(file.sha256 for file in artifact.files if file.path == artifact.path))
        self._cuda = Cuda()
        self._lock = threading.Lock()
        self._device = self._cuda.current()
        with contextlib.ExitStack() as opening:
            self._stream = self._cuda.stream()
            opening.callback(self._cuda.destroy_stream, self._stream)
            self._engine = self._load(bundle, artifact)
            if artifact.weight_streaming:
                budget = (
                    weight_streaming_bytes if weight_streaming_bytes is not None else self._engine.get_weight_streaming_automatic_budget()
                )
                self._engine.weight_streaming_budget_v2 = budget
            self._scratch_size = int(self._engine.device_memory_size_v2)
            self._scratch = self._allocate(opening, self._scratch_size)
            self._buffers = {spec.name: self._allocate(opening, self._largest(spec.name)) for spec in (*graph.inputs, *graph.outputs)}
            opening.callback(self._clear)  # called first: nothing may use the memory that the others release
            self._resources = opening.pop_all()
        sm, name = self._cuda.device()
        self.where = f"{artifact.builder} {artifact.builder_version} on {name} (sm{sm})"

    def _allocate(self, opening: contextlib.ExitStack, size: int) -> int:
        pointer = self._cuda.allocate(size)
        opening.callback(self._cuda.release, pointer)
        return pointer

    def _largest(self, name: str) -> int:
        """Bytes of a tensor at the largest of the profiles."""
        spec = next(spec for spec in (*self.graph.inputs, *self.graph.outputs) if spec.name == name)
        return max(int(np.prod(profile.shape(spec, "max"))) for profile in self._profiles) * np.dtype(spec.dtype).itemsize

    def _load(self, bundle: Bundle, artifact: TrtArtifact) -> Any:
        """Deserialize the engine and, where it was stripped, give it the weights of its ONNX file."""
        path = bundle.file(artifact.path)
        self._logger = make_logger(self._library)
        self._runtime = self._library.Runtime(self._logger)  # outlives the engine
        content = path.read_bytes()
        # Such an engine brings its own lean runtime; what the manifest says of the file is not what is in it.
        if artifact.version_compatible and (_allowed() or hashlib.sha256(content).hexdigest() in _own):
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BundleError(
                f"{artifact.builder} cannot open {path}: {self._reason()}. Build it again with: elastic-export trt {bundle.folder}"
            )
        if artifact.stripped:
            onnx = next((file for file in bundle.manifest.files() if file.path == artifact.source), None)
            if onnx is None or onnx.sha256 != artifact.source_sha256:
                raise BundleError(
                    f"{path} takes its weights from {artifact.source}, which is not the file that it was built from: build it again with "
                    f"elastic-export trt {bundle.folder} --strip"
                )
            refitter = self._library.Refitter(engine, self._logger)
            parser = self._library.OnnxParserRefitter(refitter, self._logger)
            if not parser.refit_from_file(str(bundle.file(artifact.source))) or not refitter.refit_cuda_engine():
                raise BundleError(f"{path} cannot take its weights from {artifact.source}: {self._reason()}")
        return engine

    def _reason(self) -> str:
        return self._logger.errors[-1] if self._logger.errors else "no reason given"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        # Contiguous, and still 0-d where it was: np.ascontiguousarray would make it 1-d.
        arrays = {spec.name: np.asarray(feeds[spec.name], order="C") for spec in self.graph.inputs}
        with self._lock:
            if self._resources is None:
                raise InferenceError("this session is closed")
            self._cuda.select(self._device)
            try:
                return self._compute(arrays)
            except BaseException:
                with contextlib.suppress(InferenceError):  # what was enqueued still reads arrays that are about to go
                    self._cuda.synchronize(self._stream)
                raise

    def _compute(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        slot = self._slot(self._profile(arrays))
        self._reshape(slot, arrays)
        for name, array in arrays.items():
            self._cuda.upload(self._buffers[name], array, self._stream)
        # A captured loop may hold its trip count, so a 0-d input counts as part of the shape.
        self._execute(slot, (slot.shapes, tuple(int(array) for array in arrays.values() if array.ndim == 0)))
        results = {spec.name: np.empty(slot.outputs[spec.name], dtype=spec.dtype) for spec in self.graph.outputs}
        for name, array in results.items():
            self._cuda.download(array, self._buffers[name], self._stream)
        self._cuda.synchronize(self._stream)
        return results

    def _profile(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Index of the smallest profile that contains the arrays' shapes."""
        sizes = open_sizes(self.graph.inputs, arrays)
        fitting = [i for i, profile in enumerate(self._profiles) if profile.contains(sizes)]
        if not fitting:
            raise InferenceError(f"no profile of this engine takes {_sizes(sizes)}; there are {'; '.join(map(_ranges, self._profiles))}")
        return min(fitting, key=lambda i: np.prod([size.max for size in self._profiles[i].dimensions.values()], dtype=np.int64))

    def _slot(self, index: int) -> _Slot:
        """The context of a profile, made when it is first needed."""
        if index in self._slots:
            return self._slots[index]
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self._library, "DynamicShapesKernelSpecializationStrategy"):
            # RTX compiles kernels for a shape at run time. Eagerly: a graph captured meanwhile would keep the slow
            # stand-ins.
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = self._library.DynamicShapesKernelSpecializationStrategy.EAGER
            self._kernels.attach(config)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(index, int(self._stream)):
            raise InferenceError(f"no execution context for profile {index}: {self._reason()}")
        context.set_device_memory(self._scratch, self._scratch_size)
        for name, pointer in self._buffers.items():
            if not context.set_tensor_address(name, pointer):
                raise InferenceError(
                    f"the engine has no tensor {name!r}, so it is not of this graph. Build it again with: elastic-export trt BUNDLE"
                )
        return self._slots.setdefault(index, _Slot(context))

    def _reshape(self, slot: _Slot, arrays: Mapping[str, np.ndarray]) -> None:
        shapes = tuple(array.shape for array in arrays.values())
        if slot.shapes == shapes:
            return
        self._drop(slot)
        slot.shapes = ()
        for name, array in arrays.items():
            if not slot.context.set_input_shape(name, array.shape):
                raise InferenceError(f"the engine refuses {name} of shape {array.shape}: {self._reason()}")
        slot.outputs = {spec.name: tuple(slot.context.get_tensor_shape(spec.name)) for spec in self.graph.outputs}
        slot.shapes = shapes

    def _execute(self, slot: _Slot, state: tuple[object, ...]) -> None:
        """Run once: through the captured graph where it still holds, else plainly, capturing at the second run in a
        row.
        """
        if slot.state != state:
            self._drop(slot)
            slot.state = state
        elif self._graphs and slot.executable is None:
            self._capture(slot)
        if slot.executable is not None:
            self._cuda.launch(slot.executable, self._stream)
        else:
            self._enqueue(slot)

    def _enqueue(self, slot: _Slot) -> None:
        if not slot.context.execute_async_v3(int(self._stream)):
            raise InferenceError(f"the engine failed to run: {self._reason()}")

    def _capture(self, slot: _Slot) -> None:
        """Capture a CUDA graph; an engine that cannot be captured runs without graphs from then on, and the log says
        so.
        """
        capturable = getattr(slot.context, "is_stream_capturable", None)  # TensorRT-RTX alone can tell beforehand
        try:
            if capturable is not None and not capturable(int(self._stream)):
                raise InferenceError("the library says that it cannot be captured")
            with self._cuda.capturing(self._stream) as made:
                self._enqueue(slot)
            slot.executable = made[0]
        except InferenceError as error:
            self._graphs = False
            self.where += ", without CUDA graphs"
            _log.warning("%s: %s", self.where, error)

    def _drop(self, slot: _Slot) -> None:
        if slot.executable is not None:
            executable, slot.executable = slot.executable, None
            self._cuda.destroy_executable(executable)

    def _clear(self) -> None:
        """Let go of graphs, contexts, engine and runtime, in this order."""
        for slot in self._slots.values():
            self._drop(slot)
        self._slots.clear()
        self._engine = None
        self._runtime = None

    def close(self) -> None:
        with self._lock:
            if self._resources is None:
                return
            resources, self._resources = self._resources, None
            self._kernels.keep()
            try:
                self._cuda.select(self._device)
                self._cuda.synchronize(self._stream)
            except InferenceError:
                with contextlib.suppress(InferenceError):  # released all the same; the first failure is the one to tell of
                    resources.close()
                raise
            resources.close()


def make_logger(library: Any) -> Any:
    """A TensorRT logger that passes messages on to `logging` and keeps the errors in `errors`; builders use it too."""

    class Logger(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.Logger.ERROR:
                self.errors.append(message)
            _log.log(logging.INFO if severity <= library.Logger.WARNING else logging.DEBUG, "%s", message)

    return Logger()


def _ends(profiles: Sequence[Profile], name: str) -> tuple[int, int]:
    """The least and the largest size of an open dimension in any profile, which have none between them that is in no profile."""
    ranges = [profile.dimensions[name] for profile in profiles]
    return min(each.min for each in ranges), max(each.max for each in ranges)


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{letter}={size}" for letter, size in sizes.items())


def _ranges(profile: Profile) -> str:
    return ", ".join(f"{letter} {size.min}-{size.max}" for letter, size in profile.dimensions.items())


BACKEND = Backend(name="trt", aliases=("tensorrt",), opens=("trt",), obstacle=obstacle, open=TrtSession, ways={"trt": Way("gpu")})
