"""Grade a bundle that draws glyphs along plans: how many are classified as asked, their Frechet distance to real ones, and the time.

    python samples/evaluate_plans.py BUNDLE --output ralu-digits.json --plot quality.png

Every plan stands beside plain sampling at full resolution: with as many steps as the plan, and with as many as cost the same FLOPs
(just fewer steps); RALU's beside themselves without renoising, and beside SPEED and MrFlow in as many steps as cost the same (MrFlow where
the bundle has its encoder: --components transformer,vae,encoder). The same classes are
drawn from the same noise each time. Times are of one picture alone, its decoder included, the plans in turn: run it on a quiet machine.

Each plan is written down when it is graded, and what an earlier run or the record has of the same protocol and weights is kept.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from classifier import Judge, load_judge
from digits import Digits
from elastic_export.pictures import grid, save
from elastic_runtime import Bundle, ElasticPipeline, UsageError
from elastic_runtime.choosing.cost import plan_flops
from elastic_runtime.contract.manifest import Manifest, Model, plan_label
from elastic_runtime.denoising.pictures import pictures
from elastic_runtime.ralu.offers import stepped
from elastic_runtime.ralu.plan import FULL, MRFLOW, PRESETS, SPEED, Plan, full
from grading import Grader, integers, run, tell
from plan_figures import ABLATION, plot, table
from record import machine, read, versions, write

SIDE, CLASSES = 64, 10
# Presets in this share of their own steps, too, and in shapes of their own: few steps of the last stage, and few of the first.
SPREAD = {"4x": (0.22, 0.55, 2, 3), "7x": (0.4, 0.6, 2)}
MOST = 100  # steps of SPEED and MrFlow
SPEEDS = (4, 20)  # steps of plain sampling that these are compared with, beside the presets
SHAPES = {"4x": ((2, 2, 2), (1, 3, 4), (5, 6, 3), (2, 6, 12), (10, 12, 4), (15, 18, 6))}


SAME = ("samples", "guidance", "seed")  # of a protocol: what decides which pictures are drawn


@dataclass(frozen=True)
class Protocol:
    """How pictures are drawn; `full` are step counts to grade at full resolution, `rounds` how often each plan is timed."""

    samples: int = 500
    full: tuple[int, ...] = (20,)
    guidance: float = 1.5
    seed: int = 0
    rounds: int = 15


def check(bundle: Bundle, protocol: Protocol) -> None:
    """Raise UsageError unless the bundle draws what the judge can grade, in equal numbers of each class."""
    model = bundle.manifest.model
    pixels = model.sample_shape[-1] * (model.vae.upscale if model.vae else 1)
    if model.patches is None or model.num_classes != CLASSES or pixels != SIDE:
        raise UsageError(
            f"the judge knows digits of {SIDE}x{SIDE} pixels drawn along a plan; {bundle.folder} draws {pixels}x{pixels} in "
            f"{model.num_classes} classes{'' if model.patches else ' at budgets: see samples/evaluate.py'}"
        )
    if protocol.samples < 2 * CLASSES or protocol.samples % CLASSES:
        raise UsageError(f"--samples must be a multiple of the {CLASSES} classes, 20 or more, got {protocol.samples}")


def side(model: Model) -> int:
    """Tokens along a side of the bundle's own picture."""
    assert model.patches is not None
    return model.sample_shape[-1] // model.patches.size


def flops(manifest: Manifest, plan: Plan) -> int:
    """FLOPs of a picture, one branch of guidance."""
    return plan_flops(manifest, plan, (side(manifest.model),) * 2)


