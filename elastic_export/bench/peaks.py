"""The most that this machine's processor does: the best product of several libraries at each rate, since none is best everywhere."""

import contextlib
import importlib.util
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from msgspec.structs import replace

from elastic_bench.machine import fastest
from elastic_bench.machine import peaks as of_numpy
from elastic_bench.process import deaf, ignore_interrupts
from elastic_bench.records import Peaks
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.device import Clock
from elastic_runtime.errors import InferenceError

SIDES = (256, 1024, 2048, 4096)
RUNS = 5
# Seconds of a product. Without instructions for a rate (bfloat16 before AVX-512) torch multiplies in a plain loop, and its largest product
# takes minutes.
LONGEST = 3.0
EXACT_RATE, INT8_RATE = (PRECISIONS[name].rate for name in (EXACT, "int8"))
RATES = (EXACT_RATE, PRECISIONS["bf16"].rate, INT8_RATE)
_log = logging.getLogger(__name__)
MISLEADING = "OPENBLAS_CORETYPE"  # makes numpy multiply as an older processor would
# What tells numpy's library of products, whichever it is, how many threads it may have; it reads that when it is imported.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def peaks(threads: int) -> Peaks:
    """Peaks of `threads` threads, measured in a process of its own: by numpy, and where torch is installed by that too, in float32,
    bfloat16 and 8-bit integers. The greatest of each rate counts.

    Raises: InferenceError where that process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=ignore_interrupts) as pool:
        with _surroundings(threads), deaf():
            measured = pool.submit(_measured, threads)
        try:
            return measured.result()
        except KeyboardInterrupt:  # leaving waits for the process, which measures on
            for process in list(pool._processes.values()):
                process.kill()
            raise
        except BrokenProcessPool:
            raise InferenceError(
                "the process that measures the processor's peaks died, as systems end one when memory runs out: close what else runs here"
            ) from None


@contextlib.contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """The environment of a process in which numpy multiplies as well as it can in so many threads."""
    before = {name: os.environ.get(name) for name in (MISLEADING, *THREADS)}
    os.environ.pop(MISLEADING, None)
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _measured(threads: int) -> Peaks:
    copied = of_numpy(threads=threads)
    if importlib.util.find_spec("torch") is None:
        return copied
    try:
        import torch
    except (ImportError, OSError) as error:
        _log.warning("the processor's peaks are numpy's, since torch cannot be loaded: %s", error)
        return copied
    torch.set_num_threads(threads)
    rates = {rate: highest(partial(_product, torch, rate), time.perf_counter) for rate in RATES}
    rates[EXACT_RATE] = max(rates[EXACT_RATE], copied.flops_per_second)
    return replace(copied, flops_per_second=rates[EXACT_RATE], rates=rates)


def highest(product: Callable[[int], Callable[[], object]], clock: Clock) -> float:
    """FLOP/s of the best of the products of (side, side) matrices; what would take too long, by the side before, is left out."""
    best = seconds = 0.0
    for before, side in itertools.pairwise((SIDES[0], *SIDES)):
        if seconds * (side / before) ** 3 > LONGEST:
            break
        seconds = fastest(product(side), RUNS, clock)
        best = max(best, 2 * side**3 / seconds)
    return best


def _product(torch: Any, rate: str, side: int) -> Callable[[], object]:
    """A product of (side, side) matrices at a rate that a precision of ours may run at on a processor."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, side, side, generator=generator)
    if rate == INT8_RATE:
        a, b = (20 * a).to(torch.int8), (20 * b).to(torch.int8)
        return lambda: torch._int_mm(a, b)
    if rate != EXACT_RATE:
        a, b = a.bfloat16(), b.bfloat16()
    return lambda: a @ b
