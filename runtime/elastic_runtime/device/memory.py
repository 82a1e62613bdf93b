"""The memory that this process has held."""

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
