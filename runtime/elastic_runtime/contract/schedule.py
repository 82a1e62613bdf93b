"""Noise schedules: how much picture and how much noise a sample holds at a time, `x_t = alpha x_0 + sigma eps`.

A schedule is a record of the manifest and the arithmetic that goes with it. It tells the times to visit and (alpha, sigma) at
each, in the unit that the model's `timestep` input takes; samplers need no more.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, TypeGuard, TypeVar

import msgspec
import numpy as np

from elastic_runtime.errors import UsageError

# Where a schedule ends in pure noise, the picture in a noise prediction would be divided by alpha = 0; simple diffusion stops here too.
LEAST_LOGSNR = -15.0
MOST_SHIFT = 30.0  # of a log signal-to-noise ratio
MOST_RHO = 100.0


# Far beyond any use: more is a slip of the hand.
MOST = 100_000


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, Python's or numpy's, and no truth value."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def whole_steps(steps: int, least: int = 1, most: int | None = None, each: str = "token") -> None:
    """Raise UsageError unless `steps` is a whole number of at least `least` and at most `most`, one for `each`."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise UsageError(f"steps must be a whole number, got {steps!r}")
    if steps < least:
        raise UsageError(f"this sampler needs at least {least} step{'s' if least > 1 else ''}, got {steps}")
    if steps > MOST:
        raise UsageError(f"a picture takes at most {MOST:,} steps, got {steps}")
    if most is not None and steps > most:
        raise UsageError(f"this sampler takes at most {most} steps, one a {each}, got {steps}")


def spaced(high: float, low: float, steps: int, shift: float, least: float | None = None, terminal: float | None = None) -> np.ndarray:
    """The `steps + 1` sigmas of a flow from `high` to `low`, falling, float64: even before the map `s -> h s / (1 + (h - 1) s)` of a
    `shift` h, all of them or, where `least` says it, all but the last, down to it; then stretched so that the last but one is `terminal`.
    """
    first, last = unshifted(high, shift), unshifted(low, shift)
    own = least is not None and last < least < first
    even = np.append(np.linspace(first, least, steps), last) if own else np.linspace(first, last, steps + 1)  # type: ignore[arg-type]
    visited: np.ndarray = shift * even / (1 + (shift - 1) * even)
    if terminal is not None and steps > 1:
        visited[:-1] = 1 - (1 - visited[:-1]) * (1 - terminal) / (1 - visited[-2])
    return visited


def onward(sigma: float, low: float, steps: int, shift: float, least: float | None = None, terminal: float | None = None) -> np.ndarray:
    """What is left from `sigma` on of what `spaced` gives from pure noise to `low`, in `steps` steps, so that it goes on where the whole
    would. A stretched schedule is stretched by as much as leads its last but one to `terminal`, where `sigma` is above that."""
    if terminal is None or low > 0 or steps < 2 or not terminal < sigma < 1:
        visited = spaced(sigma, low, steps, shift, least if terminal is None else unshifted(terminal, shift))
        visited[0] = sigma
        return visited
    # With a = shift - 1 and n steps the place u of `sigma` before shift and stretching solves, for r = (1 - sigma) / (1 - terminal),
    # (1 - u) (1 + a u / n) = r (1 - u / n) (1 + a u): the root in [0, 1].
    a, r = shift - 1, (1 - sigma) / (1 - terminal)
    square, line, constant = (r - 1) * a / steps, a / steps - 1 - r * (a - 1 / steps), 1 - r
    place = 2 * constant / (math.sqrt(line**2 - 4 * square * constant) - line)
    even = place * np.arange(steps, -1, -1) / steps
    shifted = shift * even / (1 + a * even)
    stretched: np.ndarray = np.append(1 - (1 - shifted[:-1]) * (1 - terminal) / (1 - shifted[-2]), low)
    stretched[0] = sigma
    return stretched


def unshifted(sigma: float, shift: float) -> float:
    """Inverse of the map in `spaced`."""
    return sigma / (shift - (shift - 1) * sigma)


# one time, or an array of them
Time = TypeVar("Time", float, np.ndarray)


