"""Write a benchmark's figures into docs/performance.md, which quotes them, and plot latency by budget.

    python samples/speed.py build/bench.json docs/performance.md --plot docs/speed.svg

The page holds them between `<!-- figures speed -->` and `<!-- end of figures -->`. With --check nothing is written, no plot either, and
a page that differs is an error.
"""

import argparse
from pathlib import Path

from card import filled
from elastic_bench.figures import figures, method
from elastic_bench.files import read
from elastic_bench.plots import latency_plot
from elastic_bench.records import BundleReport, Report
from elastic_bench.statistics import ratio
from elastic_bench.svg import captioned
from elastic_runtime import ElasticError, UsageError
from elastic_runtime.contract.budget import key
from elastic_runtime.files.atomic import save

NAME = "speed"
OURS, TORCH = "onnxruntime", {"torch-compile": "torch.compile", "torch": "eager torch"}


def table(report: Report, bundle: BundleReport) -> str:
    """One row a budget: milliseconds of a step in each runtime, its share of FLOPs, and a picture in the fastest runtime."""
    points = list(figures(bundle, report.settings, report.peaks))
    names = list(dict.fromkeys(each.runtime.runtime for each in points))
    rows = {(each.runtime.runtime, *each.row.budget.values()): each for each in points}
    lines = [
        f"| {bundle.axis} | " + " | ".join(f"{name} ms" for name in names) + " | fastest time share | FLOP share | fastest picture ms |",
        "|---:|" + "---:|" * (len(names) + 3),
    ]
    for values in dict.fromkeys(tuple(each.row.budget.values()) for each in points):
        here = [rows[(name, *values)] for name in names if (name, *values) in rows]
        best = min(here, key=lambda each: each.row.step.p50)
        times = [f"{1e3 * rows[(name, *values)].row.step.p50:.2f}" if (name, *values) in rows else "-" for name in names]
        flops = "-" if best.flop_share is None else f"{best.flop_share:.0%}"
        drawn = [each.picture for each in here if each.picture]
        picture = f"{1e3 * min(drawn):.0f}" if drawn else "-"
        lines.append(f"| {', '.join(map(str, values))} | " + " | ".join(times) + f" | {best.time_share:.0%} | {flops} | {picture} |")
    return "\n".join(lines)


def beside_torch(report: Report) -> str | None:
    """How many times as long as ONNX Runtime torch takes for a step, over all budgets of all bundles; None where not both ran."""
    ratios: dict[str, list[float]] = {name: [] for name in TORCH}
    for bundle in report.bundles:
        points = figures(bundle, report.settings, report.peaks)
        rounds = {(each.runtime.runtime, key(each.row.budget)): each.row.rounds for each in points}
        for (name, budget), seconds in rounds.items():
            if name in ratios and (OURS, budget) in rounds:
                ratios[name].append(ratio(seconds, rounds[OURS, budget]))
    spans = [f"{min(each):.1f} to {max(each):.1f} times as long in {TORCH[name]}" for name, each in ratios.items() if each]
    return f"On the same weights and threads, a step takes {' and '.join(spans)} as in {OURS}." if spans else None


def section(report: Report) -> str:
    """What stands between the markers."""
    parts = []
    for bundle in report.bundles:
        if not any(runtime.rows for runtime in bundle.runtimes):
            continue
        parts += [f"**{bundle.model}**, ms a step at batch {report.settings.batch}:", table(report, bundle)]
        if bundle.recommendation:
            parts.append(bundle.recommendation)
    if remark := beside_torch(report):
        parts.append(remark)
    used = {runtime.where for bundle in report.bundles for runtime in bundle.runtimes if runtime.rows and runtime.where}
    parts.append(f"`make bench` on a {report.machine}; {', '.join(sorted(used))}. {method(report.settings, report.bundles)}")
    return "\n\n".join(parts)


def main(given: argparse.Namespace) -> None:
    if given.check and not given.pages:
        raise UsageError("--check holds pages against the report: give one, docs/performance.md")
    report = read(given.report)
    for path in given.pages:
        page = path.read_text(encoding="utf-8")
        new = filled(page, NAME, section(report), str(path))
        if given.check and new != page:
            raise SystemExit(f"{path} does not say what {given.report} says: run samples/speed.py {given.report} {path}")
        if not given.check:
            save(path, new.encode())
    if given.plot and not given.check:
        timed = [bundle for bundle in report.bundles if any(runtime.rows for runtime in bundle.runtimes)]
        plots = [(f"{bundle.model}: ms a step", latency_plot(bundle, report.settings)) for bundle in timed]
        save(given.plot, captioned([(title, plot.svg, plot.legend) for title, plot in plots]).encode())


def options() -> argparse.ArgumentParser:
    """What the script takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what elastic-export bench --json wrote")
    parser.add_argument("pages", type=Path, nargs="*", help="Markdown pages to fill: docs/performance.md")
    parser.add_argument("--plot", type=Path, help="SVG of latency by budget")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    return parser


if __name__ == "__main__":
    try:
        main(options().parse_args())
    except ElasticError as error:
        raise SystemExit(str(error)) from None
