"""The memory that this process has held, and what it may give back."""

import contextlib
import ctypes
import re
import sys
from pathlib import Path

KIB = 1024


def peak_bytes() -> int | None:
    """The most resident memory that this process has had, in bytes; None where the system does not tell."""
    try:  # getrusage would count on Linux what the process that started this one held
        line = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
        return int(line[1]) * KIB if line else None
    except OSError:
        pass
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def give_back() -> None:
    """Return to the system what this process has freed and its C library keeps for later (glibc's); elsewhere nothing happens.

    Reading a model leaves a third of its size there: copies of weights from before they were packed.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):  # another C library keeps nothing that it would be asked for so
            ctypes.CDLL(None).malloc_trim(0)