class _Continuous(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """A schedule over times from `noise` to 0 (picture)."""

    noise: ClassVar[float] = 1.0

    def times(self, steps: int, begin: float | None = None) -> np.ndarray:
        """The `steps + 1` times of a run, uniform from `begin` to 0, float64; UsageError for fewer than one step."""
        whole_steps(steps)
        return np.linspace(self.noise if begin is None else begin, 0.0, steps + 1)

    def share(self, time: Time) -> Time:
        """How far `time` lies on the way from the picture, 0, to pure noise, 1."""
        return time / self.noise


class RectifiedFlow(_Continuous, frozen=True, omit_defaults=True, tag="rectified_flow"):
    """Straight paths: alpha = 1 - t, sigma = t.

    Of the times of a run `shift` says how much they dwell on noise (1 is evenly), and `terminal` is the last one before 0, where the
    model's scheduler names it: see `spaced`.
    """

    shift: float = 1.0
    terminal: float | None = None

    def __post_init__(self) -> None:
        if not 1 / MOST <= self.shift <= MOST or not (self.terminal is None or 0 < self.terminal < 1):
            raise ValueError(f"needs a shift of 1/{MOST} to {MOST} and a terminal between 0 and 1, got {self.shift} and {self.terminal}")

    def times(self, steps: int, begin: float | None = None) -> np.ndarray:
        whole_steps(steps)
        if begin is None or begin >= self.noise:
            return spaced(self.noise, 0.0, steps, self.shift, terminal=self.terminal)
        return onward(begin, 0.0, steps, self.shift, terminal=self.terminal)

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        return 1.0 - time, time


class ShiftedCosine(_Continuous, frozen=True, tag="shifted_cosine"):
    """The cosine schedule with its log signal-to-noise ratio shifted by `shift` (simple diffusion, arXiv 2301.11093, section 3.1).

    `logsnr(t) = -2 log(tan(pi t / 2)) + shift`, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    """

    shift: float

    def __post_init__(self) -> None:
        if not abs(self.shift) <= MOST_SHIFT:
            raise ValueError(f"`shift` is at most {MOST_SHIFT:g} either way, got {self.shift}")

    @classmethod
    def at(cls, size: int) -> "ShiftedCosine":
        """The schedule of samples of `size` x `size`, with 64 x 64 as the size that needs no shift."""
        return cls(shift=2 * math.log(64 / size))

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        # alpha / sigma = e^(shift/2) cot(pi t / 2), written so that neither end of the times divides by zero
        picture, noise = math.exp(self.shift / 2) * math.cos(math.pi * time / 2), math.sin(math.pi * time / 2)
        picture = max(picture, math.exp(LEAST_LOGSNR / 2) * noise)
        length = math.hypot(picture, noise)
        return picture / length, noise / length


class VpSde(_Continuous, frozen=True, tag="vp_sde"):
    """The variance preserving SDE (arXiv 2011.13456, appendix B): beta rises in a line with t. The model is told 999 t, its time here.

    `alpha^2 = exp(-(beta_min t + (beta_max - beta_min) t^2 / 2))`.
    """

    noise: ClassVar[float] = 999.0
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max <= MOST:
            raise ValueError(f"needs 0 < beta_min <= beta_max <= {MOST}, got {self}")

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        t = time / self.noise
        integral = self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2
        return math.exp(-integral / 2), math.sqrt(-math.expm1(-integral))


class Edm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="edm"):
    """EDM's noise levels and preconditioning (arXiv 2206.00364, table 1). A time is EDM's sigma, the noise beside a picture as it is.

    alpha and sigma here are EDM's, 1 and the time, divided by sqrt(1 + time^2), so that alpha^2 + sigma^2 = 1 as elsewhere: a run starts
    from noise of variance 1, and the picture at its end is the same.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max <= MOST or not 0 < self.sigma_data <= MOST or not 1 <= self.rho <= MOST_RHO:
            raise ValueError(
                f"needs 0 < sigma_min < sigma_max, 0 < sigma_data, both at most {MOST}, and rho of 1 to {MOST_RHO:g}, got {self}"
            )

    def times(self, steps: int, begin: float | None = None) -> np.ndarray:
        """The sigmas of a run, equally far apart in sigma^(1/rho) (equation 5), from sigma_max or `begin` to sigma_min; then 0 (picture).

        Raises: UsageError for fewer than one step.
        """
        whole_steps(steps)
        first = self.sigma_max if begin is None else begin
        if first <= self.sigma_min:
            return np.linspace(first, 0.0, steps + 1)
        sigmas = np.linspace(first ** (1 / self.rho), self.sigma_min ** (1 / self.rho), steps) ** self.rho
        return np.concatenate([[first], sigmas[1:], [0.0]])

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        length = math.hypot(1.0, time)
        return 1.0 / length, time / length

    def preconditioning(self, time: float) -> tuple[float, float, float]:
        """EDM's c_skip, c_out and c_in: the picture is `c_skip x + c_out F(c_in x)`, x being the sample of alpha 1."""
        length = math.hypot(time, self.sigma_data)
        return (self.sigma_data / length) ** 2, time * self.sigma_data / length, 1.0 / length

    def share(self, time: Time) -> Time:
        """How far `time` lies on the way from the picture, 0, to pure noise, 1: by sigma^(1/rho), as a run goes."""
        return (time / self.sigma_max) ** (1 / self.rho)


