"""Two reports of the same benchmark: what changed beyond noise."""

from collections.abc import Iterator
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
    if not was.keys() & now.keys() and not {place[:2] for place in was} & whys.keys():  # what fails everywhere is lost, not another thing
        raise UsageError("these reports do not compare: no bundle, runtime and budget is in both")
    found = [_compare(place, row, now[place], tolerance) for place, row in was.items() if place in now]
    found += [
        Change(place, "lost", before=row.step.p50, why=whys.get(place[:2], "it was not measured"))
        for place, row in was.items()
        if place not in now
    ]
    return found + [Change(place, "new", after=row.step.p50) for place, row in now.items() if place not in was]


def other_machine(old: Report, new: Report) -> str | None:
    """What is different about the machines, in words; None where they are alike."""
    return None if str(old.machine) == str(new.machine) else f"{old.machine} before, {new.machine} now"


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


def _rows(report: Report) -> Iterator[tuple[Place, Row]]:
    for name, runtime in _runtimes(report):
        for row in runtime.rows:
            yield (name, runtime.runtime, key(row.budget)), row


def _whys(report: Report) -> Iterator[tuple[tuple[str, str], str]]:
    for name, runtime in _runtimes(report):
        if why := runtime.failure or runtime.missing:
            yield (name, runtime.runtime), why
