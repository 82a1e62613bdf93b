"""The machine that measures: what it is, and the most that its processor can do."""

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from elastic_bench.records import Machine, Peaks
from elastic_runtime.device import PACKAGES, Clock, usable_cores

# What may take part in a measurement, by distribution.
TAKING_PART = ("elastic-export", "numpy", *(name for package in PACKAGES.values() for name in package.distributions))


def machine() -> Machine:
    """This machine; the processor's name where the system tells it."""
    name = platform.processor()
    if platform.system() == "Linux":  # where platform.processor() is mostly empty
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        processor=name,
        cores=os.cpu_count() or 1,
        memory_bytes=_memory(),
        versions=versions(*TAKING_PART),
    )


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those `packages` that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def peaks(side: int = 2048, size: int = 2**27, runs: int = 5, threads: int | None = None, clock: Clock = time.perf_counter) -> Peaks:
    """The fastest of `runs` float32 products of (side, side) matrices, and of copies of `size` bytes by all threads at once."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, side, side), dtype=np.float32)
    product = np.empty_like(a)
    source, target = np.ones(size // 8), np.empty(size // 8)
    workers = threads or usable_cores()
    pieces = list(zip(np.array_split(source, workers), np.array_split(target, workers), strict=True))
    with ThreadPoolExecutor(workers) as pool:  # copying lets go of the interpreter's lock

        def copy() -> None:
            list(pool.map(lambda piece: np.copyto(piece[1], piece[0]), pieces))

        multiplying = fastest(lambda: np.matmul(a, b, out=product), runs, clock)
        copying = fastest(copy, runs, clock)
    return Peaks(flops_per_second=2 * side**3 / multiplying, bytes_per_second=2 * source.nbytes / copying)


def fastest(run: Callable[[], object], runs: int, clock: Clock) -> float:
    """Seconds of the fastest of `runs` runs, after one that is not counted."""
    run()  # touches the memory
    best = float("inf")
    for _ in range(runs):
        begun = clock()
        run()
        best = min(best, clock() - begun)
    return best
