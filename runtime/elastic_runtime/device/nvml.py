"""What the NVIDIA driver says of its GPUs, through NVML, the library that comes with it: no CUDA context, no package."""

import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import Any

import msgspec

SM_CLOCK, MEMORY_CLOCK = 1, 2  # nvmlClockType_t
FLOPS_PER_CORE = 2  # a multiply-add a clock
TRANSFERS_PER_CLOCK = 2  # NVML tells half the rate of GDDR and HBM
NO_GPU = "the NVIDIA driver sees no GPU"


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as NVML tells it: bytes, MHz, milliwatts, bits. None is what this GPU does not support (a Jetson's memory, say)."""

    name: str
    driver: str
    memory_total: int | None = None
    memory_free: int | None = None
    compute_capability: tuple[int, int] | None = None
    power_limit: int | None = None
    sm_clock: int | None = None
    memory_clock: int | None = None
    bus_width: int | None = None
    cores: int | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that bus and clock come to."""
        if not self.memory_clock or not self.bus_width:
            return None
        return self.memory_clock * 1e6 * TRANSFERS_PER_CLOCK * self.bus_width / 8

    @property
    def fp32_flops(self) -> float | None:
        """Float32 operations a second of all cores at the highest clock, without tensor cores."""
        return self.cores * FLOPS_PER_CORE * self.sm_clock * 1e6 if self.cores and self.sm_clock else None


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def read_gpus(load: Callable[[], Any] | None = None) -> tuple[Reading, ...] | str:
    """One reading a GPU, or why there are none. `load` gives the library (default: the system's)."""
    library = _open(load)
    if isinstance(library, str):
        return library
    try:
        count = _number(library.nvmlDeviceGetCount_v2) or 0
        driver = _words(library.nvmlSystemGetDriverVersion) or "unknown"
        return tuple(_read(library, index, driver) for index in range(count)) or NO_GPU
    finally:
        library.nvmlShutdown()


def energy(load: Callable[[], Any] | None = None) -> Callable[[], float] | str:
    """A counter of the first GPU's energy, joules since its driver was loaded, or why there is none."""
    library = _open(load)
    if isinstance(library, str):
        return library
    device, millijoules = _handle(library, 0), ctypes.c_ulonglong()
    if device is None:
        return NO_GPU
    if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) != 0:
        return "the GPU counts no energy (before Volta)"

    def read() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read


def _open(load: Callable[[], Any] | None) -> Any:
    """The library, ready to be asked, or why it is not."""
    try:
        library = (load or _library)()
    except OSError:
        return "there is no NVIDIA driver"
    if library.nvmlInit_v2() != 0:
        return "there is an NVIDIA driver, but it does not answer (nvmlInit failed): is the GPU visible here?"
    return library


def _library() -> Any:
    if os.name == "nt":
        return ctypes.CDLL("nvml.dll")
    return ctypes.CDLL("libnvidia-ml.so.1")


def _read(library: Any, index: int, driver: str) -> Reading:
    handle = _handle(library, index)
    if handle is None:
        return Reading(name=f"GPU {index}, which the driver does not open", driver=driver)
    memory = _Memory()
    known = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0 and memory.total > 0
    major, minor = ctypes.c_int(), ctypes.c_int()
    capable = library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    return Reading(
        name=_words(library.nvmlDeviceGetName, handle) or f"GPU {index}",
        driver=driver,
        memory_total=memory.total if known else None,
        memory_free=memory.free if known else None,
        compute_capability=(major.value, minor.value) if capable else None,
        power_limit=_number(library.nvmlDeviceGetEnforcedPowerLimit, handle),
        sm_clock=_number(library.nvmlDeviceGetMaxClockInfo, handle, ctypes.c_int(SM_CLOCK)),
        memory_clock=_number(library.nvmlDeviceGetMaxClockInfo, handle, ctypes.c_int(MEMORY_CLOCK)),
        bus_width=_optional(library, "nvmlDeviceGetMemoryBusWidth", handle),
        cores=_optional(library, "nvmlDeviceGetNumGpuCores", handle),
    )


def _handle(library: Any, index: int) -> ctypes.c_void_p | None:
    handle = ctypes.c_void_p()
    return handle if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0 else None


def _optional(library: Any, name: str, handle: Any) -> int | None:
    """A figure of a function that older drivers lack."""
    with contextlib.suppress(AttributeError):
        return _number(getattr(library, name), handle)
    return None


def _number(function: Any, *arguments: Any) -> int | None:
    value = ctypes.c_uint()
    return value.value if function(*arguments, ctypes.byref(value)) == 0 else None


def _words(function: Any, *arguments: Any) -> str | None:
    text = ctypes.create_string_buffer(96)
    return text.value.decode(errors="replace") if function(*arguments, text, ctypes.c_uint(len(text))) == 0 else None
