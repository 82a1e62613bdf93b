"""What a policy may know before it chooses: the budgets on offer, their time, memory and quality here, and the pace of late."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from elastic_runtime.choosing import calibration
from elastic_runtime.choosing.cost import Costs, Point
from elastic_runtime.choosing.policy import Choice
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.denoising.denoiser import Guidance
from elastic_runtime.device import Device, probe
from elastic_runtime.errors import BudgetError
from elastic_runtime.sampling.fitting import resumable, times
from elastic_runtime.sessions.session import Session, batches

MOST = 64  # budgets that are weighed; a finer axis is thinned out evenly
CLIP = 8.0  # a step this many times slower or faster than predicted tells of a clock or a hang, not of the pace
WEIGHT = 0.3  # of the latest step in the pace

Clock = Callable[[], float]
Found = TypeVar("Found")


class Gauge:
    """How fast a session is here: predictions, made when first asked for, and the pace of the latest steps against them.

    `spent` is the time that looking at the device and measuring took: once for a session, and no part of any picture's.

    `finish()` makes a picture of a last state, to be timed; `opened` is the process's peak memory when the session was opened.
    """

    def __init__(
        self, session: Session, manifest: Manifest, finish: Callable[[], object] | None, clock: Clock, opened: int | None = None,
        device: Callable[[], Device] = probe,
    ):  # fmt: skip
        self.session, self.manifest = session, manifest
        self.opened = opened
        self.pace = 1.0
        self.spent = 0.0
        self._finish, self._clock, self._probe = finish, clock, device

    @cached_property
    def device(self) -> Device:
        return self._timed(self._probe)

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """What the session offers, cheapest first, thinned out where it is very much."""
        found = offered(self.manifest.axes, self.session)
        return tuple(sorted(found, key=lambda budget: Costs(self.manifest, self.prior.rates).work(budget).flops))

    @cached_property
    def prior(self) -> Costs:
        """Costs by the device's peak rates or, where a calibration is kept, by that; nothing is measured."""
        rates = calibration.rates(self.session, self.device)
        kept = calibration.load(calibration.identity(self.session, self.manifest, self.device))
        return Costs(self.manifest, rates, self._precision, kept.points if kept else ())

    @cached_property
    def peak(self) -> Costs:
        """Costs by the device's peak rates alone: the same before and after a calibration."""
        return Costs(self.manifest, calibration.rates(self.session, self.device), self._precision)

    @cached_property
    def calibrated(self) -> calibration.Calibration:
        """The calibration of this session here, measured now if none is kept."""
        who = calibration.identity(self.session, self.manifest, self.device)
        return self._timed(lambda: calibration.calibrate(who, self._measure))

    @cached_property
    def costs(self) -> Costs:
        """Costs by measured points."""
        return Costs(self.manifest, calibration.rates(self.session, self.device), self._precision, self.calibrated.points)

    def observe(self, predicted: float, seconds: float) -> None:
        """Take one step into the pace, measured over predicted; it outlives the picture, as a hot chip does."""
        ratio = clipped(predicted, seconds)
        self.pace += WEIGHT * (ratio - self.pace)

    def _timed(self, work: Callable[[], Found]) -> Found:
        begun = self._clock()
        found = work()
        self.spent += max(self._clock() - begun, 0.0)
        return found

    @property
    def _precision(self) -> str:
        return self.session.origin.artifact.precision if self.session.origin else EXACT

    def _measure(self) -> tuple[tuple[Point, ...], float]:
        middle = float(times(self.manifest.model, "", 2)[1])
        points = calibration.points(self.session, self.manifest, self.budgets, self._clock, middle, self.opened)
        return points, self._finishing()

    def _finishing(self) -> float:
        if self._finish is None:
            return 0.0
        self._finish()
        begun = self._clock()
        self._finish()
        return max(self._clock() - begun, 0.0)


def clipped(predicted: float, seconds: float) -> float:
    """`seconds` over `predicted`, within what a pace can be; a clock that went backwards counts as no news."""
    if not (seconds >= 0 and predicted > 0):  # nan, too
        return 1.0
    return min(max(seconds / predicted, 1 / CLIP), CLIP)


def offered(axes: Sequence[Axis], session: Session) -> list[Budget]:
    """Budgets of a session, at most about `MOST`: every one, or evenly chosen ones with the ends and the default of each axis."""
    if session.budgets is not None:
        return [budget.on(axes) for budget in session.budgets]
    each = max(2, round(MOST ** (1 / max(len(axes), 1))))
    values = [sorted({axis.default, *(axis.values[int(i)] for i in np.linspace(0, len(axis.values) - 1, each).round())}) for axis in axes]
    names = [axis.name for axis in axes]
    return [Budget(**dict(zip(names, point, strict=True))) for point in itertools.product(*values)]


