"""What the cost model predicts of a bundle's steps at budgets that it never measured, against what they take and hold; of a model that is
drawn along plans, of whole pictures along plans and at sizes that it never measured.

    python samples/predictions.py BUNDLE [BUNDLE...]
    python samples/predictions.py BUNDLE --batch 2 --rounds 31

Time: a calibration is made anew, then every budget or plan is timed in turn, in rounds, and the medians are compared. Memory: each is run
in a process of its own, whose peak is compared with what was predicted. The goals are 10 % (median) for time and 15 % for memory.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from elastic_runtime import Budget, Bundle, ElasticPipeline, Request
from elastic_runtime.choosing.calibration import middle
from elastic_runtime.contract.budget import key, parse_key
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.device.memory import peak_bytes
from elastic_runtime.drawing.plans import takes
from elastic_runtime.ralu.plan import FULL, PRESETS
from record import machine, versions


@dataclass(frozen=True)
class Case:
    """Something to predict: `words` name it, and tell a process of its own what to run."""

    words: str
    run: Callable[[], object]
    seconds: float
    memory: float


def step(pipe: ElasticPipeline, budget: Budget, batch: int) -> Callable[[], None]:
    """One evaluation of `batch` samples, as a step makes it."""
    manifest = pipe.bundle.manifest
    denoiser, source = Denoiser(pipe.gauge.session, manifest), np.random.default_rng(0)
    return lambda: denoiser.evaluate(budget, batch, middle(manifest.model), source)


def steps(pipe: ElasticPipeline, options: argparse.Namespace) -> Iterator[Case]:
    """Budgets that were not measured."""
    gauge, batch = pipe.gauge, options.batch
    measured = {Budget(**point.budget) for point in gauge.calibrated.points}
    others = [budget for budget in gauge.budgets if budget not in measured]
    places = sorted({round(i) for i in np.linspace(0, len(others) - 1, min(options.budgets, len(others)))})
    for budget in (others[i] for i in places):
        memory = (gauge.opened or 0) + gauge.costs.growth(budget, batch)
        yield Case(key(budget), step(pipe, budget, batch), gauge.costs.seconds(budget, batch), memory)


def pictures(pipe: ElasticPipeline) -> Iterator[Case]:
    """Pictures of one class along plans and of sizes whose tokens were, for the most part, not measured."""
    full = takes(pipe.bundle, FULL)[1]
    own = replace(PRESETS["4x"], up_ratio=0.5)
    plans = {"4x": PRESETS["4x"], "7x": PRESETS["7x"], "4x in 30": PRESETS["4x"].spread(30), "7x in 5": PRESETS["7x"].spread(5)}
    plans |= {"half grown": own, "half grown in 9": own.spread(9), "full in 7": full.spread(7), "full in 33": full.spread(33)}
    model = pipe.bundle.manifest.model
    unit = 4 * (model.patches.size if model.patches else 1) * (model.vae.upscale if model.vae else 1)
    side = model.sample_shape[-1] * (model.vae.upscale if model.vae else 1)
    for sides in ((side, side), (side, side - unit), (side - unit, side - 2 * unit)):
        for name, plan in plans.items():
            request = Request(class_labels=1, plan=plan, height=sides[0], width=sides[1], guidance_scale=2.0, seeds=1)
            outlook = pipe.outlook(request)
            option = outlook.planned(plan)  # type: ignore[attr-defined]
            words = f"{name}, {sides[0]}x{sides[1]}"
            yield Case(words, partial(pipe.draw, request), outlook.picture(option), outlook.memory(option))


def measured_times(cases: list[Case], rounds: int) -> list[float]:
    """Median seconds of each case; of two runs in a row the second counts, as in a picture."""
    taken: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, seconds in zip(cases, taken, strict=True):
            case.run()
            begun = time.perf_counter()
            case.run()
            seconds.append(time.perf_counter() - begun)
    return [statistics.median(seconds) for seconds in taken]


def measured_memory(bundle: Path, backend: str | None, words: str, batch: int) -> int | None:
    """Peak bytes of a process that opens the bundle and runs one case."""
    line = [sys.executable, __file__, str(bundle), "--alone", words, "--batch", str(batch)]
    done = subprocess.run([*line, *(["--backend", backend] if backend else [])], capture_output=True, text=True, check=True)
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def alone(pipe: ElasticPipeline, words: str, batch: int) -> None:
    """Run one case twice, without a calibration."""
    if pipe.bundle.manifest.model.patches:
        run = next(case.run for case in pictures(pipe) if case.words == words)
    else:
        run = step(pipe, parse_key(words), batch)
    run()
    run()


def report(folder: Path, options: argparse.Namespace) -> None:
    bundle = Bundle.open(folder)
    with ElasticPipeline.from_pretrained(bundle, options.backend) as pipe:
        gauge, planned = pipe.gauge, bundle.manifest.model.patches is not None
        calibrated = sorted({key(point.budget) for point in gauge.calibrated.points})
        cases = list(pictures(pipe) if planned else steps(pipe, options))
        what = "whole pictures, guidance 2" if planned else f"steps, batch {options.batch}"
        table = Table(title=f"{bundle.manifest.model.name}, {what}, {pipe.where}", title_justify="left")
        for column in ("plan" if planned else "budget", "predicted ms", "measured ms", "error", "predicted MB", "measured MB", "error"):
            table.add_column(column, justify="right")
        errors, memory_errors = [], []
        for case, seconds in zip(cases, measured_times(cases, options.rounds), strict=True):
            errors.append(abs(case.seconds / seconds - 1))
            cells = [f"{1e3 * case.seconds:.2f}", f"{1e3 * seconds:.2f}", f"{case.seconds / seconds - 1:+.1%}"]
            held = measured_memory(folder, options.backend, case.words, options.batch)
            if held and gauge.opened is not None:
                memory_errors.append(abs(case.memory / held - 1))
                cells += [f"{case.memory / 1e6:.1f}", f"{held / 1e6:.1f}", f"{case.memory / held - 1:+.1%}"]
            table.add_row(case.words, *cells)
    console = Console(width=140)
    console.print(table)
    libraries = ", ".join(f"{name} {version}" for name, version in versions("onnxruntime", "openvino", "numpy").items())
    console.print(f"calibrated at {', '.join(calibrated)}; {machine()}; {libraries}")
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
        with ElasticPipeline.from_pretrained(given.bundles[0], given.backend) as opened:
            alone(opened, given.alone, given.batch)
        print(peak_bytes() or "")
    else:
        with tempfile.TemporaryDirectory() as empty:  # a calibration of its own, not one that an older version or a busier hour made
            os.environ["XDG_CACHE_HOME"] = empty
            for each in given.bundles:
                report(each, given)
