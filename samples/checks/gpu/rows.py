"""What the checks share: rows of results, timing, and the time that is left."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(os.environ.get("RESULTS", "."))
DEVICE = os.environ.get("CHECK_DEVICE", "cuda")  # cpu tries everything without a GPU
LIMIT = float(os.environ.get("LIMIT_S", "inf"))  # seconds of this process, after which nothing new is begun
BRIEF = DEVICE == "cpu"
_begun = time.perf_counter()


def left() -> float:
    """Seconds until nothing new is begun."""
    return LIMIT - (time.perf_counter() - _begun)


class Table:
    """Rows that are printed at once and kept as JSON lines, so that a run that is cut off has lost nothing."""

    def __init__(self, name: str):
        RESULTS.mkdir(parents=True, exist_ok=True)
        self._path = RESULTS / f"{name}.jsonl"
        self._path.unlink(missing_ok=True)

    def row(self, **facts: Any) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps(facts) + "\n")
        print("  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in facts.items()), flush=True)


def timed(run: Callable[[], object], seconds: float = 0.3, least: int = 20, warm: int = 5) -> dict[str, float]:
    """Median, 10th and 90th percentile of a run in milliseconds; `run` ends when its result is there."""
    if BRIEF:
        seconds, least, warm = 0.0, 2, 1
    for _ in range(warm):
        run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    low, middle, high = np.percentile(times, (10, 50, 90))
    return {"ms": float(middle), "ms_p10": float(low), "ms_p90": float(high), "runs": len(times)}
