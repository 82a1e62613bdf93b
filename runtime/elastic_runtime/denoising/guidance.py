"""Guidance: a strong prediction led away from a weak one, each branch at its own budget."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.schedule import is_number
from elastic_runtime.errors import UsageError


@dataclass(frozen=True)
class Guidance:
    """`v_weak + scale * (v_cond - v_weak)` for times in [low, high]; elsewhere the conditional prediction alone.

    Times count from the picture, 0, to pure noise, 1, whatever the schedule's own unit. The weak branch has no label
    (classifier-free guidance) or, with `auto`, the same label (autoguidance: the weak branch differs by its smaller
    budget only). With a smaller budget and no label it is CCFG (arXiv 2603.12245, section 3.4) or Lite-CFG (arXiv
    2603.06351). With `rescale` "norm" what comes out has, token by token, the conditional prediction's length
    (Qwen-Image). With `cap` above 0 no prediction is longer than so many times the conditional one, a picture's values
    taken together (Z-Image's `cfg_normalization`).
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    auto: bool = False
    rescale: Literal["norm"] | None = None
    cap: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (
            ("guidance_scale", self.scale),
            ("the guidance interval's low end", self.low),
            ("high end", self.high),
            ("its cap", self.cap),
        ):
            if not is_number(value):
                raise UsageError(f"{name} is a number, got {value!r}")
        if not self.scale >= 1.0 or self.scale == float("inf"):
            raise UsageError(f"guidance_scale must be 1 (off) or more, got {self.scale}")
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise UsageError(f"the guidance interval must lie in 0 to 1 and rise, got {self.low} to {self.high}")

    @property
    def constant(self) -> bool:
        """Whether it acts at all times alike, or at none."""
        return self.scale == 1.0 or (self.low == 0.0 and self.high == 1.0)

    def lead(self, strong: np.ndarray, weak: np.ndarray) -> np.ndarray:
        """The `strong` prediction led away from the `weak` one, a picture each along the first axis; values of a token along
        the last one, where their lengths matter."""
        led = weak + self.scale * (strong - weak)
        if self.rescale is not None:
            led = led * _ratio(strong, led, (-1,))
        if self.cap:
            led = led * np.minimum(1.0, self.cap * _ratio(strong, led, tuple(range(1, led.ndim))))
        return led

    def active(self, time: float) -> bool:
        return self.scale > 1.0 and self.low <= time <= self.high

    def actives(self, times: np.ndarray) -> np.ndarray:
        """Where among many times it acts, as 0 and 1, int64."""
        return ((self.low <= times) & (times <= self.high) & (self.scale > 1.0)).astype(np.int64)


def _ratio(strong: np.ndarray, led: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The length along `axes` of the one over that of the other."""
    wanted, has = (np.sqrt(np.square(each).sum(axis=axes, keepdims=True)) for each in (strong, led))
    ratio: np.ndarray = wanted / np.maximum(has, np.finfo(has.dtype).tiny)
    return ratio


class Branches(NamedTuple):
    """Budgets of the two branches: the conditional one, and the one that it is guided against."""

    strong: Budget
    weak: Budget
