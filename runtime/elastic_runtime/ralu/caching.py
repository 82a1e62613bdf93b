"""Step caching: on chosen steps the prediction is reused or extrapolated from earlier ones, and the network does not run.

The paper combines RALU with TaylorSeer (arXiv 2503.06923), which extrapolates features inside the network. A compiled graph keeps
these to itself, so here it is the network's output that is extrapolated, in sigma.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.plan import Plan

# velocity(tokens (B, S, C), positions (B, S, 2) as (row, column), sigma, index, stage): the guided prediction (B, S, C)
Velocity = Callable[[np.ndarray, np.ndarray, float, int, int], np.ndarray]


@dataclass(frozen=True)
class Caching:
    """Steps (numbered from 0 over the whole plan) on which the network does not run.

    `order` 0 repeats the stage's last prediction; 1 continues the line through its last two, the first-order Taylor expansion
    with a finite difference. A stage has tokens of its own, so its first step, or first two, cannot be skipped.
    """

    skip: frozenset[int]
    order: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        steps = list(self.skip) if isinstance(self.skip, Iterable) else [None]
        if not all(isinstance(step, int | np.integer) and not isinstance(step, bool) for step in steps):
            raise UsageError(f"caching skips steps, whole numbers such as {{3, 5}}, got {self.skip!r}")
        object.__setattr__(self, "skip", frozenset(map(int, steps)))
        _check_order(self.order)

    @classmethod
    def every(cls, plan: Plan, interval: int, order: Literal[0, 1] = 1) -> "Caching":
        """Run the network on the first `order + 1` steps of each stage and then on every `interval`-th.

        Raises: UsageError for something else than a plan (`ralu.plan.PRESETS` has the named ones), or an interval below 2.
        """
        if not isinstance(plan, Plan):
            raise UsageError(f"caching is laid over a Plan, PRESETS['4x'] or Plan.full(20), got {plan!r}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 2:
            raise UsageError(
                f"the network runs on every 2nd step or more rarely, got an interval of {interval!r}: without caching it runs on every step"
            )
        _check_order(order)
        skip, begin = set(), 0
        for steps in plan.steps:
            free = range(begin + order + 1, begin + steps)
            skip |= {step for step in free if (step - free.start) % interval != interval - 1}
            begin += steps
        return cls(frozenset(skip), order)

    def check(self, plan: Plan) -> None:
        """Raise UsageError for a step that the plan lacks, or that has too few computed ones before it in its stage."""
        if odd := sorted(step for step in self.skip if step not in range(plan.total)):
            raise UsageError(f"caching skips step {odd[0]}, but the plan's steps are 0 to {plan.total - 1}")
        begin = 0
        for steps in plan.steps:
            computed = 0
            for step in range(begin, begin + steps):
                if step not in self.skip:
                    computed += 1
                elif computed <= self.order:
                    needs = "two computed steps" if self.order else "a computed step"
                    raise UsageError(
                        f"caching of order {self.order} needs {needs} before step {step} in its stage, which begins at {begin}"
                    )
            begin += steps

    def apply(self, velocity: Velocity, plan: Plan) -> Velocity:
        """`velocity` of one run along `plan`, not computed on the skipped steps."""
        self.check(plan)
        known: list[tuple[float, np.ndarray]] = []  # (sigma, prediction) of the stage's last computed steps, at most two
        last_stage = -1

        def cached(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
            nonlocal last_stage
            if stage != last_stage:
                known.clear()
                last_stage = stage
            if index not in self.skip:
                known.append((sigma, velocity(x, positions, sigma, index, stage)))
                del known[:-2]
                return known[-1][1]
            late, v = known[-1]
            if self.order == 0:
                return v
            early, before = known[-2]
            return v + (sigma - late) / (late - early) * (v - before)

        return cached


def _check_order(order: int) -> None:
    if isinstance(order, bool) or order not in (0, 1):
        raise UsageError(f"caching has order 0 (reuse) or 1 (extrapolate), got {order!r}")
