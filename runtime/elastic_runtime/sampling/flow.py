"""Denoising loops for rectified flow, as generators: the caller owns progress, previews and stopping.

The path is `x_t = (1-t) x_0 + t eps` and a model predicts the velocity `v = eps - x_0`, so sampling runs t from 1 to 0.
The state is float64. Each loop yields a `Step` after every step; sending an array back replaces the state. Those of the ODE
may `begin` at a later time, from the state that another has left there: what is left of a run, on another number of steps.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from elastic_runtime.contract.schedule import RectifiedFlow, whole_steps
from elastic_runtime.errors import UsageError

SDE_LEAST = 2  # steps: one of them without noise
EVEN = RectifiedFlow()

# predict(x, t, index): the model's prediction for x (B, C, H, W) at time t in step `index`, float64; here it is the velocity
Predict = Callable[[np.ndarray, float, int], np.ndarray]
# draw(shape) -> standard normal float64
Draw = Callable[[tuple[int, ...]], np.ndarray]
# slope(x, t, index): how the state changes with its place on the path, and the picture that the model saw in it
Slope = Callable[[np.ndarray, float, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Step:
    """The state after step `index` (from 0) of `steps`, which went from `time` to `next_time`.

    `denoised` is the picture that the model saw in the state before; None of masked models, whose state is one itself.
    """

    index: int
    steps: int
    time: float
    next_time: float
    sample: np.ndarray
    denoised: np.ndarray | None = None


Loop = Generator[Step, np.ndarray | None, None]


def after(step: Step, replacement: np.ndarray | None) -> np.ndarray:
    """The state to go on from: the step's, or what the caller sent in its place, of the same shape and kind.

    Raises: UsageError for what is no array of that shape, or holds something else than finite numbers.
    """
    if replacement is None or replacement is step.sample:
        return step.sample
    try:
        shape, numbers = np.shape(replacement), np.isfinite(replacement)
        if shape == step.sample.shape and numbers.all():
            return np.asarray(replacement, dtype=step.sample.dtype)
    except (TypeError, ValueError) as error:
        raise UsageError(f"latents that replace the state are numbers, an array of shape {step.sample.shape}: {error}") from None
    if shape != step.sample.shape:
        raise UsageError(f"latents that replace the state must have shape {step.sample.shape}, got {shape}")
    raise UsageError(f"latents that replace the state after step {step.index} are finite, got {(~numbers).sum()} values that are not")


def replaced(step: Step, before: np.ndarray, replacement: np.ndarray | None) -> np.ndarray | None:
    """What a caller put in the place of a step's state, which it was handed as it was `before`: what it sent or, where it changed the state
    in place, a copy of that, so that a solver sees that its answers belong to another path. None where all is as it was."""
    if replacement is not None and replacement is not step.sample:
        return replacement
    return None if np.array_equal(step.sample, before) else step.sample.copy()


def euler(
    velocity: Predict, noise: np.ndarray, steps: int, draw: Draw | None = None, begin: float = 1.0, schedule: RectifiedFlow = EVEN
) -> Loop:
    """Euler's method on the `steps + 1` times of `schedule` from `begin`; one evaluation a step."""
    x, times = noise.astype(np.float64), schedule.times(steps, begin)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, float(t), i)
        step = Step(i, steps, float(t), float(t_next), x + (t_next - t) * v, x - t * v)
        x = after(step, (yield step))


def heun(
    velocity: Predict, noise: np.ndarray, steps: int, draw: Draw | None = None, begin: float = 1.0, schedule: RectifiedFlow = EVEN
) -> Loop:
    """Heun's method: every step but the last is corrected with the velocity at its end; two evaluations a step."""
    times = schedule.times(steps, begin)
    return corrected(seeing(velocity), noise, times, times, np.ones(len(times)))


def seeing(velocity: Predict) -> Slope:
    """How a state of the flow changes as time goes, and the picture that the velocity leads to."""

    def slope(x: np.ndarray, t: float, index: int) -> tuple[np.ndarray, np.ndarray]:
        v = velocity(x, t, index)
        return v, x - t * v

    return slope


def corrected(slope: Slope, noise: np.ndarray, times: np.ndarray, places: np.ndarray, scales: np.ndarray) -> Loop:
    """Heun's method for states x of which `x / scale` changes by `slope` as its place goes through `places`, one for each of `times`."""
    x, steps = noise.astype(np.float64), len(times) - 1
    for i, (t, t_next) in enumerate(pairwise(times)):
        way, (scale, scale_next) = places[i + 1] - places[i], scales[i : i + 2]
        change, picture = slope(x, float(t), i)
        ahead = scale_next * (x / scale + way * change)
        if i < steps - 1:
            ahead = scale_next * (x / scale + way * 0.5 * (change + slope(ahead, float(t_next), i)[0]))
        step = Step(i, steps, float(t), float(t_next), ahead, picture)
        x = after(step, (yield step))


def sde_times(steps: int) -> np.ndarray:
    """Times of `sde`: uniform from 1 to 0.04, then 0."""
    whole_steps(steps, least=SDE_LEAST)
    return np.append(np.linspace(1.0, 0.04, steps), 0.0)


def sde(velocity: Predict, noise: np.ndarray, steps: int, draw: Draw | None = None) -> Loop:
    """Euler-Maruyama of the reverse SDE with diffusion `w = 2t` (SiT, arXiv 2401.08740, section 2.3).

    Times are uniform from 1 to 0.04, then one step to 0 without noise. Guidance acts on drifts; since the drift is affine in the
    velocity and guidance weights sum to one, guiding the velocity is the same.
    """
    if draw is None:
        raise UsageError("the SDE sampler draws noise at each step: give it a generator")
    x, times = noise.astype(np.float64), sde_times(steps)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v, w, dt = velocity(x, float(t), i), 2 * t, t_next - t
        score = -((1 - t) * v + x) / t
        ahead = x + (v - 0.5 * w * score) * dt
        if i < steps - 1:
            ahead = ahead + np.sqrt(w * -dt) * draw(x.shape)
        step = Step(i, steps, float(t), float(t_next), ahead, x - t * v)
        x = after(step, (yield step))


SAMPLERS = {"euler": euler, "heun": heun, "sde": sde}
