"""How long a step takes here: calibrated, and corrected by each step that is taken."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from elastic_runtime.choosing.estimates import WEIGHT, clipped
from elastic_runtime.contract.budget import Budget

# The same for a step that was faster: a slower machine is believed sooner, since late is worse than poor.
DOUBT = 0.1
MOST = 4096  # predictions that are remembered: requests that are refused ask for some, too
PAYS = 0.05  # of the time a row: what twice the rows must save for a run to be made larger


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


class Learned:
    """Predictions of `prior`, corrected by what steps took: where a kind and size was seen by that, elsewhere by the model's pace.

    `most` gives the largest run of a model. A first step of a kind and size plans its memory and tells nothing.
    """

    def __init__(self, prior: Prior, most: Callable[[str], int]):
        self._prior, self._most = lru_cache(MOST)(prior), most
        self._ratios: dict[tuple[Kind, int], float] = {}
        self._paces: dict[str, float] = {}
        self._seen: set[tuple[Kind, int]] = set()
        self._sizes: dict[Kind, int] = {}
        self._readings: dict[str, float] = {}

    def seconds(self, kind: Kind, rows: int) -> float:
        ratio = self._ratios.get((kind, rows))
        return self._prior(kind, rows) * (self.pace(kind.model) if ratio is None else ratio)

    def pace(self, model: str) -> float:
        """Seconds of late steps over what was predicted for them."""
        return self._paces.get(model, 1.0)

    def together(self, kind: Kind) -> int:
        """Rows double as long as that saves time on each of them."""
        if kind not in self._sizes:
            if len(self._sizes) == MOST:
                self._sizes.clear()
            rows, most = 1, self._most(kind.model)
            while 2 * rows <= most and self.seconds(kind, 2 * rows) / 2 <= self.seconds(kind, rows) * (1 - PAYS):
                rows *= 2
            self._sizes[kind] = rows
        return self._sizes[kind]

    def reading(self, model: str, prior: float) -> float:
        """Seconds that a prompt takes to be read; `prior` before any was."""
        return self._readings.get(model, prior)

    def read(self, model: str, seconds: float) -> None:
        """Take the reading of one prompt into the predictions."""
        known = self.reading(model, seconds)
        self._readings[model] = _towards(known, seconds)

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        """Take one step of `kind` on so many rows into the predictions."""
        key = kind, rows
        if key not in self._seen:
            self._seen.add(key)
            return
        ratio = clipped(self._prior(kind, rows), seconds)
        known, pace = self._ratios.get(key, ratio), self.pace(kind.model)
        self._ratios[key] = _towards(known, ratio)
        self._paces[kind.model] = _towards(pace, ratio)
        self._sizes.pop(kind, None)


def _towards(known: float, seen: float) -> float:
    return known + (WEIGHT if seen > known else DOUBT) * (seen - known)
