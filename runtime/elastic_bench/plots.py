"""The plots of a benchmark: time against quality, latency by budget, cost against FLOPs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_bench.figures import Figures
from elastic_bench.load import LoadReport, LoadRow
from elastic_bench.pareto import SAME, graded
from elastic_bench.records import BundleReport, Row, Settings, Trial
from elastic_bench.svg import COLORS, Point, Series, legend, plot
from elastic_runtime.contract.budget import Budget


@dataclass(frozen=True)
class Plot:
    """An SVG element with its title, the series of its legend, and a sentence on how to read it."""

    title: str
    svg: str
    legend: list[Series]
    note: str = ""


def colors(bundle: BundleReport) -> dict[str, str]:
    """A colour for each runtime, the same in every plot."""
    return {runtime.runtime: COLORS[i % len(COLORS)] for i, runtime in enumerate(bundle.runtimes)}


def latency_plot(bundle: BundleReport, settings: Settings) -> Plot:
    """Median milliseconds of a step by budget, a line for each runtime, whiskers to p90."""
    shades, values = colors(bundle), sorted({_value(row.budget) for runtime in bundle.runtimes for row in runtime.rows})
    series = [
        Series(runtime.runtime, [_step(runtime.runtime, row) for row in runtime.rows], shades[runtime.runtime])
        for runtime in bundle.runtimes
        if runtime.rows
    ]
    title = f"Latency of a step, batch {settings.batch}"
    svg = plot(series, bundle.axis or "budget", "ms (median; whisker: p90)", title, log_x=values[-1] >= 8 * max(values[0], 1), ticks=values)
    return Plot(title, svg, legend(series))


def cost_plot(bundle: BundleReport, rows: Sequence[Figures]) -> list[Plot]:
    """Share of time against share of FLOPs; nothing where FLOPs are not known."""
    shades = colors(bundle)
    series = [Series("time = FLOPs", [Point(0.0, 0.0), Point(100.0, 100.0)], "#9aa1a9", dashed=True, marks=False)]
    for runtime in bundle.runtimes:
        points = [
            Point(
                100 * each.flop_share,
                100 * each.time_share,
                f"{runtime.runtime}, {Budget(**each.row.budget)}: {each.time_share:.0%} of the time, {each.flop_share:.0%} of the FLOPs",
            )
            for each in rows
            if each.runtime == runtime and each.flop_share is not None
        ]
        if points:
            series.append(Series(runtime.runtime, points, shades[runtime.runtime]))
    if len(series) == 1:
        return []
    title = "Does a smaller budget cost as little as its FLOPs?"
    svg = plot(series, "FLOPs, % of the largest budget", "time, % of the largest budget", title)
    return [Plot(title, svg, legend(series), "Above the dashed line, time falls less than FLOPs.")]


def trial_plot(bundle: BundleReport, settings: Settings) -> Plot:
    """Time of a picture against its nearness to the full budget's, with the front."""
    shades = colors(bundle)

    def point(trial: Trial) -> Point:
        same = trial.psnr_db >= SAME
        weak = f", weak branch {Budget(**trial.guidance_budget)}" if trial.guidance_budget else ""
        near = "the same pictures but for rounding" if same else f"{trial.psnr_db:.1f} dB"
        words = f"{trial.runtime}, {trial.plan or Budget(**trial.budget)}{weak}, {trial.steps} steps: {1e3 * trial.seconds:.1f} ms, {near}"
        return Point(1e3 * trial.seconds, min(trial.psnr_db, SAME), words, hollow=not trial.front)

    front = sorted((trial for trial in bundle.trials if trial.front), key=lambda trial: trial.seconds)
    series = [Series("front", [point(trial) for trial in front], "#3b4046", dashed=True, marks=False)]
    for runtime in bundle.runtimes:
        if own := [point(trial) for trial in bundle.trials if trial.runtime == runtime.runtime]:
            series.append(Series(runtime.runtime, own, shades[runtime.runtime], line=False))
    title = "Time against quality: budget, steps and the weak branch's budget"
    many = "a picture" if settings.batch == 1 else f"{settings.batch} pictures"
    svg = plot(series, f"ms for {many}", "PSNR against the full budget, dB", title, from_zero=False)
    note = f"Filled: nothing is both faster and nearer. Hollow: dominated. {SAME:g} dB stands for every smaller difference."
    return Plot(title, svg, legend(series), note)


def card_plot(bundle: BundleReport) -> list[Plot]:
    """Time of a picture against the card's Frechet distance at each budget, for the runtimes that compute as the card's did."""
    shades, grades = colors(bundle), graded(bundle)
    series: list[Series] = []
    for name in dict.fromkeys(trial.runtime for trial, _ in grades):
        points = [
            Point(
                1e3 * trial.seconds,
                row.frechet_distance,
                f"{name}, {trial.plan or Budget(**trial.budget)}: Fréchet distance {row.frechet_distance:.1f}, "
                f"{row.accuracy:.1%} as asked, {1e3 * trial.seconds:.1f} ms",
                label="" if series else trial.plan or str(_value(trial.budget)),
            )
            for trial, row in grades
            if trial.runtime == name
        ]
        if points:
            series.append(Series(name, sorted(points, key=lambda point: point.x), shades[name]))
    if not series:
        return []
    title = "Time against the card's quality"
    planned = grades[0][0].plan is not None
    what = "ms a picture" if planned else f"ms a picture of {bundle.trials[0].steps} steps"
    svg = plot(series, what, "Fréchet distance (lower is better)", title)
    note = f"Points are {'plans' if planned else bundle.axis}. The distances are the model card's, with its own steps and guidance."
    return [Plot(title, svg, legend(series), note)]


def load_plots(report: LoadReport) -> list[Plot]:
    """By load, a line for each way: the share of pictures on time, and what those drawn are worth by the card where there is one."""
    shades = {way: COLORS[i % len(COLORS)] for i, way in enumerate(report.ways)}
    loads = sorted({row.load for row in report.rows})
    shares: list[tuple[str, str, Callable[[LoadRow], float | None]]] = [
        ("Who is on time", "on time, % of all requests", lambda row: row.on_time),
        ("What is drawn", "quality by the card, %", lambda row: row.quality),
    ]
    plots: list[Plot] = []
    for title, label, share in shares:
        series = []
        for way in report.ways:
            values = [(row, share(row)) for row in report.of(way)]
            points = [Point(row.load, 100 * value, f"{way}, load {row.load:g}: {value:.1%}") for row, value in values if value is not None]
            if points:
                series.append(Series(way, points, shades[way]))
        if series:
            svg = plot(
                series, "load, 1 is what the best budget sustains", label, title, log_x=len(loads) > 1, ticks=loads, from_zero=not plots
            )
            plots.append(Plot(title, svg, legend(series)))
    return plots


def _step(name: str, row: Row) -> Point:
    words = f"{name}, {Budget(**row.budget)}: {1e3 * row.step.p50:.2f} ms, p90 {1e3 * row.step.p90:.2f}, {row.step.count} samples"
    return Point(_value(row.budget), 1e3 * row.step.p50, words, high=1e3 * row.step.p90)


def _value(budget: dict[str, int]) -> int:
    return next(iter(budget.values()), 1)
