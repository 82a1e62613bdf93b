"""What Windows tells of memory and processor: three calls of its kernel and one key of its registry, no package and no command.

Not run on a Windows yet: the calls are those of its documentation, and run against stand-ins.
"""

import ctypes
import sys
from typing import Any

import msgspec

# IsProcessorFeaturePresent's numbers, widest first.
FEATURES = ((41, "AVX-512"), (40, "AVX2"), (39, "AVX"), (19, "Neon"))
THIS = ctypes.c_void_p(-1)  # what GetCurrentProcess gives
PROCESSOR = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, MHz, and the widest vector unit that the system lets programs use. None is what it did not tell."""

    memory_total: int | None = None
    memory_available: int | None = None
    vector: str | None = None
    model: str | None = None
    mhz: float | None = None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64)
        for name in ("total", "available", "page_total", "page_available", "virtual_total", "virtual_available", "extended")
    ]


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of memory that this process has, and the most that it has had."""

    resident: int
    peak: int


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = [("length", ctypes.c_uint32), ("faults", ctypes.c_uint32)] + [
        (name, ctypes.c_size_t)
        for name in ("peak", "resident", "peak_paged", "paged", "peak_nonpaged", "nonpaged", "pagefile", "peak_pagefile")
    ]


def process(kernel: Any = None) -> Process | None:
    """This process's memory; None where the system does not tell. `kernel` stands in for kernel32."""
    kernel = kernel or _kernel()
    memory = _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    if kernel is None or not kernel.K32GetProcessMemoryInfo(THIS, ctypes.byref(memory), ctypes.c_uint32(memory.length)):
        return None
    return Process(resident=memory.resident, peak=memory.peak)


def _kernel() -> Any:
    return ctypes.CDLL("kernel32") if sys.platform == "win32" else None


def read(kernel: Any = None, registry: Any = None) -> Reading:
    """This machine's reading; `kernel` and `registry` stand in for kernel32 and winreg."""
    kernel = kernel or _kernel()
    memory = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    known = kernel is not None and bool(kernel.GlobalMemoryStatusEx(ctypes.byref(memory)))
    vector = next((name for number, name in FEATURES if kernel is not None and kernel.IsProcessorFeaturePresent(number)), None)
    model, mhz = _processor(registry)
    return Reading(
        memory_total=memory.total if known else None,
        memory_available=memory.available if known else None,
        vector=vector,
        model=model,
        mhz=mhz,
    )


def _processor(registry: Any) -> tuple[str | None, float | None]:
    """The processor's name and its clock in MHz."""
    if registry is None:
        try:
            import winreg as registry
        except ModuleNotFoundError:
            return None, None
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, PROCESSOR) as key:
            name, mhz = (registry.QueryValueEx(key, value)[0] for value in ("ProcessorNameString", "~MHz"))
    except OSError:
        return None, None
    return str(name).strip(), float(mhz)
