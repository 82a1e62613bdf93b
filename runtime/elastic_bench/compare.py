"""Two reports of the same benchmark: what changed beyond noise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from elastic_bench.records import Report, Row, RuntimeReport
from elastic_bench.statistics import noise
from elastic_runtime.contract.budget import key
from elastic_runtime.errors import UsageError

Verdict = Literal["slower", "faster", "same", "lost", "new"]
# What makes the times of two reports two different measurements
SETTINGS = ("batch", "threads")
Place = tuple[str, str, str]  # bundle, runtime, budget
# bundle, way, artifact: what a runtime is, whose name has the artifact's only beside others
_Whose = tuple[str, str, str | None]


@dataclass(frozen=True)
class Change:
    """One row of two reports: median seconds of a step before and after, their ratio, and the noise of that ratio (95 %).

    `lost`: it had figures before and has none now, and `why`.
    """

    place: Place
    verdict: Verdict
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    noise: float | None = None
    why: str = ""


def changes(old: Report, new: Report, tolerance: float) -> list[Change]:
    """Every row of either report. A row is slower where its time grew by more than `tolerance` (0.05 for 5 %) and by more than its noise.

    Raises: UsageError for reports that measured something else.
    """
    if not 0 <= tolerance < float("inf"):
        raise UsageError(f"the tolerance is a share of the time, 0.05 for 5 %, got {tolerance:g}")
    for name in SETTINGS:
        before, after = getattr(old.settings, name), getattr(new.settings, name)
        if before != after:
            raise UsageError(f"these reports do not compare: {name} was {before} and is {after}; measure again with the same")
    was, now, whys = dict(_rows(old)), dict(_rows(new)), dict(_whys(new))
    if not was.keys() & now.keys() and not any(_why(whose, whys) for whose, _ in was):  # what fails everywhere is lost, not another thing
        raise UsageError("these reports do not compare: no bundle, runtime and budget is in both")
    rows = [_compare(place, row, now[at][1], tolerance) for at, (place, row) in was.items() if at in now]
    rows += [
        Change(place, "lost", before=row.step.p50, why=_why(at[0], whys) or "it was not measured")
        for at, (place, row) in was.items()
        if at not in now
    ]
    return rows + [Change(place, "new", after=row.step.p50) for at, (place, row) in now.items() if at not in was]


def other_machine(old: Report, new: Report) -> str | None:
    """What is different about the machines, in words; None where they are alike."""
    return None if str(old.machine) == str(new.machine) else f"{old.machine} before, {new.machine} now"


def other_models(old: Report, new: Report) -> list[str]:
    """Bundles of one name in both that hold other models, or other weights of one, in words."""
    before = {bundle.name: bundle for bundle in old.bundles}
    pairs = [(before[bundle.name], bundle) for bundle in new.bundles if bundle.name in before]
    return [
        f"{now.name} held {was.model}, and now {now.model}{'' if was.model != now.model else ' of other weights'}"
        for was, now in pairs
        if (was.model, was.family, was.weights) != (now.model, now.family, now.weights)
    ]


def _compare(place: Place, old: Row, new: Row, tolerance: float) -> Change:
    ratio = new.step.p50 / old.step.p50
    band = ratio * (noise(old.rounds) ** 2 + noise(new.rounds) ** 2) ** 0.5
    verdict: Verdict = "same"
    if abs(ratio - 1) > band:
        verdict = "slower" if ratio > 1 + tolerance else "faster" if ratio < 1 / (1 + tolerance) else "same"
    return Change(place, verdict, old.step.p50, new.step.p50, ratio, band)


def _runtimes(report: Report) -> Iterator[tuple[str, RuntimeReport]]:
    for bundle in report.bundles:
        for runtime in bundle.runtimes:
            yield bundle.name, runtime


def _whose(name: str, runtime: RuntimeReport) -> _Whose:
    return name, runtime.runtime.partition(" ")[0], runtime.artifact


def _rows(report: Report) -> Iterator[tuple[tuple[_Whose, str], tuple[Place, Row]]]:
    for name, runtime in _runtimes(report):
        for row in runtime.rows:
            budget = key(row.budget)
            yield (_whose(name, runtime), budget), ((name, runtime.runtime, budget), row)


def _whys(report: Report) -> Iterator[tuple[_Whose, str]]:
    for name, runtime in _runtimes(report):
        if why := runtime.failure or runtime.missing:
            yield _whose(name, runtime), why


def _why(whose: _Whose, whys: Mapping[_Whose, str]) -> str | None:
    """Why a runtime has no rows: what was said of its artifact, or where the bundle has none for it, of the way."""
    return whys.get(whose) or whys.get((*whose[:2], None))
