"""Write a trained sample's figures, from its JSON record, into the pages that quote them, and plot them.

    python samples/card.py elastic_export/models/pretrained/elit-mnist.json \\
        elastic_export/models/pretrained/elit-mnist.md README.md --plot docs/elit-mnist-quality.png

A page holds the figures between `<!-- figures elit-mnist -->` and `<!-- end of figures -->`, so that all pages and the
bundle's manifest say the same. With --check nothing is written, and a page that differs is an error.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from record import read

INK, PAPER, REAL = "#1f4e79", "#ffffff", "#7a7a7a"


def table(record: dict[str, Any]) -> str:
    """The figures as a Markdown table, one row a budget and one for real digits."""
    evaluation = _evaluation(record)
    lines = [
        f"| {evaluation['axis']} | GFLOPs a forward pass | classified as asked | Fréchet distance |",
        "|---:|---:|---:|---:|",
    ]
    for row, detail in zip(record["quality"], evaluation["details"], strict=True):
        flops = f"{detail['flops'] / 1e9:.2f}" if detail["flops"] else "-"
        lines.append(f"| {row['budget'][evaluation['axis']]} | {flops} | {row['accuracy']:.1%} | {row['frechet_distance']:.1f} |")
    real = evaluation["real"]
    lines.append(f"| real digits | | {real['accuracy']:.1%} | {real['frechet_distance']:.1f} |")
    return "\n".join(lines)


def protocol(record: dict[str, Any]) -> str:
    """How the figures were made, in one paragraph."""
    evaluation = _evaluation(record)
    how, real = evaluation["protocol"], evaluation["real"]
    weak = how["guidance_budget"]
    branch = f", its weak branch at {_pairs(weak)}" if weak else ", both branches at the same budget"
    minutes = sum(detail["seconds"] for detail in evaluation["details"]) / 60
    return (
        f"{how['samples']:,} pictures at each budget, classes in turn, from the same noise (seed {how['seed']}): {how['sampler']} sampler, "
        f"{how['steps']} steps, guidance {how['guidance']:g}{branch}; drawn through the bundle ({evaluation['where']}) "
        f"in {minutes:.0f} minutes on a {evaluation['machine']}. "
        "The judge is `samples/classifier.py`; its accuracy on the 3,500 real digits that it has never seen is in the last row. "
        f"Distances are to the features of these 3,500; the last row's is that of {real['pictures']:,} other real digits, "
        "the ones that the judge learned from."
    )


def training(record: dict[str, Any]) -> str:
    """What the training took, in one sentence."""
    took = record["training"]
    return (
        f"Trained on {took['digits']:,} digits for {took['step']:,} steps of {took['batch']} "
        f"(peak rate {took['lr']:g}, EMA {took['ema']:g}) in {took['hours']:.1f} hours "
        f"with {took['threads']} threads of a {took['machine']}; last loss {took['loss']:.3f}."
    )


def section(record: dict[str, Any]) -> str:
    """What stands between the markers."""
    parts = [table(record), protocol(record)] if record.get("quality") else ["Not measured yet."]
    return "\n\n".join(parts + ([training(record)] if "training" in record else []))


def filled(page: str, name: str, content: str, where: str) -> str:
    """`page` with `content` between the markers of `name`."""
    pattern = re.compile(rf"(<!-- figures {re.escape(name)} -->\n).*?(<!-- end of figures -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"{where} must hold '<!-- figures {name} -->' and '<!-- end of figures -->' once: add both lines")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", page)


def plot(record: dict[str, Any], path: Path) -> None:
    """Accuracy and Frechet distance against the budget, with the GFLOPs of each budget along the top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    evaluation = _evaluation(record)
    axis, real = evaluation["axis"], evaluation["real"]
    budgets = [row["budget"][axis] for row in record["quality"]]
    panels = (
        ("classified as asked (%)", [100 * row["accuracy"] for row in record["quality"]], 100 * real["accuracy"]),
        ("Fréchet distance (lower is better)", [row["frechet_distance"] for row in record["quality"]], real["frechet_distance"]),
    )
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.edgecolor": "#9a9a9a",
    }
    with pyplot.rc_context(style):
        figure, plots = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", facecolor=PAPER)
        for panel, (label, values, reference) in zip(plots, panels, strict=True):
            panel.axhline(reference, color=REAL, linestyle=(0, (5, 3)), linewidth=1.2, label="real digits")
            panel.plot(budgets, values, color=INK, marker="o", linewidth=2, markersize=6, label="drawn by the bundle")
            panel.set_xscale("log", base=2)
            panel.set_xticks(budgets, [str(budget) for budget in budgets])
            panel.minorticks_off()
            panel.set_axisbelow(True)
            panel.set_xlabel(axis)
            panel.set_ylabel(label)
            low, high = min(*values, reference), max(*values, reference)
            room = max(0.12 * (high - low), 0.5)
            panel.set_ylim(*((low - room, 100.4) if label.endswith("(%)") else (0, high + room)))
            if all(detail["flops"] for detail in evaluation["details"]):
                top = panel.secondary_xaxis("top")
                top.set_xticks(budgets, [f"{detail['flops'] / 1e9:.2f}" for detail in evaluation["details"]])
                top.set_xlabel("GFLOPs a forward pass", color=REAL)
                top.tick_params(colors=REAL, which="both")
                top.minorticks_off()
        plots[0].legend(frameon=False, loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    if not record.get("evaluation"):
        raise SystemExit("the record holds no figures yet: make them with samples/evaluate.py BUNDLE --output RECORD.json")
    evaluation: dict[str, Any] = record["evaluation"]
    return evaluation


def _pairs(budget: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in budget.items())


def main(given: argparse.Namespace) -> None:
    record = read(given.record)
    for path in given.pages:
        page = path.read_text(encoding="utf-8")
        new = filled(page, given.record.stem, section(record), str(path))
        if given.check and new != page:
            raise SystemExit(f"{path} does not say what {given.record} says: run samples/card.py {given.record} {path}")
        if not given.check:
            path.write_text(new, encoding="utf-8")
    if given.plot:
        plot(record, given.plot)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("record", type=Path, help="JSON record of a trained sample")
    options.add_argument("pages", type=Path, nargs="*", help="Markdown pages to fill")
    options.add_argument("--plot", type=Path, help="PNG of the figures")
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    main(options.parse_args())
