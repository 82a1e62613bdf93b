"""Multistep solvers of the ODE: one evaluation a step, and the answers of the steps before make it exact to a higher order.

Generators like those of `flow`. What was answered so far is a `History`, which outlives the loop: a run that goes on in another number of
steps, or at another budget, keeps its order. The first steps have less to go by and are of lower order, and so is the step after a caller
replaced the state, whose answers belong to another path.
"""

import itertools
from collections import deque

import numpy as np

from elastic_runtime.contract.schedule import Path, RectifiedFlow
from elastic_runtime.sampling.diffusion import split
from elastic_runtime.sampling.flow import EVEN, Loop, Predict, Slope, Step, after, seeing

ORDERS = {"ab2": 2, "ab3": 3}


class History:
    """The latest answers, each with the place on the path where it was given; the oldest go first."""

    def __init__(self, most: int = max(ORDERS.values())):
        self._answers: deque[tuple[float, np.ndarray]] = deque(maxlen=most)

    def add(self, place: float, answer: np.ndarray) -> None:
        self._answers.append((place, answer))

    def latest(self, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Places (n,) and answers of the latest `count`, or of all where there are fewer, the latest last."""
        kept = list(self._answers)[-count:]
        return np.array([place for place, _ in kept]), [answer for _, answer in kept]

    def clear(self) -> None:
        self._answers.clear()


def weights(places: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weights (n,) of values at distinct `places` (n,) in the integral from `low` to `high` of the polynomial through them.

    Adams-Bashforth on steps of any length (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section III.5).
    """
    scale = high - low
    powers = np.arange(len(places))
    matrix = ((places - low) / scale)[None, :] ** powers[:, None]  # (n, n)
    integral: np.ndarray = np.linalg.solve(matrix, 1 / (powers + 1)) * scale
    return integral


def flow_adams(
    order: int, velocity: Predict, noise: np.ndarray, steps: int, begin: float = 1.0, history: History | None = None,
    schedule: RectifiedFlow = EVEN,
) -> Loop:  # fmt: skip
    """Adams-Bashforth of `order` for rectified flow, whose state changes by the velocity as time goes."""
    times = schedule.times(steps, begin)
    return _adams(order, seeing(velocity), noise, times, times, history or History())


def path_adams(
    order: int, predict: Predict, noise: np.ndarray, steps: int, path: Path, prediction: str, limit: float | None = None,
    learned_variance: bool = False, history: History | None = None,
) -> Loop:  # fmt: skip
    """The same for `x = cos(a) x_0 + sin(a) eps`, whose state changes by `v = cos(a) eps - sin(a) x_0` as the angle `a` goes.

    `limit` and `learned_variance` as in `diffusion.ddim`.
    """
    times = path.times(steps)
    pairs = [path.alpha_sigma(float(time)) for time in times]

    def slope(x: np.ndarray, t: float, i: int) -> tuple[np.ndarray, np.ndarray]:
        picture, eps, _ = split(predict, x, t, i, path, prediction, limit, learned_variance)
        return pairs[i][0] * eps - pairs[i][1] * picture, picture

    return _adams(order, slope, noise, times, np.array([np.arctan2(sigma, alpha) for alpha, sigma in pairs]), history or History())


def _adams(order: int, slope: Slope, noise: np.ndarray, times: np.ndarray, places: np.ndarray, history: History) -> Loop:
    x, steps = noise.astype(np.float64), len(times) - 1
    for i, (low, high) in enumerate(itertools.pairwise(places)):
        answer, picture = slope(x, float(times[i]), i)
        history.add(float(low), answer)
        known, answers = history.latest(order)
        ahead = x + sum(weight * each for weight, each in zip(weights(known, float(low), float(high)), answers, strict=True))
        step = Step(i, steps, float(times[i]), float(times[i + 1]), ahead, picture)
        x = after(step, (yield step))
        if x is not step.sample:
            history.clear()


def dpm_2m(
    predict: Predict, noise: np.ndarray, steps: int, path: Path, prediction: str, limit: float | None = None,
    learned_variance: bool = False, history: History | None = None,
) -> Loop:  # fmt: skip
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): the predicted picture as a straight line in `log(alpha / sigma)`.

    A step from pure noise or to the picture itself, whose logarithm has no end, is of first order: DDIM's.
    """
    history = history or History()
    x, times = noise.astype(np.float64), path.times(steps)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        picture, eps, _ = split(predict, x, float(t), i, path, prediction, limit, learned_variance)
        (alpha, sigma), (alpha_next, sigma_next) = path.alpha_sigma(float(t)), path.alpha_sigma(float(t_next))
        with np.errstate(divide="ignore"):
            here, there = np.log(alpha) - np.log(sigma), np.log(alpha_next) - np.log(sigma_next)
        places, pictures = history.latest(1)
        ahead = alpha_next * picture + sigma_next * eps
        if len(places) and np.isfinite(there - here) and np.isfinite(places[0]):
            turn = (there - here) / (here - places[0]) / 2 * (picture - pictures[0])
            ahead = ahead + (alpha_next - sigma_next * alpha / sigma) * turn
        history.add(float(here), picture.copy())  # callers see it, and may change it
        step = Step(i, steps, float(t), float(t_next), ahead, picture)
        x = after(step, (yield step))
        if x is not step.sample:
            history.clear()
