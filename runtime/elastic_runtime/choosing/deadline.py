"""`Deadline`: budgets decided anew before each step, so that the picture is done in time though the machine slows down."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elastic_runtime.choosing.goals import positive
from elastic_runtime.choosing.policy import Choice
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from elastic_runtime.choosing.estimates import Outlook

RECENT = 5  # steps whose pace still counts


@dataclass(frozen=True)
class _Option:
    """A choice with its predicted seconds for one evaluation, guided and not."""

    choice: Choice
    guided: float
    plain: float

    def over(self, evaluations: Sequence[tuple[int, int]]) -> float:
        """Predicted seconds of steps with so many guided and other evaluations each."""
        return sum(guided for guided, _ in evaluations) * self.guided + sum(plain for _, plain in evaluations) * self.plain


@dataclass(frozen=True)
class Underway:
    """One picture's state: the times still to visit, `spacing` apart as first asked for, what was measured of late, and the clock."""

    options: tuple[_Option, ...]
    outlook: "Outlook"
    times: tuple[float, ...]
    asked: int
    spacing: float
    ratios: tuple[float, ...] = ()
    measured: int = 0
    elapsed: float = 0.0
    clock: float | None = None
    predicted: float = 0.0

    @property
    def pace(self) -> float:
        """Seconds over prediction: the median of the last steps, or the last one where that was slower.

        A slower machine is believed at once, since late is worse than poor; a faster one when most of the last steps were.
        """
        return max(statistics.median(self.ratios), self.ratios[-1]) if self.ratios else 1.0

    @property
    def hiccup(self) -> float:
        """Seconds by which one more step like the worst of late would exceed the pace: what must stay in hand until the end."""
        if not self.ratios or len(self.times) < 2:
            return 0.0
        return (max(self.ratios) - self.pace) * self.options[0].over(self.outlook.evaluations(self.times[:2]))


@dataclass(frozen=True)
class Deadline:
    """The best pictures that are done `seconds` after they were asked for.

    Before each step it takes the best budget that all steps still to come could have in the time that is left, at the pace of the last
    steps; time that is saved goes to later, cleaner steps. Where even the cheapest budget is too slow, the rest of the run is spread over
    fewer steps (samplers that can resume; others run at the cheapest). `margin` is the share of the time that is kept for what nothing
    predicts. Fewer than `least_steps` are never planned for; a picture that is already late is finished as fast as it goes.

    Raises, before the first step: UnreachableError where `least_steps` at the cheapest budget would take longer on an idle machine.
    """

    seconds: float
    guidance_budget: Budget | None = None
    margin: float = 0.08
    least_steps: int = 4

    def __post_init__(self) -> None:
        positive(self.seconds, "a deadline", "seconds")
        if not 0 <= self.margin < 1:
            raise UsageError(f"the margin is a share of the time, 0 or more and below 1, got {self.margin!r}")
        if isinstance(self.least_steps, bool) or not isinstance(self.least_steps, int) or self.least_steps < 1:
            raise UsageError(f"least_steps must be a whole number above zero, got {self.least_steps!r}")

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook") -> Underway:
        choices = outlook.frontier(self.guidance_budget)
        options = tuple(_Option(choice, outlook.seconds(choice, True), outlook.seconds(choice, False)) for choice in choices)
        goal = self.seconds * (1 - self.margin) - outlook.finish
        fewest = min(self.least_steps, steps)
        planned = next((n for n in range(steps, fewest - 1, -1) if _need(options[0], outlook, n) <= goal), fewest)
        if planned == fewest and (least := _need(options[0], outlook, fewest) + outlook.finish) > self.seconds:
            raise UnreachableError(
                f"no picture can be done in {1e3 * self.seconds:.0f} ms here: the nearest that is reachable is {1e3 * least:.0f} ms, "
                f"{fewest} steps at {choices[0].budget}. Allow at least that. (Measured times are kept in {_kept()}; "
                "delete that folder if they were taken while the machine was busy.)"
            )
        times = tuple(outlook.times(planned))
        carried = (outlook.pace,) if outlook.pace != 1 else ()
        return Underway(options, outlook, times, steps, (times[0] - times[-1]) / steps, carried)

    def next(self, state: Underway, index: int, seconds: float) -> tuple[Choice, Underway]:
        state = self._measured(state, seconds)
        left = self.seconds * (1 - self.margin) - state.elapsed - state.outlook.finish * state.pace
        left -= state.hiccup
        times = self._replanned(state, index, left)
        evaluations = state.outlook.evaluations(times)
        fitting = [option for option in state.options if state.pace * option.over(evaluations) <= left]
        best = fitting[-1] if fitting else state.options[0]
        steps = len(times) - 1
        predicted = best.over(evaluations[:1])
        reason = f"{1e3 * max(left, 0):.0f} ms left for {steps} steps at pace {state.pace:.2f}" + (
            "" if fitting else ": as fast as it goes"
        )
        changed = steps if times != state.times or state.clock is None else None
        choice = replace(best.choice, steps=changed, predicted=predicted, reason=reason)
        return choice, replace(state, times=times[1:], predicted=predicted, clock=seconds)

    def _measured(self, state: Underway, seconds: float) -> Underway:
        """The state with the step before this one in it. A clock that jumps back counts the step as predicted."""
        from elastic_runtime.choosing.estimates import clipped

        if state.clock is None:
            return replace(state, elapsed=min(max(seconds, 0.0), self.seconds))
        took = seconds - state.clock
        took = min(took, self.seconds) if took >= 0 else state.predicted * state.pace
        ratios = (*state.ratios, clipped(state.predicted, took))[-RECENT:]
        return replace(state, elapsed=state.elapsed + took, ratios=ratios, measured=state.measured + 1)

    def _replanned(self, state: Underway, index: int, left: float) -> tuple[float, ...]:
        """The times to visit: as densely as was first asked for where the cheapest budget affords it, else as many as it affords.

        They are never further apart than `least_steps` of a whole run: what is late gets no better by being poor.
        """
        if not state.measured or not state.outlook.resumable or len(state.times) < 2:
            return state.times
        begin, rest = state.times[0], (state.times[0] - state.times[-1]) / state.spacing
        densest = max(1, min(round(rest), state.asked - index))
        sparsest = min(densest, max(1, math.ceil(rest * min(self.least_steps, state.asked) / state.asked - 1e-6)))
        for steps in range(densest, sparsest - 1, -1):
            times = state.times if len(state.times) - 1 == steps else tuple(state.outlook.times(steps, begin))
            if state.pace * state.options[0].over(state.outlook.evaluations(times)) <= left:
                break
        return times


def _need(option: _Option, outlook: "Outlook", steps: int) -> float:
    return option.over(outlook.evaluations(outlook.times(steps)))


def _kept() -> str:
    from elastic_runtime.choosing.calibration import folder

    return str(folder())
