"""What is left of a run: the times still to visit, stage by stage, and how they are spaced anew on another number of
steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from elastic_runtime.ralu.plan import Plan, shares

# space(stage, begin, steps) -> the `steps + 1` times from `begin` (the stage's own beginning where it is None) to the stage's end
Space = Callable[[int, float | None, int], np.ndarray]

EQUAL = 1e-9  # of a stage: times that differ by less are the same


@dataclass(frozen=True)
class Course:
    """The times still to visit, one array a stage, the stage under way first; each has one time more than its steps.

    `grids` are the times first asked for, which a run is never spaced more densely than. `first` numbers the stage
    under way. A course that is not `flexible` keeps its times.
    """

    times: tuple[np.ndarray, ...]
    grids: tuple[np.ndarray, ...]
    space: Space
    first: int = 0
    flexible: bool = True

    @classmethod
    def of(cls, steps: tuple[int, ...], space: Space, flexible: bool = True) -> "Course":
        """A whole run of so many steps a stage."""
        times = tuple(space(number, None, count) for number, count in enumerate(steps))
        return cls(times, times, space, flexible=flexible)

    @classmethod
    def along(cls, plan: Plan) -> "Course":
        """A whole run along a plan of stages."""
        stages = plan.stages()
        return cls.of(plan.steps, lambda number, begin, steps: np.array(stages[number].spaced(steps, begin)))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps left of each stage still to come, the one under way first."""
        return tuple(len(times) - 1 for times in self.times)

    @property
    def total(self) -> int:
        """Steps left in all."""
        return sum(self.steps)

    @property
    def densest(self) -> tuple[int, ...]:
        """Steps left at the spacing that was first asked for."""
        ahead = [int((grid < times[0] - EQUAL * (grid[0] - grid[-1])).sum()) for grid, times in zip(self.grids, self.times, strict=True)]
        return tuple(max(count, 1) for count in ahead)

    @property
    def rest(self) -> float:
        """How much of the run is still to come, in steps as they were first asked for."""
        return sum(_place(grid, float(times[0])) for grid, times in zip(self.grids, self.times, strict=True))

    @property
    def enters(self) -> bool:
        """Whether the next step is the first of a later stage."""
        return self.first > 0 and bool(self.times[0][0] == self.grids[0][0])

    def spaced(self, total: int) -> "Course":
        """The same way in `total` steps, at least one a stage, shared out as they were first asked for."""
        total = max(total, len(self.times))
        if total == self.total or not self.flexible:
            return self
        return self.respaced(shares(self.densest, total))

    def respaced(self, counts: tuple[int, ...]) -> "Course":
        """The same way in so many steps of each stage still to come."""
        if counts == self.steps or not self.flexible:
            return self
        times = tuple(
            self.space(self.first + index, float(self.times[0][0]) if index == 0 else None, count) for index, count in enumerate(counts)
        )
        return replace(self, times=times)

    def onward(self) -> "Course":
        """The course after the next step; nothing is left after the last."""
        head, *rest = self.times
        if len(head) > 2:
            return replace(self, times=(head[1:], *rest))
        return replace(self, times=tuple(rest), grids=self.grids[1:], first=self.first + 1)


def _place(grid: np.ndarray, time: float) -> float:
    """Steps of a falling `grid` from `time` to its end, with a fraction of the one that `time` lies in."""
    return float(np.interp(time, grid[::-1], np.arange(len(grid))))
