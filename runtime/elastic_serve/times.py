"""How long a step takes here: calibrated, and corrected by each step that is taken.

What was seen fades, so that one slow moment is forgotten though nothing runs that would tell of a faster one: what is predicted to take too
long is not begun, and would never be seen again.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from elastic_runtime.choosing.estimates import WEIGHT, clipped
from elastic_runtime.contract.budget import Budget
from elastic_runtime.device import Clock

# The same for a step that was faster: a slower machine is believed sooner, since late is worse than poor.
DOUBT = 0.1
MOST = 4096  # predictions that are remembered: requests that are refused ask for some, too
PAYS = 0.05  # of the time a row: what twice the rows must save for a run to be made larger
FADES = 60.0  # seconds in which what was seen comes to weigh a third, where nothing newer is seen
STEPS = 100.0  # the same in steps, for models whose steps take long
SIZED = 1.0  # seconds for which the sizes of runs are kept


@dataclass(frozen=True)
class Kind:
    """What one step of a picture runs; pictures of one kind may share a run.

    weak: the budget of guidance's weak branch where that runs apart. evaluations: of the model in one step.
    """

    model: str
    budget: Budget
    weak: Budget | None = None
    evaluations: int = 1


class Times(Protocol):
    """What the scheduler asks of a clock that it does not have."""

    def seconds(self, kind: Kind, rows: int) -> float:
        """Predicted seconds of one step of `kind` on so many rows of the denoiser's batch."""

    def together(self, kind: Kind) -> int:
        """How many rows a run should hold where there are as many."""


# prior(kind, rows) -> seconds of one step before any was observed
Prior = Callable[[Kind, int], float]


@dataclass(frozen=True)
class _Seen:
    """Seconds over what was predicted for them, when that was seen, and the seconds over which it fades."""

    ratio: float
    time: float
    span: float

    def at(self, now: float, otherwise: float) -> float:
        """What it says now: as it gets old it gives way to the ratio that holds `otherwise`."""
        return otherwise + (self.ratio - otherwise) * math.exp(min(self.time - now, 0.0) / self.span)


class Learned:
    """Predictions of `prior`, corrected by what steps took: where a kind and size was seen by that, elsewhere by the model's pace.

    What was seen of a kind and size fades towards the pace, and the pace towards the prior. `most` gives the largest run of a model. A
    first step of a kind and size plans its memory and tells nothing. Threads may ask while one observes.
    """

    def __init__(self, prior: Prior, most: Callable[[str], int], clock: Clock = time.monotonic):
        self._prior, self._most, self._clock = lru_cache(MOST)(prior), most, clock
        self._ratios: dict[tuple[Kind, int], _Seen] = {}
        self._paces: dict[str, _Seen] = {}
        self._readings: dict[str, _Seen] = {}
        self._begun: set[tuple[Kind, int]] = set()
        self._sizes: dict[Kind, int] = {}
        self._sized = clock()

    def seconds(self, kind: Kind, rows: int) -> float:
        return self._prior(kind, rows) * self._ratio(kind, rows, self._clock())

    def pace(self, model: str) -> float:
        """Seconds of late steps over what was predicted for them."""
        return self._pace(model, self._clock())

    def together(self, kind: Kind) -> int:
        """Rows double as long as that saves time on each of them."""
        now = self._clock()
        if len(self._sizes) >= MOST or abs(now - self._sized) > SIZED:
            self._sizes, self._sized = {}, now
        if (rows := self._sizes.get(kind)) is None:
            rows, most = 1, self._most(kind.model)
            while 2 * rows <= most and self.seconds(kind, 2 * rows) / 2 <= self.seconds(kind, rows) * (1 - PAYS):
                rows *= 2
            self._sizes[kind] = rows
        return rows

    def reading(self, model: str, prior: float) -> float:
        """Seconds that a prompt takes to be read; `prior` before any was, and long after."""
        seen = self._readings.get(model)
        return prior if seen is None else prior * seen.at(self._clock(), 1.0)

    def read(self, model: str, prior: float, seconds: float) -> None:
        """Take the reading of one prompt into the predictions."""
        now, ratio = self._clock(), clipped(prior, seconds)
        known = self._readings.get(model)
        self._readings[model] = _seen(ratio if known is None else known.at(now, 1.0), ratio, prior, now)

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        """Take one step of `kind` on so many rows into the predictions."""
        self._sizes = {}
        if (kind, rows) not in self._begun:
            self._begun.add((kind, rows))
            return
        now, prior = self._clock(), self._prior(kind, rows)
        ratio, known, pace = clipped(prior, seconds), self._ratio(kind, rows, now), self._pace(kind.model, now)
        self._ratios[kind, rows] = _seen(known, ratio, prior, now)
        self._paces[kind.model] = _seen(pace, ratio, prior, now)

    def _ratio(self, kind: Kind, rows: int, now: float) -> float:
        pace, seen = self._pace(kind.model, now), self._ratios.get((kind, rows))
        return pace if seen is None else seen.at(now, pace)

    def _pace(self, model: str, now: float) -> float:
        seen = self._paces.get(model)
        return 1.0 if seen is None else seen.at(now, 1.0)


def _seen(known: float, ratio: float, prior: float, now: float) -> _Seen:
    """The ratio that was known, drawn towards one that was seen now of what the prior says takes so many seconds."""
    weight = WEIGHT if ratio > known else DOUBT
    return _Seen(known + weight * (ratio - known), now, max(FADES, STEPS * prior))
