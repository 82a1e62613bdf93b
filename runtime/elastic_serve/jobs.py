"""Pictures as the scheduler sees them: when they are due, and what they take."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

from elastic_serve.times import Kind


@dataclass(frozen=True)
class Way:
    """One way to draw a picture: its steps of each kind, in order, and the seconds from its last step to the picture."""

    legs: tuple[tuple[Kind, int], ...]
    finish: float = 0.0

    def after(self, taken: int) -> list[tuple[Kind, int]]:
        """What is left after so many steps, the last leg first."""
        left: list[tuple[Kind, int]] = []
        for kind, steps in self.legs:
            done = min(taken, steps)
            taken -= done
            if steps > done:
                left.append((kind, steps - done))
        return left[::-1]


@dataclass(frozen=True)
class Job:
    """A picture to be drawn, in one of its `ways`, cheapest first.

    due: when it should be done, on the scheduler's clock; `promised` tells a deadline that was asked for, and is kept or refused, from one
    that is a wish. again: whether it was taken in before, elsewhere: it is not refused, and gives way to nothing. rows: of the denoiser's
    batch in each step. client: whose turns it takes; user: who among that client's. turn and own count the turns of both. prompt: what is
    to be read before its first step, in `reading` seconds, once for all whose prompts are equal; None where nothing is.
    """

    id: int
    client: str
    arrived: float
    due: float
    promised: bool
    rows: int
    ways: tuple[Way, ...]
    taken: int = 0
    turn: int = 0
    user: str = ""
    own: int = 0
    prompt: Hashable | None = None
    reading: float = 0.0
    again: bool = False

    def way(self, level: float) -> Way:
        """The way at a level of the budgets, from 0, the cheapest, to 1."""
        return self.ways[math.floor(level * (len(self.ways) - 1) + 0.5)]

    @property
    def yields(self) -> bool:
        """Whether it gives way to promises that come after it."""
        return not self.promised and not self.again

    @property
    def done(self) -> float:
        """The share of its steps that were taken."""
        return self.taken / sum(steps for _, steps in self.ways[-1].legs)

    @property
    def started(self) -> bool:
        return self.taken > 0
