"""Hold benchmarks against the goals of speed, and write the table into docs/performance.md.

    python samples/goals.py build/goals/*.json --bundles build/goals --page docs/performance.md

Each report is one run of `elastic-export bench` with peers beside ours (`make bench` says which). Ratios are within that run. Without
--page the table goes to the screen. The page holds it between `<!-- figures goals -->` and `<!-- end of figures -->`.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from card import filled
from elastic_bench.figures import Figures, figures
from elastic_bench.files import read
from elastic_bench.records import BundleReport, Peaks, Report, RuntimeReport
from elastic_bench.runtimes import ways
from elastic_bench.statistics import ratio
from elastic_export.bench.peers import PEERS
from elastic_runtime import Bundle, ElasticError, UsageError
from elastic_runtime.choosing.precisions import keeping
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.files.atomic import save

NAME = "goals"
COMPILED = "torch-compile"  # what the goals are times of
NEAR = 40.0  # dB of a step from the original's, where no card says what a precision does to pictures
HEAD = (
    "| model | batch | budget | float32 ms | over torch.compile (at the peak) | best ms | over torch.compile | over torch's best | "
    "over OpenVINO's own | time / FLOP share | least ms |"
)


@dataclass(frozen=True)
class Goal:
    """One model at one budget and batch: ours in float32, ours in the best precision that keeps quality, and the peers; None: not there.

    Ratios say how many times longer the other took. `evenness`: the best's share of its largest budget's time over that of FLOPs.
    """

    model: str
    batch: int
    budget: str
    exact: Figures
    best: Figures
    compiled: Figures | None
    torch: Figures | None
    openvino: Figures | None

    @property
    def evenness(self) -> float | None:
        return self.best.time_share / self.best.flop_share if self.best.flop_share else None

    @property
    def _at_most(self) -> str:
        """What float32 could be over torch.compile, were it as fast as the peaks allow."""
        least = self.exact.least
        return f" ({self.compiled.row.step.p50 / least:.2f})" if self.compiled and least else ""

    def row(self) -> str:
        cells = [self.model, str(self.batch), self.budget, _ms(self.exact), _over(self.compiled, self.exact) + self._at_most]
        cells += [
            f"{_ms(self.best)} ({self.best.runtime.runtime.split()[0]} {self.best.runtime.precision})",
            _over(self.compiled, self.best),
        ]
        cells += [_over(peer, self.best, named=True) for peer in (self.torch, self.openvino)]
        cells.append("-" if self.evenness is None else f"{self.evenness:.2f}")
        least = self.best.least
        cells.append("-" if least is None else f"{1e3 * least:.2f} ({least / self.best.row.step.p50:.0%})")
        return f"| {' | '.join(cells)} |"


def best_peaks(reports: Sequence[Report]) -> Peaks:
    """The best of what was measured before each run: what else went on then took from it.

    Raises: UsageError for reports of several machines.
    """
    if len(machines := dict.fromkeys(str(report.machine) for report in reports)) > 1:
        raise UsageError(f"the reports are of several machines, {' and '.join(machines)}: give those of one")
    every = [report.peaks for report in reports]
    names = dict.fromkeys(name for each in every for name in each.rates)
    return Peaks(
        flops_per_second=max(each.flops_per_second for each in every),
        bytes_per_second=max(each.bytes_per_second for each in every),
        rates={name: max(each.rates.get(name, 0.0) for each in every) for name in names},
    )


def goals(report: Report, bundle: BundleReport, manifest: Manifest, peaks: Peaks) -> Iterator[Goal]:
    """A goal for each budget that was timed; what draws worse than the card allows does not count as ours."""
    every: dict[str, list[Figures]] = {}
    for each in figures(bundle, report.settings, peaks):
        every.setdefault(" ".join(f"{name} {value}" for name, value in each.row.budget.items()), []).append(each)
    for budget, here in every.items():
        peers = [each for each in here if each.runtime.runtime in PEERS]
        ours = [each for each in here if each.runtime.runtime not in PEERS and _keeps(manifest, each.runtime)]
        exact, best = _fastest([each for each in ours if each.runtime.precision == EXACT]), _fastest(ours)
        if exact is None or best is None:
            continue
        yield Goal(
            model=bundle.name,
            batch=report.settings.batch,
            budget=budget,
            exact=exact,
            best=best,
            compiled=next((each for each in peers if each.runtime.runtime == COMPILED), None),
            torch=_fastest([each for each in peers if not _converted(each)]),
            openvino=_fastest([each for each in peers if _converted(each)]),
        )


def section(reports: list[Report], bundles: Path) -> str:
    """What stands between the markers."""
    peaks = best_peaks(reports)
    rows = [
        goal.row()
        for report in reports
        for bundle in report.bundles
        for goal in goals(report, bundle, Bundle.open(bundles / bundle.name).manifest, peaks)
    ]
    first = reports[0]
    used = {
        runtime.where for report in reports for bundle in report.bundles for runtime in bundle.runtimes if runtime.rows and runtime.where
    }
    broken = {
        f"{each.runtime} at {bundle.name}, batch {report.settings.batch}": each.failure
        for report in reports
        for bundle in report.bundles
        for each in bundle.runtimes
        if each.failure
    }
    without = f" Without figures: {'; '.join(f'{name} ({failure})' for name, failure in broken.items())}." if broken else ""
    return "\n".join(
        [
            HEAD,
            "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"`make goals` on a {first.machine}, {first.settings.threads} threads; {', '.join(sorted(used))}. Ratios are medians "
            "within rounds of one run, and say how many times longer the other took. Best is the fastest of ours that the bundle's card "
            f"finds as good as float32, or, where there is none, whose step is within {NEAR:.0f} dB of the original's. Least is what the "
            f"FLOPs and bytes of a step take at this machine's peaks ({_rates(peaks)}, the best of those measured before each run), and "
            f"its share of the time; at the peak is what torch.compile took over the least of float32.{without}",
        ]
    )


def _rates(peaks: Peaks) -> str:
    """Each rate but those below float32's, which are of no use."""
    rates = {name: rate for name, rate in peaks.rates.items() if rate >= peaks.flops_per_second}
    return ", ".join([*(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()), f"{peaks.bytes_per_second / 1e9:.0f} GB/s"])