@dataclass(frozen=True)
class Outlook:
    """One picture's prospects: `count` pictures at once, with a guidance, on the times of a sampler.

    `finishes` tells whether the last state becomes a picture, which takes time of its own.
    """

    gauge: Gauge
    count: int
    guidance: Guidance
    sampler: str
    finishes: bool = True

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Budgets on offer, cheapest first."""
        return self.gauge.budgets

    @property
    def pace(self) -> float:
        """Seconds of late steps over what was predicted for them; 1 where none was predicted yet."""
        return self.gauge.pace

    @property
    def resumable(self) -> bool:
        """Whether the number of steps may change after the first."""
        return resumable(self.gauge.manifest.model, self.sampler)

    @property
    def finish(self) -> float:
        """Predicted seconds from the last step to the pictures."""
        return self.gauge.calibrated.finish * self.count if self.finishes else 0.0

    @cached_property
    def _accuracy(self) -> tuple[list[float], list[float]] | None:
        rows = sorted((self.gauge.peak.work(Budget(**row.budget)).flops, row.accuracy) for row in self.gauge.manifest.quality)
        best = max((accuracy for _, accuracy in rows), default=0.0)
        return ([flops for flops, _ in rows], [accuracy / best for _, accuracy in rows]) if best > 0 else None

    @property
    def graded(self) -> bool:
        """Whether the bundle's card has a quality table."""
        return self._accuracy is not None

    def quality(self, budget: Budget) -> float:
        """Accuracy over the best of the card's table, a straight line in FLOPs between its rows and level beyond them.

        Without a table it is the share of the largest budget's FLOPs, which only ranks.
        """
        flops = self.gauge.peak.work(budget).flops
        if self._accuracy is None:
            most = self.gauge.peak.work(self.budgets[-1]).flops
            return flops / most if most else sum(budget.values()) / max(sum(self.budgets[-1].values()), 1)
        return float(np.interp(flops, *self._accuracy))

    def times(self, steps: int, begin: float | None = None) -> list[float]:
        """The `steps + 1` times of a run, or of what is left of it from `begin` on."""
        return [float(time) for time in times(self.gauge.manifest.model, self.sampler, steps, begin)]

    def evaluations(self, times: Sequence[float]) -> list[tuple[int, int]]:
        """For each step between `times`: how many evaluations of the model are guided, and how many are not."""
        found, schedule = [], self.gauge.manifest.model.schedule
        for i in range(len(times) - 1):
            corrected = self.sampler == "heun" and i < len(times) - 2
            guided = [self.guidance.active(schedule.share(time)) for time in times[i : i + 2 if corrected else i + 1]]
            found.append((sum(guided), len(guided) - sum(guided)))
        return found

    def seconds(self, choice: Choice, guided: bool, costs: Costs | None = None) -> float:
        """Predicted seconds of one evaluation for all pictures, by measured costs unless others are given."""
        return sum(self._over(choice, guided, (costs or self.gauge.costs).seconds))

    def picture(self, choice: Choice, times: Sequence[float]) -> float:
        """Predicted seconds of whole pictures, every step at `choice`."""
        guided, plain = map(sum, zip(*self.evaluations(times), strict=True))
        return guided * self.seconds(choice, True) + plain * self.seconds(choice, False) + self.finish

    def memory(self, choice: Choice) -> float:
        """Predicted peak bytes of this process: what it held when the session was open, and the most that a run adds.

        Nothing is measured for it: a run at the largest budget could take the very memory that is to be saved.
        """
        return (self.gauge.opened or 0) + self.growth(choice)

    def growth(self, choice: Choice) -> float:
        """Predicted bytes that a run adds."""
        return max(self._over(choice, self.guidance.scale > 1, self.gauge.prior.growth))

    def _over(self, choice: Choice, guided: bool, predict: Callable[[Budget, int], float]) -> list[float]:
        """`predict` for every run of one evaluation (see `Denoiser.guided`)."""
        if not guided:
            return self._runs(choice.budget, self.count, predict)
        if choice.guidance_budget == choice.budget:
            return self._runs(choice.budget, self.count if self.guidance.auto else 2 * self.count, predict)
        return self._runs(choice.budget, self.count, predict) + self._runs(choice.guidance_budget, self.count, predict)

    def _runs(self, budget: Budget, size: int, predict: Callable[[Budget, int], float]) -> list[float]:
        return [predict(budget, rows.stop - rows.start) for rows in batches(self.gauge.session, size)]

    def choices(self, guidance_budget: Budget | None = None) -> list[Choice]:
        """Choices on offer, cheapest first: the weak branch at `guidance_budget`, never above the strong one's, or at the same budget.

        Raises: BudgetError where no budget lies above the weak branch's.
        """
        if guidance_budget is None:
            return [Choice(budget, budget) for budget in self.budgets]
        weak = guidance_budget.on(self.gauge.manifest.axes)
        least = self.gauge.peak.work(weak).flops
        found = [
            Choice(budget, weak)
            for budget in self.budgets
            if (flops := self.gauge.peak.work(budget).flops) > least or (flops == least and not self.guidance.auto)
        ]
        if not found:
            raise BudgetError(f"the guidance budget {weak} leaves no larger one for the picture: give a smaller guidance budget")
        return found

    def frontier(self, guidance_budget: Budget | None = None) -> list[Choice]:
        """Those of `choices` that are worth their time: each takes longer than the one before, and is better."""
        rising = sorted(self.choices(guidance_budget), key=lambda choice: (self.seconds(choice, True), -self.quality(choice.budget)))
        kept: list[Choice] = []
        for choice in rising:
            if not kept or self.quality(choice.budget) > self.quality(kept[-1].budget):
                kept.append(choice)
        return kept