def rows(manifest: Manifest, steps: tuple[int, ...]) -> dict[str, Plan]:
    """What is graded, by name: plain sampling with `steps`, and as many as a preset has or costs; presets, their ablations, and presets in
    fewer and more steps, which policies interpolate between."""
    tokens = side(manifest.model) ** 2
    scheduler = manifest.model.config.get("scheduler", {})

    def plain(count: int) -> Plan:
        return full(count, tokens, scheduler)

    def equal(name: str, target: int) -> Plan:
        """SPEED or MrFlow in the number of steps that costs most like `target` FLOPs."""
        return min(
            (stepped(name, count, tokens, scheduler) for count in range(2, MOST)), key=lambda plan: abs(flops(manifest, plan) - target)
        )

    one = flops(manifest, plain(1))
    alike = {plan.total for plan in PRESETS.values()} | {round(flops(manifest, plan) / one) for plan in PRESETS.values()}
    plans = {f"{FULL}, {count} steps": plain(count) for count in sorted({*steps, *alike}, reverse=True)}
    for name, plan in PRESETS.items():
        plans |= {name: plan, f"{name} {ABLATION}": replace(plan, renoise=False)}
        spread = [plan.spread(max(len(plan.steps), round(share * plan.total))) for share in SPREAD[name]]
        shaped = [replace(plan, steps=steps) for steps in SHAPES.get(name, ())]
        plans |= {plan_label(name, each.steps): each for each in (*spread, *shaped)}
    targets = [flops(manifest, plan) for plan in (*PRESETS.values(), *(plain(count) for count in SPEEDS))]
    for name in (SPEED, *([MRFLOW] if "encoder" in manifest.graphs else [])):
        plans |= {plan_label(name, plan.steps): plan for plan in (equal(name, target) for target in targets)}
    return plans


def draw(pipe: ElasticPipeline, plan: Plan, labels: np.ndarray, first: int, protocol: Protocol) -> np.ndarray:
    """Pictures of `labels` as the judge takes them, (B, 1, H, W) in [-1, 1]; the first has the noise of picture `first`."""
    result = pipe(
        class_labels=labels.tolist(),
        plan=plan,
        guidance_scale=protocol.guidance,
        generator=[np.random.default_rng([protocol.seed, first + index]) for index in range(len(labels))],
        output_type="np",
    )
    return result.images.mean(axis=-1)[:, None] * 2 - 1


Rows = list[dict[str, Any]]


def evaluate(
    bundle: Bundle,
    pipe: ElasticPipeline,
    judge: Judge,
    protocol: Protocol,
    batch: int = 50,
    known: Rows | None = None,
    keep: Callable[[Rows], None] = lambda rows: None,
) -> dict[str, Any]:
    """Figures of each of `rows`: `quality` as the manifest holds it, and `evaluation` with all that made them.

    `known` rows are not drawn again, but timed; `keep` is given all that are graded so far after each.

    Raises: UsageError for a bundle or protocol that does not fit.
    """
    check(bundle, protocol)
    manifest, size = bundle.manifest, (side(bundle.manifest.model),) * 2
    grader = Grader.of(judge, protocol.samples, SIDE)
    labels = np.arange(protocol.samples) % CLASSES
    plans, records = rows(manifest, protocol.full), []
    for name, plan in plans.items():
        if kept := [row for row in known or () if (row["plan"], tuple(row["steps"])) == (name, plan.steps)]:
            records.append(kept[0])
            continue
        begun, parts = time.perf_counter(), []
        for first in range(0, protocol.samples, batch):
            parts.append(draw(pipe, plan, labels[first : first + batch], first, protocol))
            tell(name, min(first + batch, protocol.samples), protocol.samples, begun)
        row = {"plan": name, "steps": list(plan.steps), "tokens": list(plan.tokens(*size)), "flops": flops(manifest, plan)}
        records.append(row | grader.grade(Digits(np.concatenate(parts), labels)) | {"seconds": round(time.perf_counter() - begun, 1)})
        keep(records)
    for row, milliseconds in zip(records, timed(pipe, list(plans.values()), protocol), strict=True):
        row["milliseconds"] = milliseconds
    names = ("steps", "accuracy", "frechet_distance")
    quality = [
        {"budget": {}, "plan": row["plan"].partition(",")[0]} | {name: row[name] for name in names}
        for row in records
        if ABLATION not in row["plan"]
    ]
    evaluation = {
        "protocol": asdict(protocol),
        "real": grader.real,
        "plans": records,
        "where": pipe.where,
        "weights_sha256": bundle.manifest.provenance.checkpoint_sha256,
        "versions": versions("elastic-export", "onnxruntime", "numpy", "torch"),
        "machine": machine(),
    }
    return {"quality": quality, "evaluation": evaluation}


