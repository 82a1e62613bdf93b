"""The memory that this process holds and has held, and what it may give back."""

import contextlib
import ctypes
import re
import sys
from pathlib import Path

from elastic_runtime.device import windows

KIB = 1024


def peak_bytes() -> int | None:
    """The most resident memory that this process has had, in bytes; None where the system does not tell."""
    with contextlib.suppress(OSError):  # getrusage would count on Linux what the process that started this one held
        return _status("VmHWM")
    if process := windows.process():
        return process.peak
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def resident_bytes() -> int | None:
    """The resident memory that this process has now, in bytes; None where the system does not tell."""
    with contextlib.suppress(OSError):
        return _status("VmRSS")
    process = windows.process()
    return process.resident if process else None


def _status(name: str) -> int | None:
    """A size that Linux tells of this process, in bytes; OSError elsewhere."""
    line = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(line[1]) * KIB if line else None


def give_back() -> None:
    """Return to the system what this process has freed and its C library keeps for later (glibc's); elsewhere nothing happens.

    Reading a model leaves a third of its size there: copies of weights from before they were packed.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):  # another C library keeps nothing that it would be asked for so
            ctypes.CDLL(None).malloc_trim(0)
