"""Time one denoising step: the bundle in ONNX Runtime against eager torch and torch.compile on the same weights.

    python samples/step_time.py BUNDLE --model elit-mnist --latents 32,128,256 --batch 1,2
    python samples/step_time.py BUNDLE --latents 16,64,128,256            # the bundle alone

Each runtime has a process of its own, as it would where it is used, and they take turns in every round (A B C A B C ...), so that
the ratios hold while the machine's speed drifts; medians over the rounds are shown. Outputs are compared first: a runtime whose
output differs is not timed.
"""

import argparse
import contextlib
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from elastic_runtime.budget import Budget
from elastic_runtime.bundle import Bundle
from elastic_runtime.reference import axis_feeds
from elastic_runtime.session import open_session

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]
Turn = Callable[[Arrays], tuple[np.ndarray, float]]
REST = 0.02  # seconds for the threads of the runtime before to fall asleep


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def runtime(name: str, bundle: Path, model: str, threads: int) -> Run:
    """A runtime as a function of the graph's feeds; only its own libraries are loaded."""
    if name == "bundle":
        session = open_session(Bundle.open(bundle), "denoiser", threads=threads)
        return lambda feeds: session.run(feeds)["prediction"]
    import torch

    from elastic_export.models.zoo import Request, load

    torch.set_num_threads(threads)
    module = load(Request(model)).module
    callee = torch.compile(module, dynamic=True) if name == "torch.compile" else module

    def run(feeds: Arrays) -> np.ndarray:
        with torch.inference_mode():
            return callee(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()

    return run


def serve(pipe: Connection, *arguments: Any) -> None:
    """A worker: answer every feeds with (output, seconds)."""
    run = runtime(*arguments)
    while (arrays := pipe.recv()) is not None:
        start = time.perf_counter()
        output = run(arrays)
        pipe.send((output, time.perf_counter() - start))


@contextlib.contextmanager
def worker(name: str, *arguments: Any) -> Iterator[Turn]:
    """A runtime in its own process, as a function that gives its output and the seconds that it took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, *arguments))  # no daemon: torch.compile has children
    process.start()

    def turn(arrays: Arrays) -> tuple[np.ndarray, float]:
        time.sleep(REST)
        ours.send(arrays)
        output, seconds = ours.recv()
        return output, seconds

    try:
        yield turn
    finally:
        ours.send(None)
        process.join()


def feeds(bundle: Bundle, latents: int, batch: int) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "sample": generator.standard_normal((batch, *bundle.manifest.model.sample_shape)).astype(np.float32),
        "timestep": generator.uniform(0.1, 0.9, batch).astype(np.float32),
        "class_labels": generator.integers(0, bundle.manifest.model.num_classes, batch),
    } | axis_feeds(bundle.manifest.axes, Budget(latents=latents))


def measure(turns: dict[str, Turn], arrays: Arrays, rounds: int) -> dict[str, float]:
    """Median milliseconds of each runtime on the same feeds."""
    outputs = {name: turn(arrays)[0] for name, turn in turns.items()}
    for name, output in outputs.items():
        if not np.abs(output - outputs["bundle"]).max() < 1e-4:
            raise SystemExit(f"{name} does not agree with the bundle: no time is given for a wrong answer")
    times: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(rounds + 3):
        for name, turn in turns.items():
            seconds = turn(arrays)[1]
            if round_ >= 3:  # the first rounds warm up
                times[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="also time this zoo model in torch, with the same weights")
    parser.add_argument("--latents", type=numbers, default=[32, 128, 256])
    parser.add_argument("--batch", type=numbers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    names = ["bundle", *(("torch eager", "torch.compile") if options.model else ())]
    with contextlib.ExitStack() as stack:
        runs = {name: stack.enter_context(worker(name, options.bundle, options.model, options.threads)) for name in names}
        report(bundle, runs, options)


def report(bundle: Bundle, runs: dict[str, Turn], options: argparse.Namespace) -> None:
    flops = {row.budget["latents"]: row.flops for row in bundle.manifest.cost}
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", *(("torch",) if options.model else ())))
    table = Table(
        title=f"ms a step, {options.threads} threads, {options.rounds} rounds, {platform.machine()}, {packages}", title_justify="left"
    )
    for column in (
        "batch",
        "latents",
        *runs,
        *(f"{name} / bundle" for name in runs if name != "bundle"),
        "time share",
        "FLOP share",
        "GFLOP/s",
    ):
        table.add_column(column, justify="right")
    for batch in options.batch:
        rows = {latents: measure(runs, feeds(bundle, latents, batch), options.rounds) for latents in options.latents}
        full = max(options.latents)
        for latents, row in rows.items():
            ratios = [f"{value / row['bundle']:.2f}" for name, value in row.items() if name != "bundle"]
            shares = f"{row['bundle'] / rows[full]['bundle']:.2f}", f"{flops[latents] / flops[full]:.2f}"
            rate = f"{batch * flops[latents] / row['bundle'] / 1e6:.0f}"
            table.add_row(str(batch), str(latents), *(f"{value:.2f}" for value in row.values()), *ratios, *shares, rate)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
