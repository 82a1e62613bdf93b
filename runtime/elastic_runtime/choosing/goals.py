"""Policies that settle on one budget before the first step: by memory, by time, by quality, or by all that is known here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elastic_runtime.choosing.policy import Choice
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from elastic_runtime.choosing.estimates import Outlook

FREE = 0.01  # of a time that is predicted by peak rates alone: a larger budget that adds less is bound by memory, not by arithmetic


def positive(value: float, what: str, unit: str) -> None:
    """Raise UsageError unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{what} must be a number of {unit} above zero, got {value!r}")


class _Settled:
    """What all these policies share: the choice made at first is the state, and stays."""

    def next(self, state: Choice, index: int, seconds: float) -> tuple[Choice, Choice]:
        return state, state


@dataclass(frozen=True)
class FitMemory(_Settled):
    """The best budget at which the process is predicted to stay within `limit` bytes at its peak.

    The process's own share is what it held when the bundle was open; what a run adds comes from a kept calibration, or from the
    manifest's activations. GPU memory that a backend holds apart from the process is not counted.
    """

    limit: float
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        positive(self.limit, "a memory limit", "bytes")

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook") -> Choice:
        choices = outlook.choices(self.guidance_budget)
        fitting = [choice for choice in choices if outlook.memory(choice) <= self.limit]
        if not fitting:
            least = min(choices, key=outlook.memory)
            raise UnreachableError(
                f"no budget stays within {_megabytes(self.limit)}: with the weights loaded the process holds "
                f"{_megabytes(outlook.gauge.opened or 0)}, and at {least.budget} it needs {_megabytes(outlook.memory(least))}. "
                f"Allow that much, or draw fewer pictures at once."
            )
        best = max(fitting, key=lambda choice: outlook.quality(choice.budget))
        return replace(best, reason=f"{_megabytes(outlook.memory(best))} of the {_megabytes(self.limit)} allowed")


@dataclass(frozen=True)
class FitLatency(_Settled):
    """The best budget at which the pictures are predicted to take at most `seconds`. It is not decided again while they are drawn."""

    seconds: float
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        positive(self.seconds, "a time", "seconds")

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook") -> Choice:
        times, choices = outlook.times(steps), outlook.frontier(self.guidance_budget)
        fitting = [choice for choice in choices if outlook.picture(choice, times) <= self.seconds]
        if not fitting:
            least = outlook.picture(choices[0], times)
            raise UnreachableError(
                f"{_milliseconds(self.seconds)} are too few for {steps} steps: the nearest that is reachable is {_milliseconds(least)}, "
                f"at {choices[0].budget}. Allow that, take {_fewer(outlook, choices[0], steps, self.seconds)} steps, or use a Deadline."
            )
        best, taken = fitting[-1], outlook.picture(fitting[-1], times)
        return replace(best, reason=f"{_milliseconds(taken)} of the {_milliseconds(self.seconds)} allowed")


@dataclass(frozen=True)
class Quality(_Settled):
    """The cheapest budget, by FLOPs, that keeps `floor` times the best accuracy of the card's quality table.

    Accuracy between two rows of the table is a straight line in FLOPs.
    """

    floor: float
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, int | float) or not 0 < self.floor <= 1:
            raise UsageError(f"a quality is a share of the best, above 0 and at most 1, got {self.floor!r}")

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook") -> Choice:
        if not outlook.graded:
            raise UsageError(
                "this bundle's card has no quality table, so a quality cannot be kept: name a budget, or grade it with samples/evaluate.py"
            )
        choices = outlook.choices(self.guidance_budget)
        keeping = [choice for choice in choices if outlook.quality(choice.budget) >= self.floor]
        if not keeping:
            best = max(choices, key=lambda choice: outlook.quality(choice.budget))
            raise UnreachableError(
                f"no budget of this bundle keeps {self.floor:.1%} of the best accuracy: the nearest is "
                f"{outlook.quality(best.budget):.1%}, at {best.budget}"
            )
        return replace(keeping[0], reason=f"keeps {outlook.quality(keeping[0].budget):.1%} of the best accuracy, {self.floor:.1%} asked")


@dataclass(frozen=True)
class Auto(_Settled):
    """What suits where nothing is asked for: almost the best quality, within free memory, and nothing saved that saves no time.

    With a quality table it is the cheapest budget that keeps `floor` of the best accuracy, else the axes' default. Larger budgets that
    take the same time by the device's peak rates are free, so the largest of them is taken; and where memory is short, the largest that
    fits. Nothing is measured: the same machine chooses the same budget each time.
    """

    floor: float = 0.99
    guidance_budget: Budget | None = None

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook") -> Choice:
        choices = outlook.choices(self.guidance_budget)
        available = outlook.gauge.device.memory.available
        fitting = [choice for choice in choices if available is None or outlook.growth(choice) <= available]
        if not fitting:
            raise UnreachableError(
                f"there are {_megabytes(available or 0)} of memory free, and the smallest budget, {choices[0].budget}, needs "
                f"{_megabytes(outlook.growth(choices[0]))} more: free some, or draw fewer pictures at once"
            )
        wanted, why = self._wanted(axes, choices, outlook)
        if wanted not in fitting:
            return replace(fitting[-1], reason=f"the largest that fits into {_megabytes(available or 0)} of free memory")
        prior = outlook.gauge.peak
        taken = outlook.seconds(wanted, True, prior)
        free = [choice for choice in fitting if outlook.seconds(choice, True, prior) <= taken * (1 + FREE)]
        best = max([wanted, *free], key=lambda choice: outlook.quality(choice.budget))
        if best == wanted:
            return replace(wanted, reason=why)
        return replace(best, reason=f"{wanted.budget} {why}, and this takes no longer: reading the weights does")

    def _wanted(self, axes: Sequence[Axis], choices: list[Choice], outlook: "Outlook") -> tuple[Choice, str]:
        keeping = [choice for choice in choices if outlook.quality(choice.budget) >= self.floor]
        if any(axis.input == "slots" for axis in axes):  # a router sizes its own steps, and a cap would only cut into them
            whole = max(choices, key=lambda choice: sum(choice.budget.values()))
            return whole, "leaves the number of tokens to the router"
        if outlook.graded and keeping:
            return keeping[0], f"keeps {outlook.quality(keeping[0].budget):.1%} of the best accuracy"
        default = Budget().on(axes)
        nearest = min(
            choices, key=lambda choice: abs(outlook.gauge.peak.work(choice.budget).flops - outlook.gauge.peak.work(default).flops)
        )
        return nearest, "is the default: the card has no quality table" if not outlook.graded else "is the best on offer"


def _fewer(outlook: "Outlook", choice: Choice, steps: int, seconds: float) -> int:
    return max((n for n in range(1, steps) if outlook.picture(choice, outlook.times(n)) <= seconds), default=0)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"
