"""Denoising loops for paths `x_t = alpha x_0 + sigma eps` with alpha^2 + sigma^2 = 1, as generators like those of `sampler`.

They go from one time of the schedule to the next, however far apart, so a run of fewer steps is the same arithmetic on a coarser grid.
"""

import itertools
from collections.abc import Callable

import numpy as np

from elastic_runtime.sampler import Draw, Loop, Predict, Step, after
from elastic_runtime.schedule import Path

# prediction -> x_0 from (x_t, the model's output, alpha, sigma)
PICTURE: dict[str, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    "v": lambda x, v, alpha, sigma: alpha * x - sigma * v,  # v = alpha eps - sigma x_0 (arXiv 2202.00512)
    "epsilon": lambda x, eps, alpha, sigma: (x - sigma * eps) / alpha,
    "velocity": lambda x, u, alpha, sigma: (x - sigma * u) / (alpha + sigma),  # u = eps - x_0
}


def ddim(predict: Predict, noise: np.ndarray, steps: int, draw: Draw, path: Path, prediction: str, limit: float | None = None) -> Loop:
    """DDIM without noise (arXiv 2010.02502, eta 0): the predicted picture and noise, put together again for the next time.

    `limit` bounds the predicted picture's values to [-limit, limit], for models whose samples are pixels.
    """
    x, times = noise.astype(np.float64), path.times(steps)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        picture, eps = _split(predict, x, float(t), i, path, prediction, limit)
        alpha, sigma = path.alpha_sigma(float(t_next))
        step = Step(i, steps, float(t), float(t_next), alpha * picture + sigma * eps)
        x = after(step, (yield step))


def ddpm(predict: Predict, noise: np.ndarray, steps: int, draw: Draw, path: Path, prediction: str, limit: float | None = None) -> Loop:
    """Ancestral sampling: each step draws from the posterior of the next state given this one and the predicted picture.

    The variance is the posterior's own, the smaller of the two of DDPM (arXiv 2006.11239, section 3.2); `limit` as in `ddim`.
    """
    x, times = noise.astype(np.float64), path.times(steps)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        picture, eps = _split(predict, x, float(t), i, path, prediction, limit)
        (alpha, sigma), (alpha_next, sigma_next) = path.alpha_sigma(float(t)), path.alpha_sigma(float(t_next))
        # What of the noise stays, and what is drawn anew: sigma_next^2 = kept^2 + fresh^2.
        kept = sigma_next**2 / sigma * alpha / alpha_next
        ahead = alpha_next * picture + kept * eps
        if i < steps - 1:
            ahead = ahead + np.sqrt(max(sigma_next**2 - kept**2, 0.0)) * draw(x.shape)
        step = Step(i, steps, float(t), float(t_next), ahead)
        x = after(step, (yield step))


def _split(
    predict: Predict, x: np.ndarray, t: float, index: int, path: Path, prediction: str, limit: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted picture and noise that make up `x`."""
    alpha, sigma = path.alpha_sigma(t)
    picture = PICTURE[prediction](x, predict(x, t, index), alpha, sigma)
    if limit is not None:
        picture = np.clip(picture, -limit, limit)
    return picture, (x - alpha * picture) / sigma
