"""How much is asked for of late: what the pictures that came would keep a device busy with, at each level of the budgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

SPANS = 2.0  # times a picture's own time to its deadline, over which it counts as news
FORGOTTEN = 5.0  # of such spans: what is older weighs less than a hundredth
MOST = 1024  # arrivals that are remembered
SHORTEST = 1e-3  # seconds of a span: what is over sooner is over at once


@dataclass(frozen=True)
class _Arrival:
    time: float
    span: float
    seconds: tuple[float, ...]


class Demand:
    """Arrivals, each fading over a span of its own, so that slow models and fast ones are judged alike."""

    def __init__(self) -> None:
        self._arrivals: dict[int, _Arrival] = {}  # by the pictures' numbers, the oldest first

    def arrived(self, number: int, now: float, window: float, seconds: Sequence[float]) -> None:
        """A picture came that has `window` seconds to its deadline and would take so many at each of its levels, the cheapest first."""
        if len(self._arrivals) == MOST:
            del self._arrivals[next(iter(self._arrivals))]
        self._arrivals[number] = _Arrival(now, max(SPANS * window, SHORTEST), tuple(seconds))

    def abandoned(self, number: int, done: float) -> None:
        """Nobody waits for a picture any more, of which a share was done: that was all that it asked for."""
        if arrival := self._arrivals.get(number):
            self._arrivals[number] = replace(arrival, seconds=tuple(done * seconds for seconds in arrival.seconds))

    def busy(self, level: float, now: float) -> float:
        """The share of the device's time that arrivals like those of late take at a level, from 0, the cheapest, to 1."""
        while self._arrivals and now - (first := next(iter(self._arrivals.items())))[1].time > FORGOTTEN * first[1].span:
            del self._arrivals[first[0]]
        return math.fsum(
            min(each.seconds[math.floor(level * (len(each.seconds) - 1) + 0.5)] / each.span, 1.0)  # one picture keeps a device busy at most
            * math.exp(min(each.time - now, 0.0) / each.span)
            for each in self._arrivals.values()
        )
