"""Pictures by a deadline, on a machine that gets busy in the middle: `Deadline` against every fixed budget or plan of the card.

    python samples/deadlines.py BUNDLE
    python samples/deadlines.py BUNDLE --pictures 20 --threads 2

The deadlines are spread evenly between the times that the cheapest and the dearest budget take at all steps or, of a model that is drawn
along plans, the cheapest preset and 50 steps at full resolution. During every other picture another process for each core starts to work
when half of the allowed time is over, and stops when the picture is done. All policies get the same deadlines, neighbours, classes and
noise. A bundle of the digits is judged by `samples/classifier.py`; any other one by its card's table alone. Goals: 95 % arrive, 80 % of
the time is used, and better pictures than the best fixed budget or plan that is as punctual, by what the card says of all that was drawn:
accuracy over its best ("card's quality"), over Frechet distance over the least.
"""

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from elastic_runtime import Auto, Budget, Deadline, ElasticPipeline, Fixed, Plan, Request
from elastic_runtime.contract.budget import key
from elastic_runtime.drawing.plans import plans_of
from elastic_runtime.ralu.plan import FULL, PRESETS
from record import machine, versions

SLICE = 0.002  # seconds that a busy neighbour works before it looks up
PLAIN_STEPS = 50  # at full resolution: the dearest plan
# what is asked for: way(index of the picture, seconds allowed)
Way = Callable[[int, float], Request]


@dataclass
class Result:
    """What one policy made of all deadlines."""

    arrived: list[bool] = field(default_factory=list)
    use: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    card: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
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


def run(pipe: ElasticPipeline, way: Way, seconds: list[float], busy: list[Connection], given: argparse.Namespace) -> Result:
    """Draw one picture for each deadline."""
    result = Result()
    outlook = pipe.outlook(asked(pipe, 0, Auto(), given))
    for i, allowed in enumerate(seconds):
        if i % 2:
            begin = time.monotonic() + allowed / 2
            for each in busy:
                each.send(begin)
        drawn = pipe.draw(way(i, allowed), generator=np.random.default_rng([given.seed, i]))
        if i % 2:
            for each in busy:
                each.send("enough")
        time.sleep(given.rest)
        result.arrived.append(drawn.seconds <= allowed)
        result.use.append(min(drawn.seconds / allowed, 1.0))
        result.steps.append(len(drawn.steps))
        options = [outlook.planned(drawn.plan)] if drawn.plan else [outlook.fixed(step.budget, None) for step in drawn.steps]
        result.card.append(float(np.mean([outlook.quality(option) for option in options])))
        result.distance.append(float(np.mean([outlook.distance(option) for option in options])))
        result.pictures.append(drawn.images)
    return result


def asked(pipe: ElasticPipeline, index: int, policy: Any, given: argparse.Namespace, **more: Any) -> Request:
    """The request of picture `index`."""
    steps = {} if pipe.bundle.manifest.model.patches else {"num_inference_steps": given.steps}
    return Request(
        class_labels=(index % pipe.bundle.manifest.model.num_classes,),
        guidance_scale=given.guidance,
        policy=policy,
        output_type="np",
        **steps,
        **more,
    )


def fixed(pipe: ElasticPipeline, given: argparse.Namespace) -> dict[str, Way]:
    """Every budget or plan of the card, by name."""
    manifest = pipe.bundle.manifest
    if manifest.model.patches:
        plans = {row.where: (row.plan, row.steps) for row in manifest.quality if row.plan and row.steps}
        known = plans_of(pipe.bundle, asked(pipe, 0, Auto(), given))[1]
        whole = {name: replace(known[plan], steps=steps) for name, (plan, steps) in plans.items()}
        return {name: partial(_along, pipe, plan, given) for name, plan in whole.items()}
    budgets = [Budget(**row.budget) for row in manifest.quality] or [pipe.gauge.budgets[0], pipe.gauge.budgets[-1]]
    return {key(budget): partial(_at, pipe, budget, given) for budget in budgets}


