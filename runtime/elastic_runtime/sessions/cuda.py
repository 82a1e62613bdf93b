"""The few CUDA calls that a TensorRT session makes, through the vendor's own bindings (`pip install cuda-bindings`)."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from elastic_runtime.errors import InferenceError


class Cuda:
    """The CUDA runtime. Every method raises InferenceError naming the call that failed; handles are the bindings' own."""

    def __init__(self) -> None:
        self.runtime = importlib.import_module("cuda.bindings.runtime")

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self.runtime, name)(*arguments)
        if int(code) != 0:
            reason = self.runtime.cudaGetErrorString(code)[1]
            raise InferenceError(f"{name} failed: {reason.decode() if isinstance(reason, bytes) else reason}")
        return values[0] if values else None

    def current(self) -> int:
        """Index of this thread's device."""
        return int(self._call("cudaGetDevice"))

    def select(self, device: int) -> None:
        """Make a device this thread's: each thread begins with the first one, whatever another has selected."""
        self._call("cudaSetDevice", device)

    def device(self) -> tuple[int, str]:
        """Compute capability (89 for 8.9) and name of the current device."""
        index = self.current()
        attributes = self.runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, index)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, index)
        name = self._call("cudaGetDeviceProperties", index).name
        return 10 * major + minor, (name.decode() if isinstance(name, bytes) else str(name)).strip("\0")

    def allocate(self, size: int) -> int:
        """Device memory of at least `size` bytes."""
        try:
            return int(self._call("cudaMalloc", max(size, 1)))
        except InferenceError as error:
            try:
                free = f" ({self._call('cudaMemGetInfo') / 1e6:.0f} MB free)"
            except InferenceError:  # a device that has failed answers nothing more, and the first failure is the one to tell of
                free = ""
            raise InferenceError(f"the GPU has no room for {size / 1e6:.0f} MB{free}: {error}") from error

    def release(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def stream(self) -> Any:
        return self._call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def upload(self, pointer: int, array: np.ndarray, stream: Any) -> None:
        """Copy a contiguous array to the device; it must live until the stream is synchronized."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: np.ndarray, pointer: int, stream: Any) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, stream)

    @contextlib.contextmanager
    def capturing(self, stream: Any) -> Iterator[list[Any]]:
        """Record what the block enqueues on `stream`; the yielded list holds the executable graph afterwards."""
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        made: list[Any] = []
        try:
            yield made
        except BaseException:
            with contextlib.suppress(InferenceError):  # ends the capture; what went wrong inside is already on its way
                self._call("cudaStreamEndCapture", stream)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            made.append(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, executable: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", executable, stream)

    def destroy_executable(self, executable: Any) -> None:
        self._call("cudaGraphExecDestroy", executable)
