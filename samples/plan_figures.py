"""The figures of a sample that draws along plans, in its record's words: a table, how they were made, and a plot."""

from pathlib import Path
from typing import Any

from elastic_runtime.ralu.plan import shares
from plots import LINES, panels, real_line
from record import evaluation

PLAIN, ABLATION, OTHERS = "full", "without renoising", "in other shares"


def table(record: dict[str, Any]) -> str:
    """A Markdown table, one row a plan and one for real glyphs; FLOPs are of all steps of one branch of guidance."""
    facts = evaluation(record)
    lines = [
        "| plan | steps | tokens | GFLOPs a picture | ms a picture | as asked | Fréchet distance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in facts["plans"]:
        steps, tokens = (", ".join(map(str, row[name])) for name in ("steps", "tokens"))
        figures = f"{row['flops'] / 1e9:.1f} | {row['milliseconds']:.0f} | {row['accuracy']:.1%} | {row['frechet_distance']:.1f} |"
        lines.append(f"| {row['plan']} | {steps} | {tokens} | {figures}")
    real = facts["real"]
    lines.append(f"| real glyphs | | | | | {real['accuracy']:.1%} | {real['frechet_distance']:.1f} |")
    return "\n".join(lines)


def protocol(record: dict[str, Any]) -> str:
    """How the figures were made, in one paragraph."""
    facts = evaluation(record)
    how, minutes = facts["protocol"], sum(row["seconds"] for row in facts["plans"]) / 60
    return (
        f"{how['samples']:,} pictures along each plan, classes in turn, from the same noise (seed {how['seed']}), guidance "
        f"{how['guidance']:g} (two branches; GFLOPs are of one); drawn through the bundle ({facts['where']}) in {minutes:.0f} minutes on a "
        f"{facts['machine']}. Milliseconds are of one picture alone, decoder included, the median of {how['rounds']} rounds of all plans "
        "in turn. The judge is `samples/classifier.py --side 64`; its accuracy on the 3,500 real glyphs that it has never seen is in the "
        "last row. Distances are to the features of these 3,500; the last row's is that of "
        f"{facts['real']['pictures']:,} other real glyphs, the ones that the judge learned from."
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """Accuracy and Frechet distance against FLOPs: a line of step counts for each plan, shared out over its stages as in the preset; the
    ablations, and other shares, as points."""
    facts = evaluation(record)
    own = {row["plan"]: row["steps"] for row in facts["plans"]}
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(facts["plans"], key=lambda row: row["flops"]):
        name = row["plan"].partition(",")[0]
        if ABLATION in name:
            name = f"RALU {ABLATION}"
        elif name in own and tuple(row["steps"]) != shares(own[name], sum(row["steps"])):
            name = f"{name} {OTHERS}"
        lines.setdefault(name, []).append(row)
    what = (("accuracy", "classified as asked (%)", 100), ("frechet_distance", "Fréchet distance (lower is better)", 1))
    with panels(path) as axes:
        for panel, (name, label, unit) in zip(axes, what, strict=True):
            for (words, rows), (color, marker) in zip(sorted(lines.items()), LINES, strict=False):
                x, y = [row["flops"] / 1e9 for row in rows], [unit * row[name] for row in rows]
                line = "none" if ABLATION in words or OTHERS in words else "-"
                panel.plot(x, y, color=color, marker=marker, linestyle=line, linewidth=2, markersize=6, label=words)
                below = {"xytext": (0, -14), "ha": "center"} if words == PLAIN else {"xytext": (0, 7), "ha": "center"}
                for row, *place in zip(rows, x, y, strict=True):
                    panel.annotate(f"{sum(row['steps'])}", place, textcoords="offset points", color=color, fontsize=8, **below)
            real_line(panel, unit * facts["real"][name], "real glyphs")
            panel.set_axisbelow(True)
            panel.margins(x=0.08, y=0.1)
            panel.set_xlabel("GFLOPs a picture, one branch")
            panel.set_ylabel(label)
            if name == "frechet_distance":
                panel.set_yscale("log")
