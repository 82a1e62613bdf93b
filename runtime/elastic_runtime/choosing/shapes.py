"""In how many steps each stage of a plan may be taken, what that is worth by the card, and how long it takes.

The first stages of a plan are cheap and make the picture; the last is dear, and a few steps of it are enough. So no straight line in FLOPs
tells what a plan is worth in other steps than the graded ones. What does hold: more steps of a stage never make a picture worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic_runtime.ralu.plan import Plan, shares

FINEST = 4  # times the steps that a plan was made for, where nothing tells what plain sampling would take
LEAST = 4  # steps that are weighed: one of them would be all that the last stage gets, and its picture is blurred
SURER = 1e-6  # of the quality: of two ways that the card grades alike, the one with more steps


@dataclass(frozen=True)
class Grades:
    """The card's rows of one plan, as arrays: steps (rows, stages), FLOPs, accuracy over the best of the card, and Frechet distance
    over the least of it, each (rows,)."""

    steps: np.ndarray
    flops: np.ndarray
    accuracy: np.ndarray
    distance: np.ndarray

    def of(self, steps: np.ndarray, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quality and distance of shapes (n, stages) of so many FLOPs (n,), each the best that the rows vouch for.

        A row vouches for all shapes with at least its steps in every stage, and two rows, one of them larger, for what lies between
        them: a straight line in the share of the way that the stage that is furthest behind has made. Below all rows quality falls
        with the FLOPs, to nothing, and the distance is the largest.
        """
        low, high = np.nonzero((self.steps[None] >= self.steps[:, None]).all(-1))  # pairs of rows, each with itself among them
        above = (steps[:, None] >= self.steps[low]).all(-1)  # (n, pairs)
        way = (self.steps[high] - self.steps[low]).astype(float)  # (pairs, stages)
        made = np.where(way > 0, (steps[:, None] - self.steps[low]) / np.where(way > 0, way, 1.0), 1.0).min(-1).clip(0.0, 1.0)

        def between(values: np.ndarray) -> np.ndarray:
            return values[low] + made * (values[high] - values[low])

        quality = np.where(above, between(self.accuracy), 0.0).max(1)
        distance = np.where(above, between(self.distance), np.inf).min(1)
        below = ~np.any(above, axis=1)
        fallen = self.accuracy.min() * np.minimum(flops / max(float(self.flops.min()), 1.0), 1.0)
        return np.where(below, fallen, quality), np.where(below, self.distance.max(), distance)


def shapes(plan: Plan, graded: Sequence[tuple[int, ...]], flops: Sequence[float], most: float) -> np.ndarray:
    """Steps (n, stages) that are worth weighing: those of the plan, shared out over fewer and more, and the graded ones with any number
    in the last stage.

    A plan of several stages takes no more than `most` FLOPs, or, where that is 0, than `FINEST` times its own steps. `flops` are a step's,
    by stage.
    """
    fewest = max(len(plan.steps), min(LEAST, plan.total))
    if plan.plain:
        return np.arange(fewest, plan.total + 1)[:, None]
    own = float(np.dot(plan.steps, flops))
    largest = int(plan.total * most / own) if most and own else FINEST * plan.total
    rows = [shares(plan.steps, total) for total in range(fewest, max(largest, fewest) + 1)]
    last = rows[-1][-1]
    for *first, least in graded:
        rows += [(*first, count) for count in range(least, max(last, least) + 1)]
    every = np.unique(np.array(rows), axis=0)
    return every[(every @ np.asarray(flops) <= most) | (every.sum(1) <= plan.total)] if most else every


def tails(every: np.ndarray, taken: Sequence[int]) -> np.ndarray:
    """Steps (n, stages still to come) that a run may still take: of `every` shape what lies ahead of `taken`, the steps of the stages that
    are done and of the one under way, or one more step of the latter where all shapes are exceeded."""
    stage = len(taken) - 1
    ahead = np.unique(every[:, stage:], axis=0) - np.array([taken[-1]] + [0] * (every.shape[1] - stage - 1))
    onward = ahead[ahead[:, 0] > 0]
    if len(onward):
        return onward
    ahead[:, 0] = 1
    return np.unique(ahead, axis=0)
