"""Denoising loops for paths `x_t = alpha x_0 + sigma eps` with alpha^2 + sigma^2 = 1, as generators like those of `sampler`.

They go from one time of the schedule to the next, however far apart, so a run of fewer steps is the same arithmetic on a coarser grid.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from elastic_runtime.contract.schedule import Edm, Path
from elastic_runtime.sampling.flow import Draw, Loop, Predict, Step, after, corrected

TINY = 1e-20  # the least variance that a logarithm is taken of

# prediction -> x_0 from (x_t, the model's output, alpha, sigma)
PICTURE: dict[str, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    "v": lambda x, v, alpha, sigma: alpha * x - sigma * v,  # v = alpha eps - sigma x_0 (arXiv 2202.00512)
    "epsilon": lambda x, eps, alpha, sigma: (x - sigma * eps) / alpha,
    "velocity": lambda x, u, alpha, sigma: (x - sigma * u) / (alpha + sigma),  # u = eps - x_0
    "picture": lambda x, picture, alpha, sigma: picture,  # of `preconditioned`
}


def ddim(
    predict: Predict,
    noise: np.ndarray,
    steps: int,
    draw: Draw,
    path: Path,
    prediction: str,
    limit: float | None = None,
    learned_variance: bool = False,
) -> Loop:
    """DDIM without noise (arXiv 2010.02502, eta 0): the predicted picture and noise, put together again for the next time.

    It is Euler's method in `sigma / alpha`, as EDM has it.

    `limit` bounds the predicted picture's values to [-limit, limit], for models whose samples are pixels. A `learned_variance`
    has no part in it.
    """
    x, times = noise.astype(np.float64), path.times(steps)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        picture, eps, _ = split(predict, x, float(t), i, path, prediction, limit, learned_variance)
        alpha, sigma = path.alpha_sigma(float(t_next))
        step = Step(i, steps, float(t), float(t_next), alpha * picture + sigma * eps, picture)
        x = after(step, (yield step))


def ddpm(
    predict: Predict,
    noise: np.ndarray,
    steps: int,
    draw: Draw,
    path: Path,
    prediction: str,
    limit: float | None = None,
    learned_variance: bool = False,
) -> Loop:
    """Ancestral sampling: each step draws from the posterior of the next state given this one and the predicted picture.

    The variance is the posterior's own, the smaller of the two of DDPM (arXiv 2006.11239, section 3.2), or, with
    `learned_variance`, between both as the second half of the prediction's channels says (arXiv 2102.09672, equation 15);
    `limit` as in `ddim`.
    """
    x, times = noise.astype(np.float64), path.times(steps)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        picture, eps, place = split(predict, x, float(t), i, path, prediction, limit, learned_variance)
        (alpha, sigma), (alpha_next, sigma_next) = path.alpha_sigma(float(t)), path.alpha_sigma(float(t_next))
        ahead = alpha_next * picture + sigma_next**2 / sigma * alpha / alpha_next * eps
        if i < steps - 1:
            beta = 1 - (alpha / alpha_next) ** 2  # of the whole way from one time to the next
            ahead = ahead + _deviation(beta, beta * (sigma_next / sigma) ** 2, place) * draw(x.shape)
        step = Step(i, steps, float(t), float(t_next), ahead, picture)
        x = after(step, (yield step))


def heun(
    predict: Predict,
    noise: np.ndarray,
    steps: int,
    draw: Draw,
    path: Path,
    prediction: str,
    limit: float | None = None,
    learned_variance: bool = False,
) -> Loop:
    """EDM's Heun (arXiv 2206.00364, algorithm 1): `x / alpha` changes by the noise as `sigma / alpha` goes, and every step but the last is
    corrected with the noise at its end. The other arguments as in `ddim`.
    """
    times = path.times(steps)
    pairs = np.array([path.alpha_sigma(float(time)) for time in times])

    def slope(x: np.ndarray, t: float, i: int) -> tuple[np.ndarray, np.ndarray]:
        picture, eps, _ = split(predict, x, t, i, path, prediction, limit, learned_variance)
        return eps, picture

    return corrected(slope, noise, times, pairs[:, 1] / pairs[:, 0], pairs[:, 0])


def preconditioned(predict: Predict, schedule: Edm) -> Predict:
    """The picture that a model with EDM's preconditioning sees in a state of its schedule, which the model is given scaled by c_in."""

    def picture(x: np.ndarray, t: float, index: int) -> np.ndarray:
        c_skip, c_out, c_in = schedule.preconditioning(t)
        sample = x / schedule.alpha_sigma(t)[0]
        return c_skip * sample + c_out * predict(c_in * sample, t, index)

    return picture


def _deviation(beta: float, posterior: float, place: np.ndarray | None) -> np.ndarray | float:
    """Standard deviation of a step: the posterior's, or at `place` between it (-1) and beta (1), on a logarithmic scale."""
    if place is None:
        return math.sqrt(max(posterior, 0.0))
    share = (place + 1) / 2
    deviation: np.ndarray = np.exp(0.5 * (share * math.log(max(beta, TINY)) + (1 - share) * math.log(max(posterior, TINY))))
    return deviation


def split(
    predict: Predict, x: np.ndarray, t: float, index: int, path: Path, prediction: str, limit: float | None, learned_variance: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The predicted picture and noise that make up `x`, and where the variance lies between its bounds."""
    alpha, sigma = path.alpha_sigma(t)
    output, place = np.split(predict(x, t, index), 2, axis=1) if learned_variance else (predict(x, t, index), None)
    picture = PICTURE[prediction](x, output, alpha, sigma)
    if limit is not None:
        picture = np.clip(picture, -limit, limit)
    return picture, (x - alpha * picture) / sigma, place
