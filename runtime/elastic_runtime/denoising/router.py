"""How many token slots a run of a DC-DiT gets, whose router keeps more or fewer tokens with every picture and step.

A budget of tokens is a cap. Below it a run costs what its slots cost, so each step is sized by the counts of the steps before; the
graph tells how many tokens its router kept before the slots ended, hence whether a result is whole or the step must run again.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.schedule import is_number
from elastic_runtime.errors import BudgetError, UsageError

NARROWEST = 8  # between two sizes; kernels of GPUs like multiples of it
# With random walks and trends of 20 and 250 steps, runs of 8 counts and 1.5 of their largest rise cost least, within 2 %.
REMEMBERED = 8
MARGIN = 1.5


@dataclass(frozen=True)
class Slots:
    """What one branch of guidance has been seen to keep, and the sizes to choose from. Immutable: `after` gives the next state.

    axis: the axis's name. sizes: numbers of slots that may run, rising. share: of the tokens that no drop takes. seen: the largest
    counts of the last steps.
    """

    axis: str
    sizes: tuple[int, ...]
    share: float = 1.0
    seen: tuple[int, ...] = ()

    @classmethod
    def of(cls, axis: Axis, budgets: Sequence[Budget] | None, drop: float) -> "Slots":
        """The state before the first step; `budgets` are all that the artifact was compiled for, if it was for some only."""
        sizes = buckets(axis) if budgets is None else tuple(sorted({budget[axis.name] for budget in budgets}))
        return cls(axis.name, sizes, 1.0 - drop)

    def first(self, budget: Budget) -> Budget:
        """The budget to run first under the cap of `budget`: the last count, and more by what counts have risen lately.

        Where nothing has been seen it is half of all, since routers are trained to keep a quarter or so.
        """
        if not self.seen:
            return self.holding(round(self.share * self.sizes[-1] / 2), budget)
        rises = [b - a for a, b in itertools.pairwise(self.seen)] or [self.seen[0] // 8]
        return self.holding(self.seen[-1] + round(MARGIN * max(0, *rises)), budget)

    def holding(self, count: int, budget: Budget) -> Budget:
        """The cheapest budget under the cap of `budget` that holds `count` tokens, or the cap where none does."""
        cap = budget[self.axis]
        size = next((size for size in self.sizes if count <= size < cap), cap)
        return Budget(**{**budget, self.axis: size})

    def after(self, kept: Sequence[int]) -> "Slots":
        """The state after a step whose rows kept so many tokens each."""
        return replace(self, seen=(*self.seen, max(kept))[-REMEMBERED:])


@dataclass(frozen=True)
class Routed:
    """What the router kept in one branch of one step.

    kept: tokens of each picture, before the cap. slots: those of the largest run. reruns: how many runs did not hold what was kept
    and were done again. probability: of each token to be kept, float32 (B, L) in raster order, where the graph tells.
    """

    kept: tuple[int, ...]
    slots: int
    reruns: int
    drop: float
    probability: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """Which tokens the core worked on, bool (B, L), where the graph tells the probabilities."""
        return None if self.probability is None else kept_set(self.probability, self.drop, self.slots)


@dataclass(frozen=True)
class Routing:
    """What a picture has been seen to keep so far, in both branches of guidance, and what each drops. Without slots nothing is sized."""

    drop: float = 0.0
    guidance_drop: float = 0.0
    slots: Slots | None = None
    guidance_slots: Slots | None = None

    def after(self, routed: Routed | None, guidance_routed: Routed | None) -> "Routing":
        """The state after a prediction; a branch that did not run stays as it was."""
        strong, weak = self.slots, self.guidance_slots
        if not (strong or weak):  # as in most models, and a small step has no time for more
            return self
        return replace(
            self,
            slots=strong.after(routed.kept) if strong and routed else strong,
            guidance_slots=weak.after(guidance_routed.kept) if weak and guidance_routed else weak,
        )


def buckets(axis: Axis) -> tuple[int, ...]:
    """Sizes from the axis's least to its largest, at most an eighth (and at least 8) apart, on the axis's steps."""
    sizes = [axis.min]
    while sizes[-1] < axis.max:
        width = max(NARROWEST, 1 << (sizes[-1] // 8).bit_length() >> 1)  # a power of two, a sixteenth to an eighth of the size
        wanted = (sizes[-1] // width + 1) * width
        sizes.append(min(axis.min + -(-(wanted - axis.min) // axis.step) * axis.step, axis.max))
    return tuple(sizes)


def kept_set(probability: np.ndarray, drop: float, slots: int) -> np.ndarray:
    """The tokens that a DC-DiT's core works on, bool (B, L), from the router's probabilities, float32 (B, L).

    Kept are those above one half, the first and the last; of these the share `drop` with the lowest probability is let go, counted in
    float32 as in the graph, and no more than `slots` stay (arXiv 2603.06351). Between equal probabilities the choice is free.
    """
    natural = probability > 1 - probability
    natural[:, [0, -1]] = True
    counts = natural.sum(1)
    counts = counts - np.floor(counts.astype(np.float32) * np.float32(drop)).astype(int)
    order = np.where(natural, -probability, np.inf).argsort(1, kind="stable")
    mask = np.zeros_like(natural)
    np.put_along_axis(mask, order, np.arange(natural.shape[1]) < np.minimum(counts, slots)[:, None], 1)
    return mask


def fraction(value: object, name: str) -> float:
    """A drop fraction, checked: UsageError unless it is a number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise UsageError(f"{name} is the share of the kept tokens to drop, 0 to below 1, got {value!r}")
    return float(value)


def compiled(budget: Budget, budgets: Sequence[Budget] | None, where: str) -> None:
    """Raise BudgetError where an artifact was compiled for some budgets and the cap `budget` is none of them."""
    if budgets is not None and budget not in budgets:
        offered = ", ".join(map(str, budgets))
        raise BudgetError(f"this artifact ({where}) was compiled for {offered}; a cap must be one of these, got {budget}")
