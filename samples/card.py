"""Write a trained sample's figures, from its JSON record, into the pages that quote them, and plot them.

    python samples/card.py elastic_export/pretrained/elit-mnist.json \\
        elastic_export/pretrained/elit-mnist.md docs/quality.md --plot docs/elit-mnist-quality.png

The model's card and docs/quality.md hold the figures between `<!-- figures elit-mnist -->` and `<!-- end of figures -->`,
so that both and the bundle's manifest say the same. With --check nothing is written, and a page that differs is an error.
"""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

import plan_figures
from plots import LINES, REAL, panels, real_line
from record import evaluation, read


def series(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each guidance scale, under its words, the bundle's `quality` first; then those of models graded beside it on its axis.

    Raises: SystemExit where a model beside it was not graded in the same way.
    """
    own, rows = evaluation(record), {}
    for label, graded in {"": own, **_beside(record)}.items():
        if graded["axis"] != own["axis"]:
            continue
        for scale in own["protocol"]["guidance"]:
            words = _scale(scale) + f" {label}" * bool(label)
            rows[words] = [row for row in graded["rows"] if row["guidance"] == scale]
            if [row["budget"] for row in rows[words]] != [row["budget"] for row in own["rows"] if row["guidance"] == scale]:
                raise SystemExit(f"{label!r} was graded at other budgets: grade it again")
    return rows


def _beside(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Evaluations of models graded beside the record's own, which must have been graded alike."""
    beside: dict[str, dict[str, Any]] = record.get("beside", {})
    for label, graded in beside.items():
        for name in ("protocol", "real"):
            aside = {"drops": (), "prompt": record["evaluation"][name].get("prompt")}  # older records have no word of it
            if {**aside, **graded[name], "drops": ()} != {**aside, **record["evaluation"][name], "drops": ()}:
                raise SystemExit(f"{label!r} was graded with another {name} ({graded[name]}): grade it again")
    return beside


def _scale(scale: float) -> str:
    return f"guidance {scale:g}" if scale > 1 else "no guidance"


def table(record: dict[str, Any]) -> str:
    """The figures as a Markdown table, one row a budget and one for real digits."""
    axis, real, columns = evaluation(record)["axis"], evaluation(record)["real"], series(record)
    lines = [
        f"| {axis or 'budget'} | GFLOPs a forward pass |" + "".join(f" as asked, {words} | Fréchet distance |" for words in columns),
        "|---:|---:|" + "---:|---:|" * len(columns),
    ]
    for rows in zip(*columns.values(), strict=True):
        flops = f"{rows[0]['flops'] / 1e9:.2f}" if rows[0]["flops"] else "-"
        figures = "".join(f" {row['accuracy']:.1%} | {row['frechet_distance']:.1f} |" for row in rows)
        lines.append(f"| {rows[0]['budget'][axis] if axis else 'all'} | {flops} |{figures}")
    for label, graded in _beside(record).items():
        if graded["axis"] != axis:  # a model without this axis has a row of its own
            flops = f"{graded['rows'][-1]['flops'] / 1e9:.2f}" if graded["rows"][-1]["flops"] else "-"
            figures = "".join(f" {row['accuracy']:.1%} | {row['frechet_distance']:.1f} |" for row in graded["rows"])
            lines.append(f"| {label} | {flops} |{figures}")
    lines.append("| real digits | |" + f" {real['accuracy']:.1%} | {real['frechet_distance']:.1f} |" * len(columns))
    return "\n".join(lines)


def drops(record: dict[str, Any]) -> str:
    """What dropping tokens does, as a Markdown table, one row a fraction."""
    lines = ["| dropped | tokens kept | GFLOPs a forward pass | as asked | Fréchet distance |", "|---:|---:|---:|---:|---:|"]
    for row in evaluation(record)["drops"]:
        kept, flops = sum(row["kept"]) / len(row["kept"]), row["flops"] / 1e9
        lines.append(
            f"| {row['drop_fraction']:.0%} | {kept:.0f} | {flops:.2f} | {row['accuracy']:.1%} | {row['frechet_distance']:.1f} |"
        )  # fmt: skip
    return "\n".join(lines)


def kept(record: dict[str, Any]) -> str:
    """How many tokens the router keeps from step to step, in one sentence."""
    row = evaluation(record)["drops"][0]
    counts = ", ".join(f"{count:.0f}" for count in row["kept"])
    return f"Tokens that the router keeps with {row['drop_fraction']:.0%} dropped, from the first step, pure noise, to the last: {counts}."


def protocol(record: dict[str, Any]) -> str:
    """How the figures were made, in one paragraph."""
    own = evaluation(record)
    how, real = own["protocol"], own["real"]
    weak = how["guidance_budget"]
    branch = f"the weak branch at {_pairs(weak)}" if weak else "both branches at the same budget"
    minutes = sum(row["seconds"] for row in own["rows"]) / 60
    scales = " and ".join(_scale(scale) for scale in how["guidance"])
    asked = f"prompts such as `{how['prompt'].format('seven')}`" if how.get("prompt") else "classes"
    return (
        f"{how['samples']:,} pictures at each budget, {asked} in turn, from the same noise (seed {how['seed']}): {how['sampler']} sampler, "
        f"{how['steps']} steps, {scales} ({branch}); drawn through the bundle ({own['where']}) "
        f"in {minutes:.0f} minutes on a {own['machine']}. "
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
    if "evaluation" not in record:
        parts = ["Not measured yet."]
    elif "plans" in record["evaluation"]:
        parts = [plan_figures.table(record), plan_figures.protocol(record)]
    else:
        dropped = [drops(record), kept(record)] if record["evaluation"].get("drops") else []
        parts = [table(record), *dropped, protocol(record)]
    return "\n\n".join(parts + ([training(record)] if "training" in record else []))


def filled(page: str, name: str, content: str, where: str) -> str:
    """`page` with `content` between the markers of `name`."""
    pattern = re.compile(rf"(<!-- figures {re.escape(name)} -->\n).*?(<!-- end of figures -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"{where} must hold '<!-- figures {name} -->' and '<!-- end of figures -->' once: add both lines")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", page)


def plot(record: dict[str, Any], path: Path) -> None:
    """Accuracy and Frechet distance against the budget, a line for each guidance scale, with each budget's GFLOPs along the top."""
    axis, real, lines = evaluation(record)["axis"], evaluation(record)["real"], series(record)
    first = next(iter(lines.values()))
    budgets = [row["budget"][axis] for row in first]
    what = (("accuracy", "classified as asked (%)", 100), ("frechet_distance", "Fréchet distance (lower is better)", 1))
    with panels(path) as axes:
        for panel, (figure_name, label, unit) in zip(axes, what, strict=True):
            for (words, rows), (color, marker) in zip(lines.items(), itertools.cycle(LINES), strict=False):
                values = [unit * row[figure_name] for row in rows]
                panel.plot(budgets, values, color=color, marker=marker, linewidth=2, markersize=6, label=words, clip_on=False)
            real_line(panel, unit * real[figure_name], "real digits")
            if budgets[-1] > 2 * len(budgets):  # doublings, and not one by one
                panel.set_xscale("log", base=2)
            panel.set_xticks(budgets, [str(budget) for budget in budgets])
            panel.minorticks_off()
            panel.margins(x=0.08)
            panel.set_axisbelow(True)
            panel.set_xlabel(axis)
            panel.set_ylabel(label)
            low, high = panel.get_ylim()
            panel.set_ylim(*((low, 101) if unit == 100 else (0, high)))
            if unit == 1 and high > 50 * unit * real[figure_name]:
                panel.set_yscale("log")
                panel.set_ylim(real[figure_name] / 2, high)
            if all(row["flops"] for row in first):
                top = panel.secondary_xaxis("top")
                top.set_xticks(budgets, [f"{row['flops'] / 1e9:.2f}" for row in first])
                top.set_xlabel("GFLOPs a forward pass", color=REAL)
                top.tick_params(colors=REAL, which="both")
                top.minorticks_off()


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
        (plan_figures.plot if "plans" in record["evaluation"] else plot)(record, given.plot)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("record", type=Path, help="JSON record of a trained sample")
    options.add_argument("pages", type=Path, nargs="*", help="Markdown pages to fill: the card, docs/quality.md")
    options.add_argument("--plot", type=Path, help="PNG of the figures")
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    main(options.parse_args())
