"""A stand-in for ONNX Runtime with CUDA built in, which keeps what it was asked for and computes nothing."""

import sys
from types import ModuleType
from typing import Any

import pytest

from elastic_runtime.sessions.ort import CPU, CUDA


class Library(ModuleType):
    """`up` are the providers that come up; `error` is what opening one that does not raises, or None where it is left out in silence."""

    __version__ = "1.31.1"

    def __init__(self, up: tuple[str, ...] = (CUDA, CPU), error: Exception | None = None):
        super().__init__("onnxruntime")
        self.up, self.error = up, error
        self.calls: list[str] = []
        self.providers: list[tuple[str, dict[str, Any]]] = []
        self.threads: int | None = None

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        self.calls.append("preload")
        print("Failed to load libcufft.so")  # as it does

    def SessionOptions(self) -> Any:  # noqa: N802
        return Options()

    def InferenceSession(self, path: str, settings: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        assert not enable_fallback
        self.calls.append("open")
        self.providers, self.threads = providers, settings.intra_op_num_threads
        if self.error and providers[0][0] not in self.up:
            raise self.error
        return Opened([*(name for name, _ in providers if name in self.up and name != CPU), CPU])  # which it adds by itself


class Options:
    intra_op_num_threads = 0

    def add_session_config_entry(self, name: str, value: str) -> None:
        """Nothing depends on it here."""


class Opened:
    def __init__(self, providers: list[str]):
        self._providers = providers

    def get_providers(self) -> list[str]:
        return self._providers


def install(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Library:
    library = Library(**changes)
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return library
