"""What Windows tells, from stand-ins for its kernel and registry."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_runtime.device import windows


class Kernel:
    def __init__(self, features: set[int], fails: bool = False):
        self.features, self.fails = features, fails

    def GlobalMemoryStatusEx(self, pointer: Any) -> int:  # noqa: N802
        status = pointer._obj
        assert status.length == 64 == ctypes.sizeof(status), "the system refuses another size"
        status.total, status.available = 16 << 30, 5 << 30
        return int(not self.fails)

    def K32GetProcessMemoryInfo(self, process: Any, pointer: Any, length: Any) -> int:  # noqa: N802
        memory = pointer._obj
        assert process.value == ctypes.c_void_p(-1).value, "this process"
        assert memory.length == length.value == ctypes.sizeof(memory) == 8 + 8 * ctypes.sizeof(ctypes.c_size_t)
        memory.peak, memory.resident = 3 << 30, 2 << 30
        return int(not self.fails)

    def IsProcessorFeaturePresent(self, number: int) -> int:  # noqa: N802
        return int(number in self.features)


class Registry:
    HKEY_LOCAL_MACHINE = 1

    @contextlib.contextmanager
    def OpenKey(self, root: int, path: str) -> Iterator[str]:  # noqa: N802
        assert (root, path) == (1, windows.PROCESSOR)
        yield path

    def QueryValueEx(self, key: str, name: str) -> tuple[Any, int]:  # noqa: N802
        return {"ProcessorNameString": "AMD Ryzen 7 7840U  ", "~MHz": 3300}[name], 0


@pytest.mark.parametrize(
    ("features", "vector"), [({39, 40, 41}, "AVX-512"), ({39, 40}, "AVX2"), ({39}, "AVX"), ({19}, "Neon"), (set(), None)]
)
def test_memory_processor_and_vector_unit(features: set[int], vector: str | None) -> None:
    reading = windows.read(Kernel(features), Registry())
    assert reading == windows.Reading(memory_total=16 << 30, memory_available=5 << 30, vector=vector, model="AMD Ryzen 7 7840U", mhz=3300.0)


def test_what_is_not_told_is_none() -> None:
    class Closed(Registry):
        @contextlib.contextmanager
        def OpenKey(self, root: int, path: str) -> Iterator[str]:  # noqa: N802
            raise OSError("access is denied")
            yield path

    assert windows.read(Kernel(set(), fails=True), Closed()) == windows.Reading()


def test_the_memory_of_this_process() -> None:
    assert windows.process(Kernel(set())) == windows.Process(resident=2 << 30, peak=3 << 30)
    assert windows.process(Kernel(set(), fails=True)) is None


@pytest.mark.skipif(sys.platform == "win32", reason="this is a Windows")
def test_there_is_nothing_to_read_elsewhere() -> None:
    assert windows.read() == windows.Reading()
    assert windows.process() is None
