"""What follows from a report's rows: shares, rates and ratios, for whoever shows them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from elastic_bench.records import ROUNDS, BundleReport, Peaks, Row, RuntimeReport, Settings
from elastic_bench.statistics import ratio


@dataclass(frozen=True)
class Figures:
    """A row with what follows from it; None where something for it is not known.

    time_share, flop_share: of the same runtime's largest budget, the former from the same rounds. speedup: how many times faster than
    the first runtime at this budget. compute_share, bandwidth_share: of the processor's measured peaks (for runtimes on it), the former in
    the runtime's precision. least: seconds that neither its FLOPs nor its bytes allow to go below at these peaks, if all bytes are moved.
    """

    runtime: RuntimeReport
    row: Row
    time_share: float
    flop_share: float | None
    speedup: float | None
    flops_per_second: float | None
    compute_share: float | None
    bytes_per_second: float | None
    bandwidth_share: float | None
    least: float | None
    picture: float | None
    images_per_second: float | None


def figures(bundle: BundleReport, settings: Settings, peaks: Peaks) -> Iterator[Figures]:
    """Every row of a bundle's runtimes, in order."""
    timed = [runtime for runtime in bundle.runtimes if runtime.rows]
    for runtime in timed:
        full = runtime.rows[-1]
        base = {tuple(row.budget.items()): row for row in timed[0].rows}
        for row in runtime.rows:
            other = base.get(tuple(row.budget.items()))
            compute = row.flops / row.step.p50 if row.flops else None
            moved = row.moved_bytes / row.step.p50 if row.moved_bytes else None
            here = runtime.processor == "cpu"  # whose peaks were measured
            picture = float(np.median(row.pictures)) if row.pictures else None
            peak = peaks.at(runtime.precision)
            yield Figures(
                runtime=runtime,
                row=row,
                time_share=ratio(row.rounds, full.rounds),
                flop_share=row.flops / full.flops if row.flops and full.flops else None,
                speedup=1 / ratio(row.rounds, other.rounds) if other else None,
                flops_per_second=compute,
                compute_share=compute / peak if compute and here else None,
                bytes_per_second=moved,
                bandwidth_share=moved / peaks.bytes_per_second if moved and here else None,
                least=max(row.flops / peak, row.moved_bytes / peaks.bytes_per_second) if row.flops and row.moved_bytes and here else None,
                picture=picture,
                images_per_second=settings.batch / picture if picture else None,
            )


def method(settings: Settings, bundles: Iterable[BundleReport] = ()) -> str:
    """How the figures of `bundles` were made, in a few sentences."""
    many = "one picture" if settings.batch == 1 else f"{settings.batch} pictures"
    bundles = list(bundles)
    led = [bundle for bundle in bundles if bundle.guidance != 1]
    one = "; one where the model takes guidance as an input" if any(bundle.embedded_guidance for bundle in led) else ""
    none = f"; none for {', '.join(bundle.name for bundle in bundles if bundle.guidance == 1)}" if len(led) < len(bundles) else ""
    guided = (
        f"guidance {settings.guidance:g} (two branches{one}{none})" if settings.guidance > 1 and (led or not bundles) else "no guidance"
    )
    planned = any(trial.plan for bundle in bundles for trial in bundle.trials)
    own = " (a plan has its own)" if planned else ""
    threads = "1 thread" if settings.threads == 1 else f"{settings.threads} threads"
    return (
        f"Each runtime has a process of its own with {threads}; its outputs were held against the original's recorded ones there before "
        f"it was timed. After a round to warm up, runtimes and budgets took turns in {ROUNDS} rounds, {settings.duration:g} s of timing a "
        f"row in all. A step is one forward pass for {many}, one branch; a picture is {settings.steps} steps{own} with {guided}. Times are "
        "medians; spread is the distance of the quartiles of the rounds' medians, shares and ratios are medians of the ratios within "
        "rounds. First is the first run at a budget in a new process, the first of all with what a runtime prepares once; switch is the "
        "first run after another budget, less a steady one. Peaks are the best matrix product of numpy and torch in each precision, and "
        "a copy; bytes are the weights and activations that the manifest counts."
    )
