"""Stand-ins for TensorRT and the CUDA bindings that keep every call, in order, and compute nothing but `output = sample + 1`; of an
engine in two the one gives `modulation = (timestep, timestep)`, and the other adds the first of these.

`install(monkeypatch, ...)` puts them where the session imports the real ones from. The fake device has memory: uploads,
runs and downloads go through it, so that a run with a stale shape or a freed buffer shows.
"""

import ctypes
import types
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import pytest

Call = tuple[Any, ...]


class Gpu:
    """The device: `calls` in order, `memory` by pointer. `capturing` collects what is enqueued instead of running it."""

    def __init__(self, sm: int, tensors: set[str]):
        self.sm, self.tensors = sm, tensors
        self.calls: list[Call] = []
        self.memory: dict[int, bytearray] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.handles = iter(range(1000, 10_000_000, 1000))
        self.capturable = True
        self.failing: set[str] = set()  # CUDA calls, by their names, that answer with an error
        self.enqueues = True

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def named(self, *names: str) -> list[Call]:
        """The calls of these names, in order."""
        return [call for call in self.calls if call[0] in names]


class _Code(IntEnum):
    SUCCESS = 0
    BAD = 1


def cuda_runtime(gpu: Gpu) -> types.ModuleType:
    module: Any = types.ModuleType("cuda.bindings.runtime")
    ok = _Code.SUCCESS

    def malloc(size: int) -> tuple[Any, int]:
        pointer = next(gpu.handles)
        gpu.memory[pointer] = bytearray(size)
        gpu.note("malloc", pointer, size)
        return ok, pointer

    def free(pointer: int) -> tuple[Any]:
        gpu.note("free", pointer)
        return (ok if gpu.memory.pop(pointer, None) is not None else _Code.BAD,)

    def memcpy(target: int, source: int, size: int, kind: str, stream: int) -> tuple[Any]:
        gpu.note(kind, size)
        if kind == "upload":
            gpu.memory[target][:size] = ctypes.string_at(source, size)
        else:
            ctypes.memmove(target, bytes(gpu.memory[source][:size]), size)
        return (ok,)

    def end_capture(stream: int) -> tuple[Any, Any]:
        handle, gpu.capturing, recorded = next(gpu.handles), None, gpu.capturing
        gpu.note("end_capture")
        if not gpu.capturable:
            return _Code.BAD, None
        assert recorded is not None
        gpu.graphs[handle] = recorded
        return ok, handle

    def begin_capture(stream: int, mode: Any) -> tuple[Any]:
        gpu.note("begin_capture")
        gpu.capturing = []
        return (ok,)

    def launch(handle: int, stream: int) -> tuple[Any]:
        gpu.note("launch", handle)
        for work in gpu.graphs[handle]:
            work()
        return (ok,)

    def done(name: str) -> Callable[..., tuple[Any]]:
        def call(*arguments: Any) -> tuple[Any]:
            gpu.note(name, *arguments)
            return (ok,)

        return call

    module.cudaGetErrorString = lambda code: (ok, b"no reason")
    module.cudaGetDevice, module.cudaSetDevice = lambda: (ok, 0), done("set_device")
    module.cudaDeviceAttr = types.SimpleNamespace(cudaDevAttrComputeCapabilityMajor=1, cudaDevAttrComputeCapabilityMinor=2)
    module.cudaDeviceGetAttribute = lambda which, device: (ok, gpu.sm // 10 if which == 1 else gpu.sm % 10)
    module.cudaGetDeviceProperties = lambda device: (ok, types.SimpleNamespace(name=b"Fake GPU\0"))
    module.cudaMalloc, module.cudaFree, module.cudaMemcpyAsync = malloc, free, memcpy
    module.cudaMemGetInfo = lambda: (ok, 1_000_000, 2_000_000)
    module.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice="upload", cudaMemcpyDeviceToHost="download")
    module.cudaStreamNonBlocking = 1
    module.cudaStreamCreateWithFlags = lambda flags: (ok, 7)
    module.cudaStreamSynchronize, module.cudaStreamDestroy = done("synchronize"), done("destroy_stream")
    module.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
    module.cudaStreamBeginCapture, module.cudaStreamEndCapture = begin_capture, end_capture
    module.cudaGraphInstantiate = lambda graph, flags: (ok, graph)
    module.cudaGraphDestroy, module.cudaGraphExecDestroy = done("destroy_graph"), done("destroy_executable")
    module.cudaGraphLaunch = launch

    def able(name: str, call: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        return lambda *arguments: (_Code.BAD, None) if name in gpu.failing else call(*arguments)

    for name in ("cudaMalloc", "cudaFree", "cudaMemGetInfo", "cudaStreamSynchronize"):
        setattr(module, name, able(name, getattr(module, name)))
    return module


class _Context:
    def __init__(self, gpu: Gpu):
        self.gpu, self.shapes, self.addresses, self.profile = gpu, {}, {}, None  # type: ignore[var-annotated]

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.gpu.note("set_profile", index)
        self.profile = index
        return True

    def set_device_memory(self, pointer: int, size: int) -> None:
        self.gpu.note("set_device_memory", pointer, size)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return name in self.gpu.tensors

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.gpu.note("set_input_shape", self.profile, name, tuple(shape))
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes["sample"]) if "sample" in self.shapes else (*self.shapes["timestep"], 2)

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.gpu.note("execute", self.profile, "captured" if self.gpu.capturing is not None else "plain")
        if not self.gpu.enqueues:
            return False
        shapes = dict(self.shapes)

        def given(name: str) -> np.ndarray:
            count = int(np.prod(shapes[name]))
            return np.frombuffer(bytes(self.gpu.memory[self.addresses[name]][: 4 * count]), np.float32).reshape(shapes[name])

        def work() -> None:
            name = "prediction" if "sample" in shapes else "modulation"
            if name == "modulation":
                answer = np.stack([given("timestep")] * 2, axis=1)
            else:
                answer = given("sample") + 1
                if "modulation" in shapes:
                    answer = answer + given("modulation")[:, :1, None, None]
            self.gpu.memory[self.addresses[name]][: answer.nbytes] = answer.tobytes()

        if self.gpu.capturing is not None:
            self.gpu.capturing.append(work)
        else:
            work()
        return True


