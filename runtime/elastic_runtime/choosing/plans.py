"""The outlook of a model that is drawn along plans: which plan, in how many steps (RALU, arXiv 2507.08422)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from elastic_runtime.choosing.estimates import Evaluations, Gauge, Outlook
from elastic_runtime.choosing.option import Choice, Option
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Quality, plan_label
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.denoising.pictures import nearest
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.plan import FULL, Plan, named
from elastic_runtime.sampling.course import Course
from elastic_runtime.sessions.session import batches

FINEST = 4  # times the steps that a plan was made for, where nothing tells what plain sampling would take
LEAST = 4  # steps that are weighed, unless fewer were asked for
SURER = 1e-6  # of the quality: of two ways that the card grades alike, the one with more steps


class PlanOutlook(Outlook):
    """The `plans` that fit the bundle and the picture, by name, each in any number of steps; `size` is (rows, columns)
    of whole-picture tokens.

    `usual_name` is the one that is drawn where nothing is asked for.
    """

    named, table = "a plan", "accuracy by plan"
    smaller = "a smaller picture, or fewer at once"

    def __init__(
        self,
        gauge: Gauge,
        count: int,
        guidance: Guidance,
        plans: Mapping[str, Plan],
        size: tuple[int, int],
        usual_name: str,
        finishes: bool = True,
    ):
        super().__init__(gauge, count, guidance, None, finishes, tuple(plans.items()), size)
        patches = gauge.manifest.model.patches
        assert patches is not None
        self._measured = math.prod(side / patches.size for side in nearest(gauge.manifest))
        self.plans, self.size, self.usual_name = plans, size, usual_name

    @property
    def _rows(self) -> dict[str, np.ndarray]:
        if "rows" not in self._prospects:
            self._prospects["rows"] = self._graded_rows()
        rows: dict[str, np.ndarray] = self._prospects["rows"]
        return rows

    def _graded_rows(self) -> dict[str, np.ndarray]:
        """By plan: FLOPs of the graded rows, rising from none, their accuracy over the best of all, and their Frechet distance over the
        least of all, (3, rows); more steps of a plan never count as worse."""
        rows = [(_kind(option), self._flops(option), row.accuracy, row.frechet_distance) for row, option in self._graded_options()]
        best, least = max((row[2] for row in rows), default=0.0), min((row[3] for row in rows), default=0.0)
        if not (best > 0 and least > 0):
            return {}
        tables = {}
        for name in {row[0] for row in rows}:
            flops, accuracy, distance = np.array(sorted(row[1:] for row in rows if row[0] == name)).T
            accuracy, distance = np.maximum.accumulate(accuracy) / best, np.minimum.accumulate(distance) / least
            tables[name] = np.stack([[0.0, *flops], [0.0, *accuracy], [distance[0], *distance]])
        return tables

    def _graded_options(self) -> Iterator[tuple[Quality, Option]]:
        """The card's rows of plans that may be drawn, each with its plan in the steps of the row."""
        for row in self.gauge.manifest.quality:
            if row.plan is not None and row.plan in self.plans and row.steps:
                yield row, self._option(row.plan, replace(self.plans[row.plan], steps=row.steps))

    @property
    def graded(self) -> bool:
        return bool(self._rows)

    def quality(self, option: Option) -> float:
        """A straight line in FLOPs between a plan's rows, level above them and falling to nothing below; a plan that
        the card does not grade counts as nothing.

        Without a table more arithmetic counts as better.
        """
        assert option.plan is not None
        surer = SURER * option.plan.total
        if not self._rows:
            whole = Plan.full(max(plan.total for plan in self.plans.values()))
            return self._flops(option) / self._flops(self._option(FULL, whole)) + surer
        flops, accuracy, _ = self._rows.get(_kind(option), np.zeros((3, 1)))
        return float(np.interp(self._flops(option), flops, accuracy)) + surer

    def distance(self, option: Option) -> float:
        """As `quality`, but nearest to the first row below it; an ungraded plan is infinitely far."""
        if not self._rows:
            return 1.0
        table = self._rows.get(_kind(option))
        return float("inf") if table is None else float(np.interp(self._flops(option), table[0], table[2]))

    def options(self, guidance_budget: Budget | None = None) -> list[Option]:
        """Each plan in its own steps, and in those that the card grades."""
        self._no_weak(guidance_budget)
        options = [self._option(name, plan) for name, plan in self.plans.items()]
        options += [option for _, option in self._graded_options()]
        unique = {(option.name, option.steps): option for option in options}
        return sorted(unique.values(), key=self._flops)

    def finest(self, guidance_budget: Budget | None = None) -> list[Option]:
        self._no_weak(guidance_budget)
        own = {name: self._option(name, plan) for name, plan in self.plans.items()}
        plain = max((self._flops(option) for name, option in own.items() if self.plans[name].plain), default=0.0)
        options = []
        for name, plan in self.plans.items():
            if plan.plain:
                most = plan.total
            else:  # as many steps as cost no more than plain sampling
                most = int(plan.total * plain / self._flops(own[name])) if plain and self._flops(own[name]) else FINEST * plan.total
            fewest = max(len(plan.steps), min(LEAST, plan.total))
            options += [self._option(name, plan.spread(total)) for total in range(fewest, most + 1)]
        return options

    def usual(self, options: Sequence[Option]) -> Option:
        plan = self.plans[self.usual_name]
        return min(options, key=lambda option: (_kind(option) != self.usual_name, abs(_plan(option).total - plan.total)))

    def fixed(self, budget: Budget, guidance_budget: Budget | None) -> Option:
        if budget or guidance_budget is not None:
            raise UsageError(
                f"{self.gauge.manifest.model.name} has as many tokens as its plan and the picture's size say: give plan, height and width"
            )
        return self._option(self.usual_name, self.plans[self.usual_name])

    def planned(self, plan: Plan) -> Option:
        """A plan in its own steps as an option, by the name under which the card may grade it."""
        return self._option(named(plan, self.plans), plan)

    def check(self, choice: Choice) -> None:
        if choice.plan is None:
            raise UsageError(f"{self.gauge.manifest.model.name} draws along a plan, and this choice names none")

    def course(self, option: Option, steps: int | None = None) -> Course:
        plan = _plan(option)
        return Course.along(plan if steps is None else plan.spread(max(steps, len(plan.steps))))

    def evaluations(self, course: Course) -> list[Evaluations]:
        rows = [self.guidance.actives(times[:-1]) for times in course.times]
        return [(guided, 1 - guided) for guided in rows]

    def whole(self, option: Option) -> float:
        if not self.guidance.constant:
            return super().whole(option)
        guided = self.guidance.active(1.0)
        steps = sum(count * self.seconds(option, stage, guided) for stage, count in enumerate(option.steps))
        return steps + self.entering() * (len(option.steps) - 1)

    def runs(self, option: Option, stage: int, guided: bool) -> list[tuple[Budget, int]]:
        """In the mixed stage each picture runs by itself, both of its branches together (see
        `TokenDenoiser.guided`)."""
        alone = len(option.steps) > 1 and stage == 1
        rows, times = (1, self.count) if alone else (self.count, 1)
        sizes = [part.stop - part.start for part in batches(self.gauge.session, rows * (2 if guided else 1))]
        return [(option.budgets[stage], size) for size in sizes] * times

    def peak_seconds(self, option: Option) -> float:
        return sum(count * self.seconds(option, stage, True, self.gauge.peak) for stage, count in enumerate(option.steps))

    def entering(self) -> float:
        """Half of what leads to the second and third stage: a preview, its edges, and what grows."""
        return self.gauge.calibrated.preview * self.area * self.count / 2

    @property
    def area(self) -> float:
        return math.prod(self.size) / self._measured

    def _option(self, name: str, plan: Plan) -> Option:
        budgets = tuple(Budget(tokens=count) for count in plan.tokens(*self.size))
        return Option(plan_label(name, plan.steps), budgets, budgets, plan.steps, plan)

    def _flops(self, option: Option) -> float:
        work = self.gauge.peak.work
        return sum(count * work(budget).flops for count, budget in zip(option.steps, option.budgets, strict=True))

    def _no_weak(self, guidance_budget: Budget | None) -> None:
        if guidance_budget is not None:
            raise UsageError(
                f"{self.gauge.manifest.model.name} runs both branches of guidance at the same tokens: leave guidance_budget out"
            )


def _plan(option: Option) -> Plan:
    assert option.plan is not None
    return option.plan


def _kind(option: Option) -> str:
    """The plan's name without its steps."""
    return option.name.partition(",")[0]