class CosineMask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="cosine_mask"):
    """The share of tokens still masked falls as a cosine (MaskGIT, arXiv 2202.04200, section 3.2); `vocabulary` is the mask's id."""

    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

    def masked(self, tokens: int, steps: int, begin: float = 1.0, left: int | None = None) -> list[int]:
        """How many of `tokens` are masked after each step, falling by at least one a step to 0.

        What is left of a run starts at time `begin` with `left` still masked.

        Raises: UsageError for more steps than masked tokens, or none.
        """
        left, counts = tokens if left is None else left, []
        whole_steps(steps, most=left)
        for step in range(1, steps + 1):
            wanted = int(tokens * math.cos(math.pi / 2 * (1.0 - begin + begin * step / steps)))
            left = max(min(wanted, left - 1), steps - step)
            counts.append(left)
        return counts

    def share(self, time: Time) -> Time:
        """How far `time` lies on the way from the picture, 0, to masks alone, 1."""
        return time


class _Betas(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """Discrete timesteps, counted from `first`; the last is all but noise, the first all but a picture.

    A run may visit some of the timesteps only. The model is told which they are, as in its training, and what lies between two of
    them is one step: beta = 1 - (alpha / alpha_next)^2.
    """

    first: ClassVar[int] = 0
    num_train_timesteps: int
    beta_start: float
    beta_end: float

    def __post_init__(self) -> None:
        if not 2 <= self.num_train_timesteps <= MOST or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"needs 2 to {MOST} timesteps and 0 < beta_start <= beta_end < 1, got {self}")

    @property
    def betas(self) -> np.ndarray:
        """Variances of the noise that each timestep adds, (num_train_timesteps,)."""
        raise NotImplementedError

    def times(self, steps: int, begin: float | None = None) -> np.ndarray:
        """The timesteps of a run, falling and equally far apart up to rounding, both ends among them; then one before the first for the
        picture.

        What is left of a run starts at timestep `begin`.

        They are those of the public code of improved diffusion and DiT (`space_timesteps`), rounding errors included. It would
        draw in one step from the first timestep, which is no noise; here one step starts from the last.

        Raises: UsageError for fewer than one step, or more than there are timesteps.
        """
        last = self.num_train_timesteps - 1 if begin is None else int(begin) - self.first
        whole_steps(steps, most=last + 1, each="timestep")
        if steps == 1:
            return np.array([last, -1.0]) + self.first
        rising = itertools.accumulate(itertools.repeat(last / (steps - 1), steps - 1), initial=0.0)
        return np.array([-1.0, *map(round, rising)])[::-1] + self.first

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        product = float(_products(self)[int(time) - self.first + 1])
        return math.sqrt(product), math.sqrt(1.0 - product)

    def share(self, time: Time) -> Time:
        """How far `time` lies on the way from the picture, 0, to pure noise, 1."""
        return (time - self.first + 1) / self.num_train_timesteps


class LinearBeta(_Betas, frozen=True, tag="linear_beta"):
    """Timesteps from 0 whose betas rise in a line (DDPM, arXiv 2006.11239, section 4)."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @property
    def betas(self) -> np.ndarray:
        return np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)


class ScaledLinearBeta(_Betas, frozen=True, tag="scaled_linear_beta"):
    """Timesteps whose betas' roots rise in a line, Stable Diffusion's (arXiv 2112.10752). They are counted from 1, as DPM-Solver's discrete
    schedule counts them and U-ViT is told them; Stable Diffusion's own models count from 0.
    """

    first: ClassVar[int] = 1
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @property
    def betas(self) -> np.ndarray:
        roots: np.ndarray = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.num_train_timesteps)
        return roots**2


@functools.lru_cache(maxsize=8)
def _products(schedule: _Betas) -> np.ndarray:
    """alpha^2 of the picture and at each timestep: the running product of 1 - beta."""
    return np.concatenate([[1.0], np.cumprod(1.0 - schedule.betas)])


# Those whose alpha^2 + sigma^2 = 1, and of them those that ddpm draws from.
Ancestral = ShiftedCosine | VpSde | LinearBeta | ScaledLinearBeta
Diffusion = Ancestral | Edm
Schedule = RectifiedFlow | CosineMask | Diffusion


class Path(Protocol):
    """What the samplers ask of a schedule."""

    def times(self, steps: int) -> np.ndarray: ...

    def alpha_sigma(self, time: float) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Onward:
    """A schedule from a time on: for what is left of a run."""

    schedule: Diffusion
    begin: float

    def times(self, steps: int) -> np.ndarray:
        return self.schedule.times(steps, self.begin)

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        return self.schedule.alpha_sigma(time)
