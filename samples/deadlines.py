"""Pictures by a deadline, on a machine that gets busy in the middle: `Deadline` against every fixed budget of the card.

    python samples/deadlines.py BUNDLE
    python samples/deadlines.py BUNDLE --pictures 20 --threads 2

The deadlines are spread evenly between the times that the cheapest and the dearest budget take at all steps. During every other picture
another process for each core starts to work when half of the allowed time is over, and stops when the picture is done. All policies get
the same deadlines, neighbours, classes and noise. A bundle of the digits is judged by `samples/classifier.py`; any other one by its
card's table alone. Goals: 95 % arrive, 80 % of the time is used, and better pictures than the best fixed budget that is as punctual.
"""

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from elastic_runtime import Budget, Deadline, ElasticPipeline, Fixed, Guidance, Outlook, Policy
from elastic_runtime.contract.budget import key
from elastic_runtime.sampling.fitting import sampler
from record import machine, versions

SLICE = 0.002  # seconds that a busy neighbour works before it looks up


@dataclass
class Result:
    """What one policy made of all deadlines."""

    arrived: list[bool] = field(default_factory=list)
    use: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    card: list[float] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    accuracy: float | None = None


def neighbour(orders: Connection) -> None:
    """Work from the time that is sent until another message comes; None ends the process. All processes share this clock."""
    while (begin := orders.recv()) is not None:
        while not orders.poll(max(begin - time.monotonic(), 0)):
            end = time.monotonic() + SLICE
            while time.monotonic() < end:
                pass
        orders.recv()


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[list[Connection]]:
    """So many processes that wait for orders."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=neighbour, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    try:
        yield [ours for ours, _ in pairs]
    finally:
        for ours, _ in pairs:
            ours.send(None)
        for process in processes:
            process.join()


def run(pipe: ElasticPipeline, policies: list[Policy], seconds: list[float], busy: list[Connection], given: argparse.Namespace) -> Result:
    """Draw one picture for each deadline, by the policy of the same place."""
    found = Result()
    outlook = Outlook(pipe.gauge, 1, Guidance(given.guidance), sampler(pipe.bundle.manifest.model)[0])
    for i, (policy, allowed) in enumerate(zip(policies, seconds, strict=True)):
        if i % 2:
            begin = time.monotonic() + allowed / 2
            for each in busy:
                each.send(begin)
        drawn = pipe(
            [i % pipe.bundle.manifest.model.num_classes], num_inference_steps=given.steps, guidance_scale=given.guidance, policy=policy,
            generator=np.random.default_rng([given.seed, i]), output_type="np",
        )  # fmt: skip
        if i % 2:
            for each in busy:
                each.send("enough")
        time.sleep(given.rest)
        found.arrived.append(drawn.seconds <= allowed)
        found.use.append(min(drawn.seconds / allowed, 1.0))
        found.steps.append(len(drawn.steps))
        found.card.append(float(np.mean([outlook.quality(step.budget) for step in drawn.steps])))
        found.pictures.append(drawn.images)
    return found


def judged(pipe: ElasticPipeline, results: dict[str, Result]) -> None:
    """Fill in how many pictures are named as asked, where the judge knows what is drawn. torch comes last: its threads would disturb."""
    if pipe.bundle.manifest.model.sample_shape != (1, 32, 32):
        return
    from classifier import load_judge

    judge = load_judge()
    for result in results.values():
        images = np.concatenate(result.pictures).transpose(0, 3, 1, 2) * 2 - 1
        result.accuracy = float((judge.judge(images)[1] == np.arange(len(images)) % 10).mean())


def report(results: dict[str, Result], given: argparse.Namespace, where: str) -> None:
    table = Table(title=f"{given.pictures} pictures, {given.steps} steps, guidance {given.guidance:g}, {where}", title_justify="left")
    for column in ("policy", "on time", "use of the time", "steps", "card's quality", "as asked"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, result in results.items():
        accuracy = "-" if result.accuracy is None else f"{result.accuracy:.1%}"
        means = [float(np.mean(values)) for values in (result.arrived, result.use, result.steps, result.card)]
        table.add_row(name, f"{means[0]:.0%}", f"{means[1]:.1%}", f"{means[2]:.1f}", f"{means[3]:.4f}", accuracy)
    console = Console(width=120)
    console.print(table)
    told = ", ".join(f"{name} {version}" for name, version in versions("onnxruntime", "openvino", "numpy").items())
    console.print(f"{machine()}; {told}")
    ours, fixed = results["Deadline"], {name: result for name, result in results.items() if name != "Deadline"}
    punctual = {name: result for name, result in fixed.items() if np.mean(result.arrived) >= np.mean(ours.arrived)}
    if not punctual:
        console.print("no fixed budget is as punctual as Deadline")
        return
    best = max(punctual, key=lambda name: (punctual[name].accuracy or 0.0, float(np.mean(punctual[name].card))))
    console.print(f"the best fixed budget that is as punctual: {best}")


def main(given: argparse.Namespace) -> None:
    options = {"threads": given.threads, "spinning": given.spinning} if given.threads or not given.spinning else {}
    with ElasticPipeline.from_pretrained(given.bundle, **options) as pipe, neighbours(os.cpu_count() or 1) as busy:
        gauge, manifest = pipe.gauge, pipe.bundle.manifest
        outlook = Outlook(gauge, 1, Guidance(given.guidance), sampler(manifest.model)[0])
        ends = [outlook.picture(choice, outlook.times(given.steps)) for choice in outlook.choices()]
        seconds = np.random.default_rng(given.seed).permutation(np.linspace(ends[0], ends[-1], given.pictures)).tolist()
        results = {"Deadline": run(pipe, [Deadline(allowed) for allowed in seconds], seconds, busy, given)}
        for budget in [Budget(**row.budget) for row in manifest.quality] or [gauge.budgets[0], gauge.budgets[-1]]:
            results[key(budget)] = run(pipe, [Fixed(budget)] * given.pictures, seconds, busy, given)
        judged(pipe, results)
        report(results, given, pipe.where)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--spinning", action=argparse.BooleanOptionalAction, default=False, help="waiting threads stay busy")
    parser.add_argument("--rest", type=float, default=0.02, help="seconds between pictures (default: %(default)s)")
    main(parser.parse_args())
