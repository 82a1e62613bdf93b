"""Energy, where the machine tells it: counters in joules that only rise.

RAPL (Linux, Intel and AMD) counts a processor package, NVML an NVIDIA GPU, powermetrics (macOS, root only) the whole chip.
They count everything that runs, not one process.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from elastic_runtime.device import nvml

RAPL = Path("/sys/class/powercap")
# read() -> joules since some moment
Counter = Callable[[], float]


def counters() -> tuple[dict[str, Counter], dict[str, str]]:
    """The sources of this machine by name, and for each other source why it is absent."""
    present: dict[str, Counter] = {}
    absent: dict[str, str] = {}
    for name, opener in (("RAPL", rapl), ("NVML", nvml.energy), ("powermetrics", powermetrics)):
        opened = opener()
        if isinstance(opened, str):
            absent[name] = opened
        else:
            present[name] = opened
    return present, absent


def rapl(folder: Path = RAPL) -> Counter | str:
    """Sum of the processor packages' counters (microjoules, which wrap around), or why there is none.

    A laptop's zone `psys` is the platform, the package in it.
    """
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
    try:
        zones = [zone for zone in zones if (zone / "name").read_text(encoding="utf-8").startswith("package")]
        if not zones:
            return "this system has no power capping interface" if not folder.is_dir() else "the processor offers no counter"
        ranges = [int((zone / "max_energy_range_uj").read_text(encoding="utf-8")) for zone in zones]
        last = [int((zone / "energy_uj").read_text(encoding="utf-8")) for zone in zones]
    except PermissionError:
        return "only root may read the counters"
    except (OSError, ValueError) as error:
        return f"its counters cannot be read: {error}"
    total = 0

    def read() -> float:
        nonlocal total
        for i, zone in enumerate(zones):
            now = int((zone / "energy_uj").read_text(encoding="utf-8"))
            total += (now - last[i]) % (ranges[i] + 1)
            last[i] = now
        return total / 1e6

    return read


def powermetrics() -> Counter | str:
    """The chip's power, added up over samples of 100 ms from when it is first read, or why there is none."""
    if sys.platform != "darwin" or not shutil.which("powermetrics"):
        return "it is a tool of macOS"
    if os.geteuid() != 0:
        return "it needs root: run the command with sudo"
    command = ["powermetrics", "--samplers", "cpu_power,gpu_power", "-i", "100"]

    @functools.cache
    def watched() -> Counter:  # who only asks what there is starts nothing, which would run beside what is timed
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        return watch(process.stdout)

    return lambda: watched()()


def watch(lines: IO[str]) -> Counter:
    """A counter fed by powermetrics' own text, read in the background: elapsed milliseconds, then milliwatts of all units together."""
    total = [0.0]

    def follow() -> None:
        seconds = 0.0
        for line in lines:
            if match := re.search(r"\(([\d.]+)ms elapsed\)", line):
                seconds = float(match[1]) / 1e3
            elif match := re.search(r"Combined Power.*?:\s*(\d+) mW", line):
                total[0] += float(match[1]) / 1e3 * seconds

    threading.Thread(target=follow, daemon=True).start()
    return lambda: total[0]