def graded(protocol: Protocol, weights: str | None, *files: Path) -> Rows:
    """Rows of records or of what was kept of a run, where they were drawn by the same protocol with the same weights."""
    rows: Rows = []
    for path in files:
        evaluation = read(path).get("evaluation", {}) if path.exists() else {}
        own = {name: value for name, value in evaluation.get("protocol", {}).items() if name in SAME}
        if own == {name: value for name, value in asdict(protocol).items() if name in SAME} and evaluation.get("weights_sha256") == weights:
            rows += evaluation["plans"]
    return rows


def timed(pipe: ElasticPipeline, plans: list[Plan], protocol: Protocol) -> list[float]:
    """Median milliseconds of one picture for each plan, in turns."""
    taken: list[list[float]] = [[] for _ in plans]
    for turn in range(protocol.rounds):
        for plan, each in zip(plans, taken, strict=True):
            begun = time.perf_counter()
            draw(pipe, plan, np.array([turn % CLASSES]), turn, protocol)
            each.append(1e3 * (time.perf_counter() - begun))
    return [float(np.median(each)) for each in taken]


def sheet(pipe: ElasticPipeline, protocol: Protocol) -> Image.Image:
    """Each digit along each of `rows`, from the same noise in a column."""
    plans = rows(pipe.bundle.manifest, protocol.full)
    labels = np.arange(CLASSES)
    drawn = [pictures(draw(pipe, plan, labels, 0, protocol), "pil") for plan in plans.values()]
    return grid(drawn, list(plans))


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads or torch.get_num_threads())
    bundle = Bundle.open(given.bundle)
    protocol = Protocol(given.samples, tuple(given.full), given.guidance, given.seed, given.rounds)
    old = read(given.output) if given.output.exists() else {}
    with ElasticPipeline.from_pretrained(bundle, **({"threads": given.threads} if given.threads else {})) as pipe:
        weights, partial = bundle.manifest.provenance.checkpoint_sha256, given.output.with_name(given.output.name + ".partial")
        known = graded(protocol, weights, partial, given.output)

        def keep(rows: Rows) -> None:
            write(partial, {"evaluation": {"protocol": asdict(protocol), "weights_sha256": weights, "plans": rows}})

        figures = evaluate(bundle, pipe, load_judge(SIDE), protocol, given.batch, known, keep)
        if given.picture:
            save(sheet(pipe, protocol), given.picture)
    write(given.output, {"family": bundle.manifest.model.family} | old | figures)
    partial.unlink(missing_ok=True)
    record = read(given.output)  # as a card will see it
    print(table(record))
    if given.plot:
        plot(record, given.plot)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, help="a bundle of ralu-digits; export it with --batch 1-100, or it runs in small batches")
    options.add_argument("--output", type=Path, required=True, help="JSON record; what it already holds is kept")
    options.add_argument("--plot", type=Path, help="PNG of the figures against FLOPs")
    options.add_argument("--picture", type=Path, help="PNG of every digit along every plan")
    options.add_argument("--samples", type=int, default=500, help="pictures along each plan (default: %(default)s)")
    options.add_argument("--full", type=integers, default=(20,), help="step counts at full resolution (default: 20)")
    options.add_argument("--guidance", type=float, default=1.5, help="guidance scale; 1 is none (default: %(default)s)")
    options.add_argument(
        "--rounds", type=int, default=15, help="times that each plan draws one picture for the clock (default: %(default)s)"
    )
    run(main, options)
