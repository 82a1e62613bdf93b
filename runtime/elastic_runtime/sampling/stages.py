"""The loop along a plan, as a generator: Euler steps over stages of one resolution or of mixed ones (RALU, arXiv 2507.08422, sections
3.1 to 3.3; SPEED, arXiv 2605.18736).

It yields a `PlanStep` after every step; sending an array back replaces its tokens. The state is float64. What it needs
from outside are functions, so that a recorded run can be replayed: the velocity, the choice of patches, the noise, and what enlarges.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import numpy as np

from elastic_runtime.errors import InferenceError, UsageError
from elastic_runtime.ralu.caching import Velocity
from elastic_runtime.ralu.noise import renoising
from elastic_runtime.ralu.patches import grow, mixed, order, others, pack, raster, take, unpack
from elastic_runtime.ralu.plan import Plan, Stage
from elastic_runtime.sampling.flow import Step, after

# choose(latents (B, C, h/2, w/2) of the predicted picture, count): low-resolution patches (B, count) that grow, ascending
Choose = Callable[[np.ndarray, int], np.ndarray]
# renoise(shape (B, S, C), grew, z): the noise of a transition, where `grew` are the tokens in blocks of four siblings
Renoise = Callable[[tuple[int, ...], slice, float], np.ndarray]
# enlarge(latents (B, C, h/2, w/2), sigma): latents (B, C, h, w) as the stage after one that ended at `sigma` begins with them
Enlarge = Callable[[np.ndarray, float], np.ndarray]
# keep(tokens (B, S, C), sigma): the tokens with what is not to be drawn put back, as it is at `sigma`
Keep = Callable[[np.ndarray, float], np.ndarray]
# whole(tokens (B, S, C) of a stage): latents of the picture that they are of
Whole = Callable[[np.ndarray], np.ndarray]
# draw(shape) -> standard normal float64
Draw = Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class PlanStep(Step):
    """A `Step` whose sample is tokens (B, S, C) at `positions` (B, S, 2), in stage `stage` (from 0).

    Positions are (row, column) in the units of the stage's picture: before the last stage those of the low resolution,
    with halves. `denoised` are latents of the whole picture at the stage's resolution: (B, C, h/2, w/2) in the first of
    several stages, (B, C, h, w) in the others; in the mixed one, those of patches that have not grown are four times there.
    """

    stage: int
    positions: np.ndarray


PlanLoop = Generator[PlanStep, np.ndarray | None, None]


def from_draws(draw: Draw) -> Renoise:
    """The noise of transitions from a source of white noise."""
    return lambda shape, grew, z: renoising(draw(shape), grew, z)


def along(
    velocity: Velocity,
    noise: np.ndarray,
    plan: Plan,
    size: int,
    choose: Choose,
    renoise: Renoise,
    enlarge: Enlarge,
    left: list[int] | None = None,
    keep: Keep | None = None,
) -> PlanLoop:
    """Sample along `plan` from `noise`, full-resolution latents (B, C, h, w) that are packed in patches of `size`.

    The last step's tokens are the whole picture's, in raster order. `left` are the steps left by stage, by default the
    plan's: the loop counts them down, and between two steps the caller may change those of the stage under way and of
    later ones, which are then spaced anew. `keep` is asked after each step of a plan of one stage, `noise` may then be
    what its first sigma makes of a picture.

    Raises: UsageError for sizes that do not divide, or a picture too small for the plan; InferenceError for a choice of
    patches that is none.
    """
    check_size(noise.shape[2], noise.shape[3], plan, size)
    batch, rows, columns = len(noise), noise.shape[2] // size, noise.shape[3] // size
    first, *later = plan.stages()
    whole: Whole = partial(unpack, rows=rows, columns=columns, size=size)
    left = list(plan.steps) if left is None else left
    if plan.plain:
        yield from _steps(velocity, pack(noise, size), raster(batch, rows, columns), first, left, 0, 0, whole, keep)
        return
    low = rows // 2, columns // 2
    small: Whole = partial(unpack, rows=low[0], columns=low[1], size=size)
    x, positions = pack(noise[:, :, ::2, ::2], size), raster(batch, *low)  # every second value: the variance stays 1
    x, v, index, sigma = yield from _steps(velocity, x, positions, first, left, 0, 0, small)
    if not plan.mixed:
        x = pack(enlarge(small(x), sigma), size)
        yield from _steps(velocity, x, raster(batch, rows, columns), later[0], left, index, 1, whole)
        return

    count = plan.grown(positions.shape[1])
    chosen = _checked(choose(small(x - sigma * v), count), batch, count, positions.shape[1])
    kept = others(chosen, positions.shape[1])
    x, positions = _grown(x, positions, chosen, kept, children_first=False)
    x = _renoised(x, slice(kept.shape[1], None), plan, later[0], renoise)
    between: Whole = partial(mixed, positions=positions, coarse=kept.shape[1], rows=rows, columns=columns, size=size)
    x, _, index, _ = yield from _steps(velocity, x, positions, later[0], left, index, 1, between)

    coarse = np.broadcast_to(np.arange(kept.shape[1]), kept.shape)
    x, positions = _grown(x, positions, coarse, others(coarse, x.shape[1]), children_first=True)
    x = _renoised(x, slice(0, 4 * coarse.shape[1]), plan, later[1], renoise)
    placed = 2 * positions
    sort = order(placed)
    yield from _steps(velocity, take(x, sort), take(placed, sort), later[1], left, index, 2, whole)


def check_size(height: int, width: int, plan: Plan, size: int) -> None:
    """Raise UsageError unless latents of `height` x `width` divide into the plan's patches."""
    unit = size if plan.plain else 2 * size
    if height <= 0 or width <= 0 or height % unit or width % unit:
        what = f"patches of {size}" if plan.plain else f"patches of {size} at half the height and width"
        raise UsageError(f"latents of {height} x {width} do not divide into {what}: take multiples of {unit}")
    plan.tokens(height // size, width // size)


def _steps(
    velocity: Velocity,
    x: np.ndarray,
    positions: np.ndarray,
    stage: Stage,
    left: list[int],
    index: int,
    number: int,
    whole: Whole,
    keep: Keep | None = None,
) -> Generator[PlanStep, np.ndarray | None, tuple[np.ndarray, np.ndarray, int, float]]:
    """Euler's method within stage `number`; returns the state, the last velocity, the next step's index, and the
    stage's last sigma."""
    x, sigmas = x.astype(np.float64), stage.sigmas
    if left[number] != stage.steps:
        sigmas = stage.spaced(left[number])
    while left[number]:
        if left[number] != len(sigmas) - 1:
            sigmas = stage.spaced(left[number], sigmas[0])
        sigma, following, *_ = sigmas
        v = velocity(x, positions, sigma, index, number)
        left[number] -= 1
        x, seen = x + (following - sigma) * v, x - sigma * v
        if keep:
            x, seen = keep(x, following), keep(seen, 0.0)
        step = PlanStep(index, index + 1 + sum(left), sigma, following, x, whole(seen), stage=number, positions=positions)
        x = after(step, (yield step))
        index, sigmas = index + 1, sigmas[1:]
    return x, v, index, following


def _grown(
    x: np.ndarray, positions: np.ndarray, chosen: np.ndarray, rest: np.ndarray, *, children_first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The `chosen` tokens grown into four, before or after the rest."""
    children, placed = grow(take(x, chosen), take(positions, chosen))
    tokens, places = [take(x, rest), children], [take(positions, rest), placed]
    if children_first:
        tokens, places = tokens[::-1], places[::-1]
    return np.concatenate(tokens, axis=1), np.concatenate(places, axis=1)


def _renoised(x: np.ndarray, grew: slice, plan: Plan, stage: Stage, renoise: Renoise) -> np.ndarray:
    if not stage.alpha:
        return x
    assert plan.z is not None  # a plan of three stages has one
    return stage.beta * x + stage.alpha * renoise(x.shape, grew, plan.z)


def _checked(chosen: np.ndarray, batch: int, count: int, patches: int) -> np.ndarray:
    """The choice, or InferenceError unless it is `count` different patches a picture, ascending."""
    chosen = np.asarray(chosen)
    if chosen.shape != (batch, count) or chosen.dtype.kind not in "iu":
        raise InferenceError(f"the choice of patches must be whole numbers of shape {(batch, count)}, got {chosen.dtype} {chosen.shape}")
    if (np.diff(chosen, axis=1) <= 0).any() or chosen.min() < 0 or chosen.max() >= patches:
        raise InferenceError(f"the choice of patches must rise within 0 to {patches - 1} for each picture, got {chosen[0][:8].tolist()}...")
    return chosen
