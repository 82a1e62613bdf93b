"""Noise schedules: how much picture and how much noise a sample holds at a time, `x_t = alpha x_0 + sigma eps`.

A schedule is a record of the manifest and the arithmetic that goes with it. It tells the times to visit and (alpha, sigma) at
each, in the unit that the model's `timestep` input takes; samplers need no more.
"""

import math
from typing import Protocol

import msgspec
import numpy as np

from elastic_runtime.errors import UsageError

# Where a schedule ends in pure noise, the picture in a noise prediction would be divided by alpha = 0; simple diffusion stops here too.
LEAST_LOGSNR = -15.0


def whole_steps(steps: int, least: int = 1, most: int | None = None) -> None:
    """Raise UsageError unless `steps` is a whole number of at least `least` and at most `most`."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise UsageError(f"steps must be a whole number, got {steps!r}")
    if steps < least:
        raise UsageError(f"this sampler needs at least {least} step{'s' if least > 1 else ''}, got {steps}")
    if most is not None and steps > most:
        raise UsageError(f"this sampler takes at most {most} steps, one a token, got {steps}")


class _Continuous(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """A schedule over times from 1 (noise) to 0 (picture)."""

    def times(self, steps: int) -> np.ndarray:
        """The `steps + 1` times of a run, uniform from 1 to 0, float64; UsageError for fewer than one step."""
        whole_steps(steps)
        return np.linspace(1.0, 0.0, steps + 1)


class RectifiedFlow(_Continuous, frozen=True, tag="rectified_flow"):
    """Straight paths: alpha = 1 - t, sigma = t."""

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        return 1.0 - time, time


class ShiftedCosine(_Continuous, frozen=True, tag="shifted_cosine"):
    """The cosine schedule with its log signal-to-noise ratio shifted by `shift` (simple diffusion, arXiv 2301.11093, section 3.1).

    `logsnr(t) = -2 log(tan(pi t / 2)) + shift`, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    """

    shift: float

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


class CosineMask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="cosine_mask"):
    """The share of tokens still masked falls as a cosine (MaskGIT, arXiv 2202.04200, section 3.2); `vocabulary` is the mask's id."""

    vocabulary: int

    def masked(self, tokens: int, steps: int) -> list[int]:
        """How many of `tokens` are masked after each step, falling by at least one a step to 0.

        Raises: UsageError for more steps than tokens, or none.
        """
        whole_steps(steps, most=tokens)
        left, counts = tokens, []
        for step in range(1, steps + 1):
            wanted = int(tokens * math.cos(math.pi / 2 * step / steps))
            left = max(min(wanted, left - 1), steps - step)
            counts.append(left)
        return counts


Schedule = RectifiedFlow | ShiftedCosine | CosineMask


class Path(Protocol):
    """What the samplers ask of a schedule."""

    def times(self, steps: int) -> np.ndarray: ...

    def alpha_sigma(self, time: float) -> tuple[float, float]: ...
