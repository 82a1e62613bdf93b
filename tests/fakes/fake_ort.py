"""A stand-in for ONNX Runtime with CUDA built in, which keeps what it was asked for, computes the sum of what it is fed, and has the
library's rules of CUDA graphs: a graph is captured by the first run of its number on a thread, while no other thread opens a session, and
answers from the arrays that were bound to it.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from elastic_runtime.sessions.ort import CPU, CUDA


class Value:
    """An array on the device; `numpy` copies it back."""

    def __init__(self, array: np.ndarray):
        self.array = array.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype), "the library would refuse it"
        self.array[...] = array

    def numpy(self) -> np.ndarray:
        return self.array.copy()

    @staticmethod
    def ortvalue_from_numpy(array: np.ndarray, device: str, number: int) -> "Value":
        assert (device, number) == ("cuda", 0)
        return Value(array)

    @staticmethod
    def ortvalue_from_shape_and_type(shape: tuple[int, ...], dtype: type, device: str, number: int) -> "Value":
        return Value(np.full(shape, np.nan, dtype))


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[str, Value] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self.outputs[name] = value


class RunOptions:
    graph = ""

    def add_run_config_entry(self, name: str, value: str) -> None:
        assert name == "gpu_graph_id"
        self.graph = value


class Library(ModuleType):
    """`up` are the providers that come up; `error` is what opening one that does not raises, or None where it is left out in silence.

    `uncapturable` says when a model shows that it cannot be captured: as it is `opened`, or as it is `captured`.
    """

    __version__ = "1.31.1"

    def __init__(self, up: tuple[str, ...] = (CUDA, CPU), error: Exception | None = None, uncapturable: str | None = None):
        super().__init__("onnxruntime")
        self.up, self.error, self.uncapturable = up, error, uncapturable
        self.runs: list[str] = []
        self.opening: Callable[[], None] = lambda: None
        self.busy = 0
        self.calls: list[str] = []
        self.opened: list[weakref.ref[Opened]] = []
        self.providers: list[tuple[str, dict[str, Any]]] = []
        self.threads: int | None = None

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def set_default_logger_severity(self, level: int) -> None:
        assert level == 3, "errors are still told"

    def preload_dlls(self) -> None:
        self.calls.append("preload")
        print("Failed to load libcufft.so")  # as it does

    OrtValue = Value

    def RunOptions(self) -> Any:  # noqa: N802
        return RunOptions()

    def SessionOptions(self) -> Any:  # noqa: N802
        return Options()

    def InferenceSession(self, path: str, settings: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        assert not enable_fallback
        self.calls.append("open")
        self.busy += 1
        self.opening()
        self.busy -= 1
        self.providers, self.threads = providers, settings.intra_op_num_threads
        if self.error and providers[0][0] not in self.up:
            raise self.error
        captures = bool(providers[0][1].get("enable_cuda_graph"))
        if captures and self.uncapturable == "opened":
            raise RuntimeError("the model has control flow nodes which can't be supported by CUDA Graphs")
        up = [*(name for name, _ in providers if name in self.up and name != CPU), CPU]  # which it adds by itself
        opened = Opened(self, captures, up)
        self.opened.append(weakref.ref(opened))
        return opened


class Options:
    intra_op_num_threads = 0

    def add_session_config_entry(self, name: str, value: str) -> None:
        """Nothing depends on it here."""


class Opened:
    def __init__(self, library: Library, captures: bool, providers: list[str]):
        self._library, self._captures, self._providers = library, captures, providers
        self._graphs: dict[tuple[int, str], Binding] = {}

    def get_providers(self) -> list[str]:
        return self._providers

    def run(self, names: list[str], feeds: dict[str, np.ndarray], options: RunOptions | None = None) -> list[np.ndarray]:
        assert not self._captures or (options and options.graph == "-1"), "an unbound run would be captured"
        self._library.runs.append("plain")
        return [self._answer(feeds) for _ in names]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        assert self._captures
        if self._library.uncapturable == "captured":
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        graph = threading.get_ident(), options.graph
        assert graph in self._graphs or not self._library.busy, "operation not permitted when stream is capturing"
        self._library.runs.append("replay" if graph in self._graphs else "capture")
        bound = self._graphs.setdefault(graph, binding)
        for value in bound.outputs.values():
            value.array[...] = self._answer({name: value.array for name, value in bound.inputs.items()})

    def _answer(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """The fakes' denoiser: the sample and the sum of everything else."""
        return feeds["sample"] + np.float32(sum(array.sum() for name, array in feeds.items() if name != "sample"))


def install(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Library:
    library = Library(**changes)
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return library
