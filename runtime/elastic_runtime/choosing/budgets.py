"""The outlook of a model that is drawn at budgets on its axes, on the times of a sampler."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from elastic_runtime.choosing.estimates import Evaluations, Gauge, Outlook, improving
from elastic_runtime.choosing.option import Choice, Option, check_budget
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Quality
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.errors import BudgetError, UsageError
from elastic_runtime.sampling.course import Course
from elastic_runtime.sampling.fitting import least_steps, resumable, times
from elastic_runtime.sessions.session import batches


def graded(quality: Sequence[Quality], flops: Callable[[Budget], float]) -> np.ndarray | None:
    """FLOPs of a card's rows, rising; accuracy over the best; Frechet distance over the least: (3, rows). None where they grade nothing."""
    rows = np.array(sorted((flops(Budget(**row.budget)), row.accuracy, row.frechet_distance) for row in quality)).T
    if not rows.size or not rows[1].max() > 0 or not rows[2].min() > 0:
        return None
    return np.stack([rows[0], rows[1] / rows[1].max(), rows[2] / rows[2].min()])


class BudgetOutlook(Outlook):
    """Budgets of both branches of guidance, the same in all `steps` of `sampler` unless a policy changes them; branches that are `apart`
    never share a run, since their texts differ in length. Of branches at one budget that are `alike` one is run: autoguidance leads from
    nothing to itself."""

    named, smaller = "a budget", "fewer pictures at once"
    grading = ", or grade it with samples/evaluate.py"

    def __init__(
        self,
        gauge: Gauge,
        count: int,
        guidance: Guidance,
        steps: int,
        sampler: str,
        finishes: bool = True,
        apart: bool = False,
        alike: bool = False,
    ):
        super().__init__(gauge, count, guidance, steps, finishes, sampler, apart, alike)
        self.apart, self.alike = apart, alike
        self.sampler = sampler
        self.least = least_steps(sampler)
        self.table = f"accuracy by {', '.join(axis.name for axis in self.axes) or 'budget'}"

    @property
    def graded(self) -> bool:
        return self._rows is not None

    @cached_property
    def _rows(self) -> np.ndarray | None:
        return graded(self.gauge.manifest.quality, self._flops)

    def quality(self, option: Option) -> float:
        """A straight line in FLOPs between the table's rows and level beyond them; without one the share of the
        largest's FLOPs."""
        budget, flops = option.budget, self._flops(option.budget)
        if self._rows is None:
            most = self._flops(self.gauge.budgets[-1])
            return flops / most if most else sum(budget.values()) / max(sum(self.gauge.budgets[-1].values()), 1)
        return float(np.interp(flops, self._rows[0], self._rows[1]))

    def distance(self, option: Option) -> float:
        return 1.0 if self._rows is None else float(np.interp(self._flops(option.budget), self._rows[0], self._rows[2]))

    def options(self, guidance_budget: Budget | None = None) -> list[Option]:
        """The weak branch runs at `guidance_budget`, never above the strong one's, or at the same budget."""
        if guidance_budget is None:
            return [self._option(budget, budget) for budget in self.gauge.budgets]
        weak = self._on(guidance_budget, "guidance_budget")
        least = self._flops(weak)
        offered = [(budget, self._flops(budget)) for budget in self.gauge.budgets]
        options = [self._option(budget, weak) for budget, flops in offered if flops > least or (flops == least and not self.guidance.auto)]
        if not options:
            raise BudgetError(f"the guidance budget {weak} leaves no larger one for the picture: give a smaller guidance budget")
        return options

    def _frontier(self, guidance_budget: Budget | None, least: int) -> dict[Option, float]:
        ways = [(self.whole(option), self.worth(option), option) for option in self.options(guidance_budget)]
        return {option: seconds for seconds, option in improving(ways)}

    def usual(self, options: Sequence[Option]) -> Option:
        default = self._flops(Budget().on(self.axes))
        return min(options, key=lambda option: abs(self._flops(option.budget) - default))

    def fixed(self, budget: Budget, guidance_budget: Budget | None) -> Option:
        strong = self._on(budget, "budget")
        return self._option(strong, strong if guidance_budget is None else self._on(guidance_budget, "guidance_budget"))

    def check(self, choice: Choice, index: int = 0) -> None:
        if choice.plan is not None:
            raise UsageError(f"{self.gauge.manifest.model.name} draws at budgets, not along a plan: leave plan out")
        for budget in (choice.budget, choice.guidance_budget):
            if not isinstance(budget, Budget) or budget.on(self.axes) != budget:
                raise BudgetError(f"a choice names every axis, {', '.join(axis.name for axis in self.axes)}, got {budget or 'none'}")

    def course(self, option: Option, steps: int | None = None) -> Course:
        model, flexible = self.gauge.manifest.model, resumable(self.sampler)
        counts = option.steps if steps is None else (steps,)
        return Course.of(counts, lambda stage, begin, count: times(model, self.sampler, count, begin), flexible)

    def evaluations(self, course: Course) -> list[Evaluations]:
        active = self.guidance.actives(self.gauge.manifest.model.schedule.share(course.times[0]))
        every = np.ones(course.total, dtype=int)
        guided = active[:-1].copy()
        if self.sampler == "heun":  # which evaluates again at the end of every step but the last
            guided[:-1] += active[1:-1]
            every[:-1] += 1
        return [(guided, every - guided)]

    def runs(self, option: Option, stage: int, guided: bool) -> list[tuple[Budget, int]]:
        """See `Denoiser.guided`."""
        strong, weak = option.budgets[0], option.guidance_budgets[0]
        if not guided:
            return self._runs(strong, self.count)
        if weak == strong and not self.apart:
            return self._runs(strong, self.count if self.alike else 2 * self.count)
        return self._runs(strong, self.count) + self._runs(weak, self.count)

    def peak_seconds(self, option: Option) -> float:
        return self.seconds(option, 0, True, self.gauge.peak)

    def _runs(self, budget: Budget, size: int) -> list[tuple[Budget, int]]:
        return [(budget, rows.stop - rows.start) for rows in batches(self.gauge.session, size)]

    def _on(self, budget: Budget, what: str) -> Budget:
        check_budget(budget, what)
        return budget.on(self.axes)

    def _option(self, budget: Budget, weak: Budget) -> Option:
        return Option(str(budget), (budget,), (weak,), (self.steps or 1,))

    def _flops(self, budget: Budget) -> float:
        return self.gauge.peak.work(budget).flops
