"""Policies that settle on one way to draw before the first step: by memory, by time, by quality, or by all that is
known here."""

import math

from elastic_runtime.choosing.estimates import Outlook
from elastic_runtime.choosing.option import Choice, Option
from elastic_runtime.choosing.policy import Settled
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import UnreachableError, UsageError

FLOOR = 0.99  # of the best accuracy
NEAR = 1.25  # times the least Frechet distance: what a judge still recognises may look much worse
FREE = 0.01  # of a time that is predicted by peak rates alone: a larger budget that adds less is bound by memory, not by arithmetic


def positive(value: float, what: str, unit: str) -> None:
    """Raise UsageError unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{what} must be a number of {unit} above zero, got {value!r}")


def share(value: float, what: str) -> None:
    """Raise UsageError unless `value` is a share of the best."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UsageError(f"{what} is a share of the best, above 0 and at most 1, got {value!r}")


class FitMemory(Settled, frozen=True, tag="fit_memory"):
    """The best way to draw in which the process is predicted to stay within `limit` bytes at its peak.

    The process's own share is what it held when the bundle was open; what a run adds comes from a kept calibration, or
    from the manifest's activations. What it had held before, to read prompts, counts where that was more. GPU memory that a
    backend holds apart from the process is not counted.
    """

    limit: float
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.limit, "a memory limit", "bytes")

    def init(self, outlook: Outlook) -> Choice:
        options = outlook.options(self.guidance_budget)
        fitting = [option for option in options if outlook.memory(option) <= self.limit]
        if not fitting:
            least = min(options, key=outlook.memory)
            raise UnreachableError(
                f"no budget stays within {_megabytes(self.limit)}: with the weights loaded the process holds "
                f"{_megabytes(outlook.gauge.opened or 0)}, and at {least.name} it needs {_megabytes(outlook.memory(least))}. "
                f"Allow that much, or draw {outlook.smaller}."
            )
        best = max(fitting, key=outlook.worth)
        return best.choice(reason=f"{_megabytes(outlook.memory(best))} of the {_megabytes(self.limit)} allowed")


class FitLatency(Settled, frozen=True, tag="fit_latency"):
    """The best way to draw in which the pictures are predicted to take at most `seconds`. It is not decided again while
    they are drawn."""

    seconds: float
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.seconds, "a time", "seconds")

    def init(self, outlook: Outlook) -> Choice:
        options = outlook.frontier(self.guidance_budget)
        fitting = [option for option, seconds in options.items() if seconds + outlook.finish <= self.seconds]
        if not fitting:
            cheapest = next(iter(options))
            steps = sum(cheapest.steps)
            advice = f"or draw {outlook.smaller}"
            if not cheapest.plan:  # a plan has steps of its own, and a Deadline begins with its fewest, too
                fewer = _fewer(outlook, cheapest, self.seconds)
                advice = f"take {fewer} steps, or use a Deadline" if fewer else "or use a Deadline"
            raise UnreachableError(
                f"{_milliseconds(self.seconds)} are too few for {steps} steps: the nearest that is reachable is "
                f"{_milliseconds(outlook.picture(cheapest))}, at {cheapest.name}. Allow that, {advice}."
            )
        best = fitting[-1]
        return best.choice(reason=f"{_milliseconds(outlook.picture(best))} of the {_milliseconds(self.seconds)} allowed")


class Quality(Settled, frozen=True, tag="quality"):
    """The cheapest way to draw, by FLOPs, that keeps `floor` times the best accuracy of the card's quality table.

    Accuracy between two rows of the table is a straight line in FLOPs.
    """

    floor: float
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.floor, "a quality")

    def init(self, outlook: Outlook) -> Choice:
        if not outlook.graded:
            raise UsageError(
                f"this bundle's card has no quality table ({outlook.table}), so a quality cannot be kept: name {outlook.named}"
                f"{outlook.grading}"
            )
        options = outlook.options(self.guidance_budget)
        keeping = [option for option in options if outlook.quality(option) >= self.floor]
        if not keeping:
            best = max(options, key=outlook.quality)
            raise UnreachableError(
                f"no budget of this bundle keeps {self.floor:.1%} of the best accuracy: the nearest is "
                f"{outlook.quality(best):.1%}, at {best.name}"
            )
        return keeping[0].choice(reason=f"keeps {outlook.quality(keeping[0]):.1%} of the best accuracy, {self.floor:.1%} asked")


class Auto(Settled, frozen=True, tag="auto"):
    """What suits this machine when nothing is asked for: enough quality in the least time.

    With a quality table it is the cheapest way that keeps `floor` of the best accuracy and whose pictures are near the
    best ones, by their Frechet distance too (`NEAR`); else the model's usual one. Larger budgets that take the same time
    by the device's peak rates are free, so the largest of them is taken; and where memory is short, the largest that
    fits. Nothing is measured: the same machine chooses the same each time.
    """

    floor: float = FLOOR
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.floor, "the floor")

    def init(self, outlook: Outlook) -> Choice:
        options = outlook.options(self.guidance_budget)
        available = outlook.gauge.available
        fitting = [option for option in options if available is None or outlook.growth(option) <= available]
        if not fitting:
            raise UnreachableError(
                f"there are {_megabytes(available or 0)} of memory free, and the smallest budget, {options[0].name}, needs "
                f"{_megabytes(outlook.growth(options[0]))} more: free some, or draw {outlook.smaller}"
            )
        target, reason = self._target(options, outlook)
        if target not in fitting:
            return fitting[-1].choice(reason=f"the largest that fits into {_megabytes(available or 0)} of free memory")
        seconds = outlook.peak_seconds(target)
        free = [option for option in fitting if outlook.peak_seconds(option) <= seconds * (1 + FREE)]
        best = max([target, *free], key=outlook.worth)
        if best == target:
            return target.choice(reason=reason)
        return best.choice(reason=f"{target.name} {reason}, and this takes no longer: reading the weights does")

    def _target(self, options: list[Option], outlook: Outlook) -> tuple[Option, str]:
        keeping = [option for option in options if outlook.quality(option) >= self.floor and outlook.distance(option) <= NEAR]
        if outlook.routed:  # a router sizes its own steps, and a cap would only cut into them
            return max(options, key=lambda option: sum(option.budget.values())), "leaves the number of tokens to the router"
        if outlook.graded and keeping:
            return keeping[0], f"keeps {outlook.quality(keeping[0]):.1%} of the best accuracy"
        reason = "is the best on offer" if outlook.graded else f"is the default: the card has no quality table ({outlook.table})"
        return outlook.usual(options), reason


def _fewer(outlook: Outlook, option: Option, seconds: float) -> int:
    """The most steps of an option that are done in `seconds`; 0 where none are."""
    least = max(outlook.least, len(option.steps))
    low, high = least - 1, sum(option.steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if outlook.picture(option, steps=middle) <= seconds else (low, middle)
    return low if low >= least else 0


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"