def _along(pipe: ElasticPipeline, plan: Plan, given: argparse.Namespace, index: int, allowed: float) -> Request:
    return asked(pipe, index, None, given, plan=plan)


def _at(pipe: ElasticPipeline, budget: Budget, given: argparse.Namespace, index: int, allowed: float) -> Request:
    return asked(pipe, index, Fixed(budget), given)


def ends(pipe: ElasticPipeline, given: argparse.Namespace) -> tuple[float, float]:
    """Predicted seconds of the cheapest and the dearest way that the deadlines lie between."""
    outlook = pipe.outlook(asked(pipe, 0, Auto(), given))
    if pipe.bundle.manifest.model.patches:
        times = [outlook.picture(option) for option in outlook.options() if option.name in (*PRESETS, f"{FULL}, {PLAIN_STEPS} steps")]
    else:
        times = [outlook.picture(option) for option in outlook.options()]
    return min(times), max(times)


def judged(pipe: ElasticPipeline, results: dict[str, Result]) -> None:
    """Fill in how many pictures are named as asked, where the judge knows what is drawn. torch comes last: its threads would disturb."""
    side = next(iter(results.values())).pictures[0].shape[1]
    if side not in (32, 64) or pipe.bundle.manifest.model.num_classes != 10:
        return
    from classifier import load_judge

    judge = load_judge(side)
    for result in results.values():
        images = np.concatenate(result.pictures).mean(axis=-1)[:, None] * 2 - 1
        result.accuracy = float((judge.judge(images)[1] == np.arange(len(images)) % 10).mean())


def report(results: dict[str, Result], given: argparse.Namespace, where: str) -> None:
    span = " to ".join(f"{1e3 * end:.0f}" for end in given.ends)
    title = f"{given.pictures} pictures, deadlines of {span} ms, guidance {given.guidance:g}, {where}"
    table = Table(title=title, title_justify="left")
    for column in ("policy", "on time", "use of the time", "steps", "card's quality", "Fréchet", "as asked"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, result in results.items():
        accuracy = "-" if result.accuracy is None else f"{result.accuracy:.1%}"
        means = [float(np.mean(values)) for values in (result.arrived, result.use, result.steps, result.card, result.distance)]
        table.add_row(name, f"{means[0]:.0%}", f"{means[1]:.1%}", f"{means[2]:.1f}", f"{means[3]:.4f}", f"{means[4]:.3f}", accuracy)
    console = Console(width=120)
    console.print(table)
    libraries = ", ".join(f"{name} {version}" for name, version in versions("onnxruntime", "openvino", "numpy").items())
    console.print(f"{machine()}; {libraries}")
    ours, fixed = results["Deadline"], {name: result for name, result in results.items() if name != "Deadline"}
    punctual = {name: result for name, result in fixed.items() if np.mean(result.arrived) >= np.mean(ours.arrived)}
    if not punctual:
        console.print("no fixed way is as punctual as Deadline")
        return
    best = max(punctual, key=lambda name: np.mean(punctual[name].card) / np.mean(punctual[name].distance))
    console.print(f"the best fixed way that is as punctual: {best}")


def main(given: argparse.Namespace) -> None:
    options = {"threads": given.threads, "spinning": given.spinning} if given.threads or not given.spinning else {}
    with ElasticPipeline.from_pretrained(given.bundle, **options) as pipe, neighbours(os.cpu_count() or 1) as busy:
        given.ends = ends(pipe, given)
        seconds = np.random.default_rng(given.seed).permutation(np.linspace(*given.ends, given.pictures)).tolist()
        ways: dict[str, Way] = {"Deadline": lambda index, allowed: asked(pipe, index, Deadline(allowed), given)}
        for way in ways.values():
            pipe.draw(way(0, 2 * given.ends[1]))  # a first run is slower
        results = {name: run(pipe, way, seconds, busy, given) for name, way in (ways | fixed(pipe, given)).items()}
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
