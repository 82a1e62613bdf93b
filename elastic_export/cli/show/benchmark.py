"""What `bench` prints: a benchmark, and a comparison of two."""

from collections.abc import Iterable

from elastic_bench.compare import Change
from elastic_bench.figures import Figures, figures, method
from elastic_bench.load import COLUMNS, LoadReport, cells
from elastic_bench.pareto import SAME
from elastic_bench.records import BundleReport, Report
from elastic_export.cli.show import line, table
from elastic_runtime.contract.budget import key


def benchmark(report: Report) -> None:
    """What a benchmark found, and how."""
    for opened in report.bundles:
        _runtimes(opened)
        rows = list(figures(opened, report.settings, report.peaks))
        if rows:
            columns = (
                "runtime", "budget", "step ms", "p90", "p95", "p99", "spread", "times faster", "first ms", "switch ms", "time share",
                "FLOP share", "GFLOP/s", "of peak", "GB/s", "of peak", "picture ms", "images/s", *sorted(rows[0].row.joules),
            )  # fmt: skip
            table(f"{opened.name}: a step of batch {report.settings.batch}", columns, [_benchmark_row(row) for row in rows])
        _streams(opened)
        if opened.trials:
            planned = any(trial.plan for trial in opened.trials)
            trials = sorted((trial for trial in opened.trials if trial.front or planned), key=lambda trial: trial.seconds)
            front = f"the front of time against nearness to the full budget, of {len(opened.trials)} ways (--html has them all)"
            table(
                f"{opened.name}: {'pictures along plans' if planned else front}",
                ("runtime", "plan" if planned else "budget", "weak branch", "steps", "ms", "PSNR dB", "cosine"),
                [
                    (
                        trial.runtime, trial.where, key(trial.guidance_budget) if trial.guidance_budget else "the same", trial.steps,
                        _ms(trial.seconds), "same" if trial.psnr_db >= SAME else f"{trial.psnr_db:.1f}", f"{trial.cosine:.5f}",
                    )
                    for trial in trials
                ],
            )  # fmt: skip
        if opened.card:
            what = "plan" if opened.card[0].plan else "budget"
            rows_ = [(row.where, f"{row.accuracy:.1%}", f"{row.frechet_distance:.2f}") for row in opened.card]
            table(
                f"{opened.name}: quality, from the model card",
                (what, "accuracy", "Frechet distance"),
                rows_,
            )
        if opened.recommendation:
            line(opened.recommendation)
    most = report.peaks
    line(f"{report.machine}: peaks {most.flops_per_second / 1e9:.0f} GFLOP/s, {most.bytes_per_second / 1e9:.1f} GB/s")
    line("energy: " + "; ".join(f"{name} {what}" for name, what in report.energy.items()))
    line(method(report.settings, report.bundles))


def load(report: LoadReport) -> None:
    """Who was on time at which load, and how that was measured."""
    table(f"{report.bundle}: {report.model} on {report.where}", COLUMNS, [cells(row) for row in report.rows])
    line(f"{report.method} {report.machine}.")


def _runtimes(opened: BundleReport) -> None:
    rows = []
    sentences = []  # too long for a column
    for runtime in opened.runtimes:
        held = runtime.held or runtime.precision
        if runtime.missing or runtime.failure:
            state, why = ("missing", runtime.missing) if runtime.missing else ("FAILED", runtime.failure)
            rows.append((runtime.runtime, held, "-", "-", "-", state))
            sentences.append(f"{runtime.runtime}: {state}: {why}")
            continue
        worst = max(runtime.checked, key=lambda row: row.share)
        error = f"{worst.max_abs:.1e} of {worst.bounded}"
        rows.append((runtime.runtime, held, error, f"{runtime.load_seconds:.2f}", _mb(runtime.peak_bytes), str(runtime.where)))
        sentences += [f"{runtime.runtime}: {what}: {why}" for what, why in runtime.skipped.items()]
    table(f"{opened.name}: {opened.model}", ("runtime", "precision", "checked, max abs", "load s", "peak MB", "on"), rows)
    for sentence in sentences:
        line(sentence)


def _benchmark_row(each: Figures) -> tuple[object, ...]:
    row, step = each.row, each.row.step
    return (
        each.runtime.runtime, key(row.budget), _ms(step.p50), _ms(step.p90), _ms(step.p95), _ms(step.p99), f"{step.spread:.1%}",
        _figure(each.speedup, ".2f"), _ms(row.first_seconds), _ms(row.switch_seconds), f"{each.time_share:.0%}",
        _figure(each.flop_share, ".0%"), _figure(each.flops_per_second, ".0f", 1e9), _figure(each.compute_share, ".0%"),
        _figure(each.bytes_per_second, ".1f", 1e9), _figure(each.bandwidth_share, ".0%"), _ms(each.picture),
        _figure(each.images_per_second, ".2f"), *(f"{row.joules[name]:.3g} J" for name in sorted(row.joules)),
    )  # fmt: skip


def _streams(opened: BundleReport) -> None:
    rows = [
        (
            runtime.runtime,
            key(row.budget),
            stream.queries,
            _ms(stream.p90),
            f"{stream.seconds:.0f}",
            "" if stream.complete else "time limit",
        )
        for runtime in opened.runtimes
        for row in runtime.rows
        if (stream := row.single_stream)
    ]
    if rows:
        columns = ("runtime", "budget", "queries", "p90 ms", "seconds", "")
        table(f"{opened.name}: single stream (MLPerf-style, not MLPerf), a query is a picture", columns, rows)


def changes(differences: Iterable[Change], tolerance: float) -> None:
    """What a comparison of two benchmarks found."""
    rows = [
        (
            " ".join(change.place), _ms(change.before), _ms(change.after), _figure(change.ratio and change.ratio - 1, "+.1%"),
            _figure(change.noise, ".1%"), change.verdict, change.why,
        )
        for change in differences
    ]  # fmt: skip
    table(f"a step before and now; tolerance {tolerance:.0%}", ("row", "before ms", "now ms", "change", "noise", "", ""), rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.{0 if abs(seconds) >= 1 else 1 if abs(seconds) >= 0.1 else 2}f}"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)