class RuntimeCache:
    """Kernels of this GPU: what was compiled on another is refused."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def serialize(self) -> bytes:
        return f"kernels of sm {self.gpu.sm}".encode()

    def deserialize(self, content: bytes) -> bool:
        self.gpu.note("deserialize_kernels", content)
        return content == self.serialize()


class _Engine:
    device_memory_size_v2 = 4096

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    weight_streaming_budget_v2 = property(fset=lambda self, size: self.gpu.note("weight_budget", size))

    def get_weight_streaming_automatic_budget(self) -> int:
        return 123

    def create_runtime_config(self) -> Any:
        self.gpu.note("create_runtime_config")
        return types.SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: self.gpu.note("strategy", strategy),
            create_runtime_cache=lambda: RuntimeCache(self.gpu),
            set_runtime_cache=lambda cache: self.gpu.note("set_runtime_cache", id(cache)),
        )

    def create_execution_context(self, how: Any) -> _Context:
        self.gpu.note("create_context", how if isinstance(how, str) else how.dynamic_shapes_kernel_specialization_strategy)
        return _Context(self.gpu)

    def __del__(self) -> None:
        self.gpu.note("engine_gone")


def tensorrt(gpu: Gpu, name: str, version: str) -> types.ModuleType:
    module: Any = types.ModuleType(name)
    module.__version__ = version

    class Runtime:
        def __init__(self, logger: Any):
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            gpu.note("deserialize", len(content))
            if content.startswith(b"damaged"):
                self.logger.log(1, "the magic tag does not match")
                return None
            return _Engine(gpu)

    class Refit:
        def __init__(self, *_: Any):
            pass

        def refit_from_file(self, path: str) -> bool:
            gpu.note("refit_from_file", path.rsplit("/", 1)[-1])
            return True

        def refit_cuda_engine(self) -> bool:
            gpu.note("refit_engine")
            return True

    module.Runtime, module.Refitter, module.OnnxParserRefitter = Runtime, Refit, Refit
    module.ILogger = type("ILogger", (), {"__init__": lambda self: None})
    module.Logger = types.SimpleNamespace(ERROR=1, WARNING=2)
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    if name == "tensorrt_rtx":
        module.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
    return module


def install(monkeypatch: pytest.MonkeyPatch, sm: int = 89, name: str = "tensorrt_rtx", version: str = "1.7.1.116") -> Gpu:
    """A machine with this GPU and this version of the library; returns the GPU, whose `calls` tell what was done."""
    import sys

    gpu = Gpu(sm, {"sample", "timestep", "class_labels", "latent_ids", "loops", "modulation", "prediction"})
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda_runtime(gpu))
    monkeypatch.setitem(sys.modules, name, tensorrt(gpu, name, version))
    return gpu
