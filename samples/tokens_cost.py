"""What sizing token slots by the picture saves: whole pictures of a DC-DiT bundle, sized step by step, against all slots at each.

    python samples/tokens_cost.py BUNDLE --steps 250 --rounds 5
    python samples/tokens_cost.py BUNDLE --guidance 1.25 --guidance-drop 0.9

Both ways draw the same picture from the same noise, in one session and in turn (A B A B ...), so that what else the machine does
falls on both; each round has another class, and medians over the rounds are shown. Pictures are compared: no time is given where
they differ.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from elastic_runtime import Budget, Bundle, ElasticPipeline, Result, Session, StepRecord, open_session
from elastic_runtime.sessions.session import Arrays
from record import machine, versions

# Of the mean difference between both pictures' values, which are about 1. Sums of other lengths are rounded otherwise, and a token
# whose probability is all but one half may then be kept in one and not in the other.
SAME = 1e-2


class AllSlots(Session):
    """A session that takes no budget but the largest, as if it had been compiled for that alone."""

    def __init__(self, session: Session, budget: Budget):
        super().__init__(session.graph, session.batch, (budget,))
        self.where, self._session = session.where, session

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._session.run(feeds)

    def close(self) -> None:
        """The session is the other pipeline's."""


@dataclass
class Way:
    """One way to draw: its pipeline, the seconds of each picture, and the records of each."""

    pipeline: ElasticPipeline
    seconds: list[float] = field(default_factory=list)
    records: list[tuple[StepRecord, ...]] = field(default_factory=list)

    def draw(self, label: int, options: argparse.Namespace) -> np.ndarray:
        begun = time.perf_counter()
        result: Result = self.pipeline(
            [label] * options.pictures,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            drop_fraction=options.drop,
            guidance_drop_fraction=options.guidance_drop,
            sampler=options.sampler,
            generator=np.random.default_rng(label),
            output_type="latent",
        )
        self.seconds.append(time.perf_counter() - begun)
        self.records.append(result.steps)
        return np.asarray(result.images)


def measure(ways: Sequence[Way], classes: int, options: argparse.Namespace) -> None:
    """Draw a picture each way in every round; SystemExit where they differ."""
    for round_ in range(options.rounds + 1):
        sized, whole = (way.draw(round_ % classes, options) for way in ways)
        if not np.abs(sized - whole).mean() < SAME:
            raise SystemExit(
                f"class {round_ % classes}: the pictures differ by {np.abs(sized - whole).mean():.3f}: no time is given for a wrong one"
            )
        if not round_:  # the first is for the caches
            for way in ways:
                way.seconds.clear()
                way.records.clear()


def kept(records: Sequence[tuple[StepRecord, ...]], slots: int, rows: int = 10) -> Table:
    """Counts at some of the steps, the mean over pictures and rounds."""
    table = Table(title="kept by step, mean over pictures", title_justify="left")
    for column in ("step", "time", "kept", "share", "slots", "weak kept", "weak slots", "run again"):
        table.add_column(column, justify="right")
    for index in np.unique(np.linspace(0, len(records[0]) - 1, rows).round().astype(int)):
        at = [steps[index] for steps in records]
        mean = np.mean([step.kept for step in at])
        weak = [(np.mean(step.guidance_kept), step.guidance_slots) for step in at if step.guidance_kept]
        shown = [f"{value:.0f}" for value in np.mean(weak, axis=0)] if weak else ["-", "-"]
        again = f"{sum(step.reruns for step in at)}/{len(at)}"
        table.add_row(
            str(index + 1), f"{at[0].time:g}", f"{mean:.1f}", f"{mean / slots:.0%}", f"{np.mean([s.slots for s in at]):.0f}", *shown, again
        )
    return table


def main(options: argparse.Namespace) -> None:
    bundle, console = Bundle.open(options.bundle), Console(width=160)
    axis, batch = bundle.manifest.axis("tokens"), bundle.manifest.graphs["denoiser"].batch
    with open_session(bundle, threads=options.threads, spinning=False) as session:
        ways = [Way(ElasticPipeline(bundle, {"denoiser": each})) for each in (session, AllSlots(session, Budget(tokens=axis.max)))]
        measure(ways, bundle.manifest.model.num_classes, options)
    sized, whole = ways
    a, b = (statistics.median(way.seconds) for way in ways)
    calls = "two branches" if options.guidance > 1 else "no guidance"
    console.print(
        f"{options.pictures} at once, {options.steps} steps, {calls}, batches of {batch}, {options.threads} threads, medians of "
        f"{options.rounds} rounds, {machine()}, {versions('onnxruntime', 'numpy')}",
        kept(sized.records, axis.max),
        f"sized {a:.3f} s, all {axis.max} slots {b:.3f} s: {b / a:.2f} times faster; "
        f"slots run: {spent(sized.records) / spent(whole.records):.0%}, steps run again: "
        f"{np.mean([sum(step.reruns for step in steps) for steps in sized.records]):.1f} a picture",
        sep="\n",
    )


def spent(records: Sequence[tuple[StepRecord, ...]]) -> int:
    """Slots of every step's last run, both branches."""
    return sum((step.slots or 0) + (step.guidance_slots or 0) for steps in records for step in steps)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--steps", type=int, default=250)
    options.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    options.add_argument("--guidance", type=float, default=1.0)
    options.add_argument("--drop", type=float, default=0.0)
    options.add_argument("--guidance-drop", type=float, default=None)
    options.add_argument("--pictures", type=int, default=1, help="in one batch; its size is that of the one that keeps most")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    return options.parse_args(arguments)


if __name__ == "__main__":
    main(parsed())