def _converted(peer: Figures) -> bool:
    return PEERS[peer.runtime.runtime].package == "openvino"


def _keeps(manifest: Manifest, runtime: RuntimeReport) -> bool:
    beside = next((way.precision for name, (_, way) in ways().items() if name == runtime.runtime.split()[0]), None)
    precisions = {runtime.precision, beside or runtime.precision}  # of weights of few bits, and of what is computed beside them
    if manifest.precisions or precisions == {EXACT}:
        return precisions <= {*keeping(manifest)}
    return min((row.psnr_db for row in runtime.checked), default=0.0) >= NEAR


def _fastest(rows: list[Figures]) -> Figures | None:
    return min(rows, key=lambda each: each.row.step.p50, default=None)


def _ms(each: Figures) -> str:
    return f"{1e3 * each.row.step.p50:.2f}"


def _over(peer: Figures | None, ours: Figures, named: bool = False) -> str:
    if peer is None:
        return "-"
    times = f"{ratio(peer.row.rounds, ours.row.rounds):.2f}"
    return f"{times} ({peer.runtime.runtime.removeprefix('torch-')})" if named else times


def main(given: argparse.Namespace) -> None:
    written = section([read(path) for path in given.reports], given.bundles)
    if given.page is None:
        print(written)
        return
    save(given.page, filled(given.page.read_text(encoding="utf-8"), NAME, written, str(given.page)).encode())


def options() -> argparse.ArgumentParser:
    """What the script takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="what elastic-export bench --json wrote")
    parser.add_argument("--bundles", type=Path, required=True, help="the folder in which the bundles are, for their cards")
    parser.add_argument("--page", type=Path, help="Markdown page to fill: docs/performance.md")
    return parser


if __name__ == "__main__":
    try:
        main(options().parse_args())
    except ElasticError as error:
        raise SystemExit(str(error)) from None
