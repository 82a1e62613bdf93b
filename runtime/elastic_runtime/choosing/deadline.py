"""`Deadline`: decided anew before each step, so that the picture is done in time though the machine slows down."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from elastic_runtime.choosing import calibration
from elastic_runtime.choosing.estimates import Outlook, clipped
from elastic_runtime.choosing.goals import positive
from elastic_runtime.choosing.option import Choice, Option
from elastic_runtime.choosing.plans import PlanOutlook
from elastic_runtime.choosing.policy import Record
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import UnreachableError, UsageError
from elastic_runtime.sampling.course import Course

RECENT = 5  # steps whose pace still counts


@dataclass(frozen=True)
class Underway:
    """One picture's state: what it may still become, the times still to visit, what was measured of late, and the
    clock.

    `asked` are the steps of the whole run as first asked for. `course` is None before the first step of a model that is
    drawn along plans, and `taken` are the steps of each of its stages so far. `fresh` is whether the step under way is
    the first of its kind in the session, which tells nothing of the pace.
    """

    options: tuple[Option, ...]
    outlook: Outlook
    asked: int
    course: Course | None = None
    taken: tuple[int, ...] = (0,)
    ratios: tuple[float, ...] = ()
    measured: int = 0
    elapsed: float = 0.0
    clock: float | None = None
    predicted: float = 0.0
    fresh: bool = False

    @property
    def pace(self) -> float:
        """Seconds over prediction: the median of the last steps, or the last one where that was slower.

        A slower machine is believed at once, since late is worse than poor; a faster one when most of the last steps
        were.
        """
        return max(statistics.median(self.ratios), self.ratios[-1]) if self.ratios else 1.0

    @property
    def hiccup(self) -> float:
        """Seconds by which one more step like the worst of late would exceed the pace: what must stay in hand until the
        end."""
        if not self.ratios or self.course is None or not self.course.times:
            return 0.0
        return (max(self.ratios) - self.pace) * self.outlook.step(self.options[0], self.course)


class Deadline(Record, frozen=True, tag="deadline"):
    """The best pictures that are done `seconds` after they were asked for.

    Before each step it takes the best budget that all steps still to come could have in the time that is left, at the
    pace of the last steps; time that is saved goes to later, cleaner steps. Where even the cheapest budget is too slow,
    the rest of the run is spread over fewer steps (samplers that can resume; others run at the cheapest). Of a model
    that is drawn along plans it takes the best plan and number of steps before the first step, and after it spreads
    what is left of the stages over fewer steps where time gets short. `margin` is the share of the time that is kept
    for what nothing predicts. Fewer than `least_steps` are never planned for; a picture that is already late is
    finished as fast as it goes.

    Raises, before the first step: UnreachableError where `least_steps` at the cheapest budget would take longer on an
    idle machine.
    """

    seconds: float
    guidance_budget: Budget | None = None
    margin: float = 0.08
    least_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.seconds, "a deadline", "seconds")
        if not 0 <= self.margin < 1:
            raise UsageError(f"the margin is a share of the time, 0 or more and below 1, got {self.margin!r}")
        if isinstance(self.least_steps, bool) or not isinstance(self.least_steps, int) or self.least_steps < 1:
            raise UsageError(f"least_steps must be a whole number above zero, got {self.least_steps!r}")

    def init(self, outlook: Outlook) -> Underway:
        options = tuple(outlook.frontier(self.guidance_budget, self.least_steps))
        pace = outlook.pace
        goal = self.seconds * (1 - self.margin) - pace * outlook.finish
        carried = (pace,) if pace != 1 else ()
        if options[0].plan:
            self._reachable(outlook, options[0], sum(options[0].steps))
            return Underway(options, outlook, sum(options[0].steps), ratios=carried)
        steps = outlook.steps or 1
        fewest = min(max(self.least_steps, outlook.least), steps)
        planned = most(lambda count: pace * outlook.over(options[0], outlook.course(options[0], count)) <= goal, fewest, steps)
        if planned == fewest:
            self._reachable(outlook, options[0], fewest)
        course = outlook.course(options[0], planned)
        if planned < steps and course.flexible:
            course = replace(course, grids=outlook.course(options[0], steps).grids)
        return Underway(options, outlook, steps, course, ratios=carried)

    def next(self, state: Underway, index: int, seconds: float) -> tuple[Choice, Underway]:
        state = self._measured(state, seconds)
        outlook = state.outlook
        left = self.seconds * (1 - self.margin) - state.elapsed - outlook.finish * state.pace - state.hiccup
        if state.course is None:
            assert isinstance(outlook, PlanOutlook)
            option = outlook.begun(left / state.pace, self.least_steps)
            state = replace(state, options=(option,), course=outlook.course(option))
        course = self._replanned(state, left)
        fitting = [option for option in state.options if state.pace * outlook.over(option, course) <= left]
        best = fitting[-1] if fitting else state.options[0]
        predicted = outlook.step(best, course)
        reason = f"{1e3 * max(left, 0):.0f} ms left for {course.total} steps at pace {state.pace:.2f}" + (
            "" if fitting else ": as fast as it goes"
        )
        if state.clock is None and not outlook.graded:
            reason += f"; the card has no quality table ({outlook.table}), so what takes more counts as better"
        changed = state.course is None or course.steps != state.course.steps or state.clock is None
        choice = best.choice(course.steps if changed else None, predicted, reason, stage=course.first)
        fresh = outlook.first(best, course)
        return choice, replace(
            state, course=course.onward(), taken=onward(state.taken, course), predicted=predicted, clock=seconds, fresh=fresh
        )

    def _reachable(self, outlook: Outlook, cheapest: Option, steps: int) -> None:
        """Raise UnreachableError with the nearest time, where `steps` of the cheapest option take longer than there
        is."""
        least = outlook.over(cheapest, outlook.course(cheapest, steps)) + outlook.finish
        if least > self.seconds:
            raise UnreachableError(
                f"no picture can be done in {1e3 * self.seconds:.0f} ms here: the nearest that is reachable is {1e3 * least:.0f} ms, "
                f"{steps} steps at {cheapest.name}. Allow at least that. (Measured times are kept in {calibration.folder()}; "
                "delete that folder if they were taken while the machine was busy.)"
            )

    def _measured(self, state: Underway, seconds: float) -> Underway:
        """The state with the step before this one in it. A clock that jumps back counts the step as predicted."""
        if state.clock is None:
            return replace(state, elapsed=min(max(seconds, 0.0), self.seconds))
        took = seconds - state.clock
        took = min(took, self.seconds) if took >= 0 else state.predicted * state.pace
        ratios = state.ratios
        if not state.fresh:
            ratios = (*ratios, clipped(state.predicted, took))[-RECENT:]
            own = state.outlook.step_seconds  # a caller's pause is no sign of a slow machine to the next picture
            state.outlook.gauge.observe(state.predicted, took if own is None or own < 0 else min(own, took))
        return replace(state, elapsed=state.elapsed + took, ratios=ratios, measured=state.measured + 1)

    def _replanned(self, state: Underway, left: float) -> Course:
        """The times to visit: as densely as was first asked for where the cheapest budget affords it, else as many as
        it affords.

        They are never further apart than `least_steps` of a whole run: what is late gets no better by being poor.
        """
        course, outlook = state.course, state.outlook
        assert course is not None
        if not state.measured or not course.flexible or course.total < 2:
            return course
        if isinstance(outlook, PlanOutlook):
            return course.respaced(outlook.onward(state.options[0], state.taken, left / state.pace))
        densest = sum(course.densest)
        sparsest = min(densest, max(1, math.ceil(course.rest * min(self.least_steps, state.asked) / state.asked - 1e-6)))

        def affordable(steps: int) -> bool:
            return state.pace * outlook.over(state.options[0], course.spaced(steps)) <= left

        return course.spaced(most(affordable, sparsest, densest))


def onward(taken: tuple[int, ...], course: Course) -> tuple[int, ...]:
    """`taken` after the next step of a course, up to the stage that is then under way."""
    *before, last = taken
    return (*before, last + 1) if len(course.times[0]) > 2 else (*before, last + 1, 0)


def most(affordable: Callable[[int], bool], least: int, largest: int) -> int:
    """The largest number from `least` to `largest` that is affordable, where fewer always are; `least` where none
    is."""
    if affordable(largest):
        return largest
    low, high = least, largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low
