"""The most that this machine's processor does: the best product of several libraries at each rate, since none is best everywhere."""

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from msgspec.structs import replace

from elastic_bench.machine import fastest
from elastic_bench.machine import peaks as of_numpy
from elastic_bench.records import Peaks
from elastic_runtime.contract.precision import EXACT, PRECISIONS

SIDES = (1024, 2048, 4096)
RUNS = 5
MISLEADING = "OPENBLAS_CORETYPE"  # makes numpy multiply as an older processor would


def peaks(threads: int) -> Peaks:
    """Peaks of `threads` threads, measured in a process of its own: by numpy, and where torch is installed by that too, in float32,
    bfloat16 and 8-bit integers. The greatest of each rate counts.
    """
    before = os.environ.pop(MISLEADING, None)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measured, threads).result()
    finally:
        if before is not None:
            os.environ[MISLEADING] = before


def _measured(threads: int) -> Peaks:
    copied = of_numpy(threads=threads)
    if importlib.util.find_spec("torch") is None:
        return copied
    import torch

    torch.set_num_threads(threads)
    rates = {PRECISIONS[EXACT].rate: copied.flops_per_second}
    for side in SIDES:
        for rate, product in _products(torch, side).items():
            rates[rate] = max(rates.get(rate, 0.0), 2 * side**3 / fastest(product, RUNS, time.perf_counter))
    return replace(copied, flops_per_second=rates[PRECISIONS[EXACT].rate], rates=rates)


def _products(torch: Any, side: int) -> dict[str, Callable[[], Any]]:
    """A product of (side, side) matrices at each rate that a precision of ours may run at on a processor."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, side, side, generator=generator)
    half = a.bfloat16(), b.bfloat16()
    whole = (20 * a).to(torch.int8), (20 * b).to(torch.int8)
    return {
        PRECISIONS[EXACT].rate: lambda: a @ b,
        PRECISIONS["bf16"].rate: lambda: half[0] @ half[1],
        PRECISIONS["int8"].rate: lambda: torch._int_mm(*whole),
    }
