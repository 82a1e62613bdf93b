"""What the cost model predicts of a bundle's steps at budgets that it never measured, against what they take and hold.

    python samples/predictions.py BUNDLE [BUNDLE...]
    python samples/predictions.py BUNDLE --batch 2 --rounds 31

Time: a calibration is made anew, then every budget is timed in turn, in rounds, and the medians are compared. Memory: each budget is run
in a process of its own, whose peak is compared with what was predicted. The goals are 10 % (median) for time and 15 % for memory.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from elastic_runtime import Budget, Bundle, ElasticPipeline
from elastic_runtime.choosing.calibration import evaluate
from elastic_runtime.contract.budget import key, parse_key
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.device import peak_bytes
from elastic_runtime.sampling.fitting import sampler, times
from record import machine, versions


def run(pipe: ElasticPipeline, budget: Budget, batch: int) -> None:
    """One evaluation of `batch` samples, as a step makes it."""
    manifest = pipe.bundle.manifest
    middle = float(times(manifest.model, sampler(manifest.model)[0], 2)[1])
    evaluate(Denoiser(pipe.gauge.session, manifest), manifest, budget, batch, middle, np.random.default_rng(0))


def measured_times(pipe: ElasticPipeline, budgets: list[Budget], batch: int, rounds: int) -> dict[Budget, float]:
    """Median seconds of each budget; of two runs in a row the second counts, as in a picture."""
    found: dict[Budget, list[float]] = {budget: [] for budget in budgets}
    for _ in range(rounds):
        for budget in budgets:
            run(pipe, budget, batch)
            begun = time.perf_counter()
            run(pipe, budget, batch)
            found[budget].append(time.perf_counter() - begun)
    return {budget: statistics.median(values) for budget, values in found.items()}


def measured_memory(bundle: Path, backend: str | None, budget: Budget, batch: int) -> int | None:
    """Peak bytes of a process that opens the bundle and runs one budget."""
    words = [sys.executable, __file__, str(bundle), "--alone", key(budget), "--batch", str(batch)]
    done = subprocess.run([*words, *(["--backend", backend] if backend else [])], capture_output=True, text=True, check=True)
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def report(folder: Path, options: argparse.Namespace) -> None:
    bundle = Bundle.open(folder)
    with ElasticPipeline.from_pretrained(bundle, options.backend) as pipe:
        gauge, batch = pipe.gauge, options.batch
        known = {Budget(**point.budget) for point in gauge.calibrated.points}
        others = [budget for budget in gauge.budgets if budget not in known]
        places = sorted({round(i) for i in np.linspace(0, len(others) - 1, min(options.budgets, len(others)))})
        chosen = [others[i] for i in places]
        taken = measured_times(pipe, chosen, batch, options.rounds)
        table = Table(title=f"{bundle.manifest.model.name}, batch {batch}, {pipe.where}", title_justify="left")
        for column in ("budget", "predicted ms", "measured ms", "error", "predicted MB", "measured MB", "error"):
            table.add_column(column, justify="right")
        errors, memory_errors = [], []
        for budget in chosen:
            predicted = gauge.costs.seconds(budget, batch)
            errors.append(abs(predicted / taken[budget] - 1))
            cells = [f"{1e3 * predicted:.2f}", f"{1e3 * taken[budget]:.2f}", f"{predicted / taken[budget] - 1:+.1%}"]
            held = measured_memory(folder, options.backend, budget, batch)
            if held and gauge.opened is not None:
                expected = gauge.opened + gauge.costs.growth(budget, batch)
                memory_errors.append(abs(expected / held - 1))
                cells += [f"{expected / 1e6:.1f}", f"{held / 1e6:.1f}", f"{expected / held - 1:+.1%}"]
            table.add_row(key(budget), *cells)
    console = Console(width=140)
    console.print(table)
    told = ", ".join(f"{name} {version}" for name, version in versions("onnxruntime", "openvino", "numpy").items())
    console.print(f"calibrated at {', '.join(sorted(map(key, known)))}; {machine()}; {told}")
    if errors:
        console.print(f"time: median error {statistics.median(errors):.1%}, largest {max(errors):.1%} (goal: median 10 %)")
    if memory_errors:
        console.print(f"memory: median error {statistics.median(memory_errors):.1%}, largest {max(memory_errors):.1%} (goal: 15 %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--batch", type=int, default=2, help="samples in a run (default: 2, both branches of guidance)")
    parser.add_argument("--budgets", type=int, default=8, help="budgets to compare, none of them calibrated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        with ElasticPipeline.from_pretrained(given.bundles[0], given.backend) as alone:
            run(alone, parse_key(given.alone), given.batch)
            run(alone, parse_key(given.alone), given.batch)
        print(peak_bytes() or "")
    else:
        with tempfile.TemporaryDirectory() as empty:  # a calibration of its own, not one that an older version or a busier hour made
            os.environ["XDG_CACHE_HOME"] = empty
            for each in given.bundles:
                report(each, given)
