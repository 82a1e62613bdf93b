"""The outlook of a model that is drawn along plans: which plan, in how many steps (see `ralu.plan`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from elastic_runtime.choosing.estimates import Evaluations, Gauge, Outlook, improving
from elastic_runtime.choosing.option import Choice, Option
from elastic_runtime.choosing.shapes import SURER, Grades, shapes, tails
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Quality, plan_label
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.denoising.pictures import nearest
from elastic_runtime.denoising.tokens import samples
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.plan import FULL, Plan, named
from elastic_runtime.sampling.course import Course
from elastic_runtime.sessions.session import batches

RESERVE = 0.25  # of the time, which is lost where the machine is half as fast from the middle on, as when it is shared


class PlanOutlook(Outlook):
    """The `plans` that fit the bundle and the picture, by name, each in any number of steps, and in no more than its own where those are
    `asked` for; `size` is (rows, columns) of whole-picture tokens.

    `usual_name` and `usual_plan` are what is drawn where nothing is asked for. `over` tells that a picture is drawn over, of which a card's
    rows, of pictures from pure noise, say nothing. `lengths` are those of the texts by branch of
    guidance and picture, on which depends what shares a run. `references` are tokens that stand beside the picture's own.
    """

    named = "a plan"
    smaller = "a smaller picture, or fewer at once"

    def __init__(
        self,
        gauge: Gauge,
        count: int,
        guidance: Guidance,
        plans: Mapping[str, Plan],
        size: tuple[int, int],
        usual_name: str,
        usual_plan: Plan,
        lengths: tuple[tuple[int, ...], ...],
        references: int = 0,
        finishes: bool = True,
        asked: bool = False,
        over: bool = False,
    ):
        others = tuple(plans.items()), size, usual_name, usual_plan, lengths, references, asked, over
        super().__init__(gauge, count, guidance, None, finishes, *others)
        self.table = f"accuracy by plan{' of what is drawn over a picture' * over}"
        self.grading = "" if over else ", or grade it with samples/evaluate_plans.py"
        self._asked, self._over = asked, over
        patches = gauge.manifest.model.patches
        assert patches is not None
        self._patches = patches
        self._measured = math.prod(side / patches.size for side in nearest(gauge.manifest))
        self.plans, self.size, self.lengths, self.references = plans, size, lengths, references
        self.usual_name, self._usual_plan = usual_name, usual_plan

    @property
    def _grades(self) -> dict[str, Grades]:
        """The card's rows by plan; none where it has no plan that may be drawn."""
        grades: dict[str, Grades] = self._kept("grades", self._graded)
        return grades

    def _graded(self) -> dict[str, Grades]:
        rows = list(self._graded_options())
        best, least = max((row.accuracy for row, _ in rows), default=0.0), min((row.frechet_distance for row, _ in rows), default=0.0)
        if not (best > 0 and least > 0):
            return {}
        tables = {}
        for name in {_kind(option) for _, option in rows}:
            own = [(row, option) for row, option in rows if _kind(option) == name]
            tables[name] = Grades(
                np.array([option.steps for _, option in own]),
                np.array([self._flops(option) for _, option in own]),
                np.array([row.accuracy / best for row, _ in own]),
                np.array([row.frechet_distance / least for row, _ in own]),
            )
        return tables

    def _graded_options(self) -> Iterator[tuple[Quality, Option]]:
        """The card's rows of plans that may be drawn, each with its plan in the steps of the row."""
        for row in () if self._over else self.gauge.manifest.quality:
            if row.plan is not None and row.plan in self.plans and row.steps:
                yield row, self._shaped(row.plan, row.steps)

    @property
    def graded(self) -> bool:
        return bool(self._grades)

    def quality(self, option: Option) -> float:
        """See `Grades.of`; a plan that the card does not grade counts as nothing. Without a table more arithmetic counts as better."""
        return float(self._values(option, np.array([option.steps]))[0][0])

    def distance(self, option: Option) -> float:
        """See `Grades.of`; an ungraded plan is infinitely far."""
        return float(self._values(option, np.array([option.steps]))[1][0])

    def _values(self, option: Option, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quality and distance of an option in these `steps` (n, stages)."""
        flops, surer = steps @ self._step_flops(option), SURER * steps.sum(1)
        if not self._grades:
            whole = Plan.full(max(plan.total for plan in self.plans.values()))
            return flops / self._flops(self._option(FULL, whole)) + surer, np.ones(len(steps))
        if (grades := self._grades.get(_kind(option))) is None:
            return surer, np.full(len(steps), np.inf)
        quality, distance = grades.of(steps, flops)
        return quality + surer, distance

    def options(self, guidance_budget: Budget | None = None) -> list[Option]:
        """Each plan in its own steps and, where none are asked for, in those that the card grades; and what is usual."""
        self._no_weak(guidance_budget)
        options = [self._option(name, plan) for name, plan in self.plans.items()]
        options += [option for _, option in self._graded_options() if not self._asked]
        options.append(self._option(self.usual_name, self._usual_plan))
        unique = {(option.name, option.steps): option for option in options}
        return sorted(unique.values(), key=self._flops)

    def usual(self, options: Sequence[Option]) -> Option:
        total = self._usual_plan.total
        return min(options, key=lambda option: (_kind(option) != self.usual_name, abs(_plan(option).total - total)))

    def fixed(self, budget: Budget, guidance_budget: Budget | None) -> Option:
        if budget or guidance_budget is not None:
            raise UsageError(
                f"{self.gauge.manifest.model.name} has as many tokens as its plan and the picture's size say: give plan, height and width"
            )
        return self._option(self.usual_name, self._usual_plan)

    def planned(self, plan: Plan) -> Option:
        """A plan in its own steps as an option, by the name under which the card may grade it."""
        return self._option(named(plan, self.plans), plan)

    def check(self, choice: Choice, index: int = 0) -> None:
        if index == 0 and not isinstance(choice.plan, Plan):
            named = "none" if choice.plan is None else repr(choice.plan)
            raise UsageError(f"{self.gauge.manifest.model.name} draws along a plan, and this choice names {named}")

    def course(self, option: Option, steps: int | None = None) -> Course:
        plan = _plan(option)
        return Course.along(plan if steps is None else plan.spread(max(steps, len(plan.steps))))

    def evaluations(self, course: Course) -> list[Evaluations]:
        rows = [self.guidance.actives(times[:-1]) for times in course.times]
        return [(guided, 1 - guided) for guided in rows]

    def whole(self, option: Option) -> float:
        return float(self._times(option, np.array([option.steps]))[0])

    def _frontier(self, guidance_budget: Budget | None, least: int) -> dict[Option, float]:
        self._no_weak(guidance_budget)
        ways = []
        for name, option, steps in self._enough(least):
            quality, distance = self._values(option, steps)
            shaped = [(name, tuple(row)) for row in steps.tolist()]
            ways += list(zip(self._times(option, steps).tolist(), (quality / distance).tolist(), shaped, strict=True))
        return {self._shaped(*way): seconds for seconds, way in improving(ways)}

    def begun(self, seconds: float, least: int) -> Option:
        """The plan and its steps, `least` or more, with which to begin what may take so many `seconds`: the best, or the cheapest."""
        best, plan = 0.0, next(iter(self.frontier(None, least)))
        for name, option, steps in self._enough(least):
            worth = self._worths(option, (0,), steps, seconds)
            if worth.max() > best:
                best, plan = float(worth.max()), self._shaped(name, tuple(steps[worth.argmax()].tolist()))
        return plan

    def onward(self, option: Option, taken: Sequence[int], seconds: float) -> tuple[int, ...]:
        """Steps left of each stage still to come, the one under way first: of what the plan may still become, the best that takes so many
        `seconds`, or what takes the fewest. `taken` are the steps of each stage so far, up to the one under way."""
        rest = tails(self._shapes(_kind(option)), taken)
        worth = self._worths(option, taken, rest, seconds)
        best = worth.argmax() if worth.max() > 0 else self._times(option, rest, taken).argmin()
        return tuple(rest[best].tolist())

    def _worths(self, option: Option, taken: Sequence[int], rest: np.ndarray, seconds: float) -> np.ndarray:
        """What it is worth (n,) to go on with `rest` (n, stages still to come) for so many `seconds`, 0 where they are too few: the mean
        of what the picture becomes if the pace holds, and if `RESERVE` of the time is lost to others, at the cost of the last stage."""
        times = self._times(option, rest, taken)
        worth = self._worth_of(option, taken, rest)
        last, cut = self._stage_seconds(option, len(option.steps) - 1), rest.copy()
        left = (1 - RESERVE) * seconds - times + last[rest[:, -1]]
        cut[:, -1] = np.clip(np.searchsorted(last, left, "right") - 1, 1, rest[:, -1])
        return np.where(times <= seconds, (worth + self._worth_of(option, taken, cut)) / 2, 0.0)

    def _worth_of(self, option: Option, taken: Sequence[int], rest: np.ndarray) -> np.ndarray:
        """Worth (n,) of whole pictures."""
        before = np.tile(np.array(taken[:-1], dtype=int), (len(rest), 1))
        whole = np.concatenate([before, rest[:, :1] + taken[-1], rest[:, 1:]], axis=1)
        quality, distance = self._values(option, whole)
        return quality / distance

    def _times(self, option: Option, rest: np.ndarray, taken: Sequence[int] = (0,)) -> np.ndarray:
        """Predicted seconds (n,) of `rest` (n, stages still to come), what leads from stage to stage among them."""
        stage = len(taken) - 1
        entered = rest.shape[1] - (0 if stage and not taken[-1] else 1)
        return sum(self._stage_seconds(option, stage + i)[rest[:, i]] for i in range(rest.shape[1])) + self.entering(option) * entered

    def _stage_seconds(self, option: Option, stage: int) -> np.ndarray:
        """Predicted seconds of a stage by its steps, from none on."""
        most = max(int(self._shapes(_kind(option))[:, stage].max()) if _kind(option) in self.plans else 0, option.steps[stage])
        shape = None if self.guidance.constant else _plan(option).stages()[stage]

        def seconds(steps: int) -> float:
            guided = (
                steps * self.guidance.active(1.0) if shape is None else int(self.guidance.actives(np.array(shape.spaced(steps)[:-1])).sum())
            )
            return sum(many * self.seconds(option, stage, kind) for many, kind in ((guided, True), (steps - guided, False)) if many)

        key = "stage", _kind(option), _plan(option).begin, stage, most
        return self._kept(key, lambda: np.array([0.0, *(seconds(n + 1) for n in range(most))]))

    def _enough(self, least: int) -> Iterator[tuple[str, Option, np.ndarray]]:
        """Name, option and weighed steps (n, stages) of each plan that takes `least` steps or more, or the most that there are."""
        least = min(least, max(int(self._shapes(name).sum(1).max()) for name in self.plans))
        for name, option in self._own.items():
            steps = self._shapes(name)
            if len(steps := steps[steps.sum(1) >= least]):
                yield name, option, steps

    def _shapes(self, name: str) -> np.ndarray:
        """Steps (n, stages) of a plan that are weighed."""
        return self._kept(("shapes", name), lambda: self._weighed(name))

    def _weighed(self, name: str) -> np.ndarray:
        plain = max((self._flops(option) for each, option in self._own.items() if self.plans[each].plain), default=0.0)
        graded = [option.steps for _, option in self._graded_options() if _kind(option) == name]
        weighed = shapes(self.plans[name], graded, self._step_flops(self._own[name]), plain)
        most = self.plans[name].total
        return weighed[weighed.sum(1) <= most] if self._asked else weighed

    @property
    def _own(self) -> dict[str, Option]:
        """Each plan in its own steps."""
        return self._kept("own", lambda: {name: self._option(name, plan) for name, plan in self.plans.items()})

    def runs(self, option: Option, stage: int, guided: bool) -> list[tuple[Budget, int]]:
        """In the mixed stage each picture runs by itself, both of its branches together (see
        `TokenDenoiser.guided`)."""
        alone = _plan(option).mixed and stage == 1
        runs = [part for rows in samples(self.lengths, guided, alone) for part in batches(self.gauge.session, rows)]
        return [(option.budgets[stage], part.stop - part.start) for part in runs]

    def peak_seconds(self, option: Option) -> float:
        return sum(count * self.seconds(option, stage, True, self.gauge.peak) for stage, count in enumerate(option.steps))

    def entering(self, option: Option) -> float:
        """Half of what leads to the second and third stage where patches grow: a preview, its edges, and what grows. A picture that
        grows is decoded and encoded again, which takes about what a whole one's decoding does; a spectrum takes nothing beside a step."""
        if _plan(option).growth == "spectrum":
            return 0.0
        if _plan(option).growth == "pixels":
            return (self.gauge.calibrated.preview + self.gauge.calibrated.finish) * self.area * self.count
        return self.gauge.calibrated.preview * self.area * self.count / 2

    @property
    def area(self) -> float:
        return math.prod(self.size) / self._measured

    def _option(self, name: str, plan: Plan) -> Option:
        counts = self._patches.filled_all(count + self.references for count in plan.tokens(*self.size))
        budgets = tuple(Budget(tokens=count) for count in counts)
        return Option(plan_label(name, plan.steps), budgets, budgets, plan.steps, plan)

    def _shaped(self, name: str, steps: tuple[int, ...]) -> Option:
        """A plan in other steps than its own."""
        return self._option(name, replace(self.plans[name], steps=steps))

    def _flops(self, option: Option) -> float:
        return float(np.dot(option.steps, self._step_flops(option)))

    def _step_flops(self, option: Option) -> tuple[float, ...]:
        """FLOPs of a step of each stage."""
        work = self.gauge.peak.work
        return tuple(work(budget).flops for budget in option.budgets)

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
