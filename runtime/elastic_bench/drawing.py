"""Pictures drawn in turns by every runtime in every way: their time, and how near they come to those of the full
budget."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from elastic_bench.entry import Entry
from elastic_bench.pareto import SAME, front
from elastic_bench.records import Settings, Trial
from elastic_bench.subject import Drawing
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.reference import compare
from elastic_runtime.drawing.plans import takes
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.plan import PRESETS

PICTURES = 4  # batches that each way draws, from noise of its own
# pictures (N, H, W, C) by budget or plan, in words, from the same noise, drawn by the first runtime that can
Album = dict[str, np.ndarray]


def drawings(bundle: Bundle, budgets: Sequence[Budget], settings: Settings) -> list[Drawing]:
    """The ways to draw, the full budget first: each budget; with quality also at half and a quarter of the steps, and
    with the smallest budget for the weak branch of guidance.

    Along plans: full resolution with all steps and, always, with half and a quarter of them; and the presets that the
    bundle takes.
    """
    fewer = sorted({max(1, settings.steps // part) for part in (1, 2, 4)}, reverse=True)
    if bundle.manifest.model.patches:
        mixed = [(name, plan.total) for name, plan in PRESETS.items() if plan_budgets(bundle, name)]
        return [Drawing(budgets[-1], None, count) for count in fewer] + [Drawing(budgets[-1], None, total, name) for name, total in mixed]
    smallest, steps = budgets[0], fewer if settings.quality else [settings.steps]
    ways = []
    for count in steps:
        for budget in reversed(budgets):
            ways.append(Drawing(budget, None, count))
            if settings.quality and settings.guidance > 1 and budget != smallest:
                ways.append(Drawing(budget, smallest, count))
    return ways


def trials(entries: list[Entry], bundle: Bundle, ways: list[Drawing], settings: Settings) -> tuple[tuple[Trial, ...], Album]:
    """Draw in every way by every runtime that can; return trials where quality was asked for or there are plans, and
    the album of the plain ways.

    Without quality it ends, after at least one batch, when the slowest way has had its duration.
    """
    drawers = [entry for entry in entries if entry.subject is not None and entry.loaded is not None and entry.loaded.draws]
    for entry in entries:
        if entry.subject is not None and entry not in drawers:
            entry.skipped["pictures"] = "it has no decoder here"
    pictures: dict[tuple[str, Drawing], list[np.ndarray]] = {}
    # A guided batch is a new shape: the first is never timed.
    for way in dict.fromkeys(way if way.plan else way._replace(steps=1) for way in ways):
        for entry in drawers:
            if _offers(entry, way, bundle):
                entry.ask("draw", way, 0)
    for seed in range(PICTURES):
        for way in ways:
            for entry in drawers:
                if _offers(entry, way, bundle) and (drawn := entry.ask("draw", way, seed)):
                    entry.drawn.setdefault(way, []).append(drawn[0])
                    pictures.setdefault((entry.runtime.name, way), []).append(drawn[1])
        spent = max((sum(seconds) for entry in drawers for seconds in entry.drawn.values()), default=0.0)
        if not settings.quality and spent >= settings.duration:
            break
    kept = [entry for entry in drawers if entry.subject is not None and entry.drawn]
    if not kept:
        return (), {}
    first, planned = kept[0], bundle.manifest.model.patches is not None
    album = {
        _plan(way, bundle) or str(way.budget): np.concatenate(pictures[first.runtime.name, way])
        for way in reversed(ways)
        if way in first.drawn and way.weak is None and (planned or way.steps == settings.steps)
    }
    if not (settings.quality or planned) or bundle.manifest.model.tokens == "code":  # the distance of two token ids means nothing
        return (), album
    standard = np.concatenate(pictures[first.runtime.name, next(way for way in ways if way in first.drawn)])
    made = [
        _trial(entry, way, _plan(way, bundle), np.concatenate(pictures[entry.runtime.name, way]), standard)
        for entry in kept
        for way in ways
        if way in entry.drawn
    ]
    marks = front([(trial.seconds, min(trial.psnr_db, SAME)) for trial in made])
    return tuple(replace(trial, front=mark) for trial, mark in zip(made, marks, strict=True)), album


def plan_budgets(bundle: Bundle, name: str) -> tuple[Budget, ...]:
    """What `full` or a preset asks of the denoiser, a budget for each stage; nothing where the bundle's own picture
    does not take it."""
    try:
        size, plan = takes(bundle, name)
    except UsageError:
        return ()
    patches = bundle.manifest.model.patches
    assert patches is not None  # it draws along plans
    return tuple(Budget(tokens=count) for count in patches.filled_all(plan.tokens(*size)))


def _plan(way: Drawing, bundle: Bundle) -> str | None:
    """The name of its plan as cards have it; None for a model of budgets."""
    return None if bundle.manifest.model.patches is None else way.plan or f"full, {way.steps} steps"


def _offers(entry: Entry, way: Drawing, bundle: Bundle) -> bool:
    needed = [way.budget, *([way.weak] if way.weak else []), *(plan_budgets(bundle, way.plan) if way.plan else ())]
    return entry.subject is not None and all(budget in entry.first for budget in needed)


def _trial(entry: Entry, way: Drawing, plan: str | None, drawn: np.ndarray, standard: np.ndarray) -> Trial:
    difference = compare(drawn, standard, way.budget, 0.0, entry.runtime.name)
    return Trial(
        runtime=entry.runtime.name,
        budget=dict(way.budget),
        guidance_budget=None if way.weak is None else dict(way.weak),
        steps=way.steps,
        seconds=float(np.median(entry.drawn[way])),
        psnr_db=difference.psnr_db,
        cosine=difference.cosine,
        plan=plan,
    )
