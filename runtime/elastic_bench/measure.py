"""A bundle in several runtimes, in turns: opened, checked, timed, and only then told of."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from elastic_bench.drawing import Album, drawings, plan_budgets, trials
from elastic_bench.entry import Entry
from elastic_bench.pareto import recommend
from elastic_bench.process import Process
from elastic_bench.records import ROUNDS, BundleReport, Row, RuntimeReport, Settings, SingleStream
from elastic_bench.runtimes import Runtime, sentence
from elastic_bench.statistics import summarize
from elastic_bench.subject import Drawing, Turn
from elastic_runtime.choosing.cost import Costs, Rates
from elastic_runtime.contract.budget import Budget, key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.reference import compare
from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.errors import BudgetError, ElasticError, MissingError, UsageError
from elastic_runtime.ralu.plan import PRESETS
from elastic_runtime.sessions.checking import worst

QUERIES = 1024  # the least that MLPerf asks of a single stream
LIMIT = 20  # times the duration of a row: the time limit of its single stream
OnStage = Callable[[str], None]


def points(bundle: Bundle, values: Sequence[int] | None = None) -> list[Budget]:
    """The budgets to measure, smallest first: `values` of the bundle's first axis, or its doublings; other axes at
    their defaults.

    Of a model that is drawn along plans they are the tokens of the plans' stages.

    Raises: BudgetError for a value that the axis does not offer, or for values where there is no axis, or where plans
    choose them.
    """
    axes = bundle.manifest.axes
    if values and (not axes or bundle.manifest.model.patches):
        why = "draws along plans, which choose theirs" if axes else "has no axis"
        raise BudgetError(f"{bundle.folder} {why}, so it takes no budgets: leave them out")
    if not axes:
        return [Budget()]
    if bundle.manifest.model.patches:
        stages = {budget for name in ("full", *PRESETS) for budget in plan_budgets(bundle, name)}
        return sorted(stages, key=lambda budget: budget["tokens"]) or [Budget().on(axes)]
    chosen = axes[0].doublings() if values is None else sorted(set(values))
    return [Budget(**{axes[0].name: value}).on(axes) for value in chosen]


def measure(
    bundle: Bundle,
    runtimes: Sequence[Runtime],
    budgets: Sequence[Budget],
    settings: Settings,
    start: Callable[[Runtime, Bundle, Settings], Any] = Process,
    on_stage: OnStage = lambda what: None,
) -> tuple[BundleReport, Album]:
    """Measure `bundle`; return what was found, and pictures by budget.

    `start` gives a subject, by default in a process of its own. All of them stay open, since they take turns.

    Raises: UsageError for settings that measure nothing, or more steps than the model takes; a runtime that is
    missing, wrong or breaks is a finding.
    """
    settings.check()
    if not budgets or not runtimes:
        raise UsageError("there is nothing to measure: give at least one runtime and one budget")
    settings = suited(settings, bundle)
    entries = [Entry(runtime) for runtime in runtimes]
    try:
        for entry in entries:
            on_stage(f"{bundle.name}: opening and checking {entry.runtime.name}")
            _open(entry, bundle, budgets, settings, start)
        _agree(_running(entries))
        on_stage(f"{bundle.name}: timing steps, {ROUNDS} rounds")
        _time(entries, budgets, settings)
        on_stage(f"{bundle.name}: drawing")
        drawn, album = trials(entries, bundle, drawings(bundle, budgets, settings), settings)
        if settings.single_stream:
            on_stage(f"{bundle.name}: single stream")
            _stream(entries, budgets, settings)
        for entry in _running(entries):  # last: the decoder and guidance's larger batches belong to the most
            entry.peak = entry.ask("memory")
    finally:
        for entry in entries:
            entry.close()
    model = bundle.manifest.model
    report = BundleReport(
        name=bundle.name,
        model=model.name,
        family=model.family,
        axis=bundle.manifest.axes[0].name if bundle.manifest.axes else None,
        weights=bundle.manifest.provenance.checkpoint_sha256 or model.weights,
        embedded_guidance=model.patches is not None and model.patches.guidance_embeds,
        guidance=settings.guidance,
        runtimes=tuple(_report(entry, bundle, settings) for entry in entries),
        trials=drawn,
        card=bundle.manifest.quality if settings.quality or model.patches else (),
    )
    return replace(report, recommendation=recommend(report, settings)), album


def suited(settings: Settings, bundle: Bundle) -> Settings:
    """The settings of a bundle's pictures: without guidance where there is nothing to lead away from.

    Raises: UsageError for more steps than its schedule takes.
    """
    model = bundle.manifest.model
    if isinstance(model.schedule, CosineMask):
        model.schedule.masked(math.prod(model.sample_shape), settings.steps)
    elif model.patches is None:
        model.schedule.times(settings.steps)
    return replace(settings, guidance=1.0) if model.unconditional or model.distilled else settings


def _open(entry: Entry, bundle: Bundle, budgets: Sequence[Budget], settings: Settings, start: Callable[..., Any]) -> None:
    entry.missing = entry.runtime.obstacle(bundle)
    if entry.missing:
        return
    entry.subject = start(entry.runtime, bundle, settings)
    try:
        entry.loaded = entry.subject.load()
    except MissingError as error:  # a device or provider that only its library knows of
        entry.missing = sentence(error)
        entry.close()
    except ElasticError as error:
        entry.fail(sentence(error))
    if entry.loaded is None:
        return
    for budget in budgets:
        if entry.loaded.budgets is not None and not any(budget.items() <= offered.items() for offered in entry.loaded.budgets):
            entry.skipped[key(budget)] = f"it was compiled for {', '.join(map(str, entry.loaded.budgets))}"
            continue
        if beyond := [axis for axis in entry.loaded.axes if budget[axis.name] not in axis.values]:
            entry.skipped[key(budget)] = f"it was compiled for {beyond[0].name} {beyond[0].span}"
            continue
        entry.first[budget] = entry.ask("step", budget)
        if entry.failure:
            return
    entry.checked = tuple(entry.ask("check") or ())
    if wrong := next((row for row in entry.checked if not row.passed), None):
        limit = f" ({wrong.tolerance:.0e} of the largest value)" if wrong.finite else ""
        entry.fail(f"wrong at {Budget(**wrong.budget)}: {wrong.figure}{limit}")
    elif not entry.checked and not entry.failure:
        entry.fail("nothing was checked: the recording has none of its budgets; export the bundle again")


def _running(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.subject is not None]


def _agree(running: list[Entry]) -> None:
    """Hold every budget, recorded or not, against the most exact runtime that was right where it could be checked, the first of those."""
    if not running:
        return
    judge = min(running, key=_tolerance)
    for entry in (each for each in running if each is not judge):
        for budget, (_, outputs) in entry.first.items():
            if budget not in judge.first:
                continue
            bound, wanted = _tolerance(entry) + _tolerance(judge), judge.first[budget][1]
            rows = [compare(array, wanted[name], budget, bound, judge.runtime.name) for name, array in outputs.items()]
            entry.agrees[budget] = difference = worst(rows)
            if not difference.passed:
                entry.fail(f"differs from {judge.runtime.name} at {budget}: {difference.figure}")
                break


def _tolerance(entry: Entry) -> float:
    assert entry.loaded is not None  # what runs was opened
    return entry.loaded.tolerance


def _time(entries: list[Entry], budgets: Sequence[Budget], settings: Settings) -> None:
    """One round to warm up, then ROUNDS in which every runtime has its turn at every budget."""
    for round_ in range(ROUNDS + 1):
        for budget in budgets:
            for entry in _running(entries):
                offered = list(entry.first)
                if budget not in offered:
                    continue
                previous = offered[offered.index(budget) - 1]
                turn = entry.ask("turn", previous, budget, settings.duration / ROUNDS if round_ else 0.0)
                if turn is not None and round_:
                    entry.turns.setdefault(budget, []).append(turn)


def _stream(entries: list[Entry], budgets: Sequence[Budget], settings: Settings) -> None:
    for budget in budgets:
        for entry in _running(entries):
            if Drawing(budget, None, settings.steps) not in entry.drawn:
                continue
            taken = entry.ask("stream", Drawing(budget, None, settings.steps), QUERIES, LIMIT * settings.duration)
            if taken:
                p90 = float(np.percentile(taken, 90, method="higher"))
                entry.streams[budget] = SingleStream(queries=len(taken), seconds=sum(taken), p90=p90, complete=len(taken) >= QUERIES)


def _report(entry: Entry, bundle: Bundle, settings: Settings) -> RuntimeReport:
    loaded, runtime = entry.loaded, entry.runtime
    artifacts = bundle.manifest.graphs["denoiser"].artifacts
    own = next((each for each in artifacts if each.path == runtime.artifact and each.precision == runtime.precision), None)
    report = RuntimeReport(
        runtime=runtime.name,
        artifact=runtime.artifact,
        precision=runtime.precision,
        held=own.held if own and own.held != own.precision else None,
        where=loaded.where if loaded else None,
        processor=loaded.processor if loaded else None,
        missing=entry.missing,
        failure=entry.failure,
        checked=entry.checked,
    )
    if entry.missing or entry.failure or loaded is None:
        return report
    return replace(
        report,
        load_seconds=loaded.seconds,
        started_bytes=loaded.started_bytes,
        peak_bytes=entry.peak,
        rows=tuple(_row(entry, budget, turns, bundle, settings) for budget, turns in entry.turns.items()),
        skipped=entry.skipped,
    )


def _row(entry: Entry, budget: Budget, turns: list[Turn], bundle: Bundle, settings: Settings) -> Row:
    rounds = tuple(turn.steady for turn in turns)
    step = summarize(rounds)
    cost = Costs(bundle.manifest, Rates(1.0, 1.0)).work(budget) if bundle.manifest.cost else None
    work = cost.at(entry.runtime.precision) if cost else None
    switching = float(np.median([turn.entering for turn in turns])) - step.p50
    return Row(
        budget=dict(budget),
        flops=round(settings.batch * cost.flops) if cost else None,
        moved_bytes=int(work.weight_bytes + settings.batch * work.activation_bytes) if work else None,
        first_seconds=entry.first[budget][0],
        switch_seconds=switching if len(entry.first) > 1 else None,
        rounds=rounds,
        step=step,
        agrees=entry.agrees.get(budget),
        joules={name: sum(turn.joules[name] for turn in turns) / step.count for name in turns[0].joules},
        pictures=tuple(entry.drawn.get(Drawing(budget, None, settings.steps), ())),
        single_stream=entry.streams.get(budget),
    )
