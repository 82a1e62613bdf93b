"""An elastic dimension of a model and the inclusive span of values that it may take."""

import re
from typing import Literal

import msgspec
import numpy as np

from elastic_runtime.errors import BudgetError

DIGITS = 18  # of a whole number that an int64 holds; Python itself reads none of more than 4,300


def whole(text: str) -> int:
    """The number that a text of digits stands for; raises BudgetError for one that is too long."""
    digits = text.strip()
    if len(digits) > DIGITS:
        raise BudgetError(f"a number has {DIGITS} digits at most, got one of {len(digits)}, {digits[:DIGITS]}...")
    return int(digits)


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An inclusive range, written `32-256`."""

    min: int
    max: int

    def __repr__(self) -> str:
        return f"Span({self.min}, {self.max})"

    def __str__(self) -> str:
        return f"{self.min}-{self.max}"

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read `32-256`, or `64` for a single value."""
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
        if not match:
            raise BudgetError(f"a span is written 32-256 or 64, got {text!r}")
        low, high = whole(match[1]), whole(match[2] or match[1])
        if low > high:
            raise BudgetError(f"the span {text!r} is reversed: write {high}-{low}")
        return cls(low, high)


class Axis(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named elastic dimension (`latents`, `tokens`, `loops`) and how a graph input carries it.

    A `length` carrier is a 1-D int64 input that is always `arange(value / unit)`: its length, which the graph's shapes
    call `dimension`, is the budget. A `value` carrier is a 0-d int64 input that holds the value itself. A `shape`
    carrier is no input of its own: the budget is the open dimension `dimension` of the data, of `input` among them.
    """

    name: str
    min: int
    max: int
    step: int
    default: int
    input: str
    carrier: Literal["length", "value", "shape"]
    unit: int = 1
    dimension: str | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.min <= self.default <= self.max and self.step >= 1 and self.unit >= 1 and self.step % self.unit == 0):
            raise ValueError(f"axis {self.name}: needs 1 <= min <= default <= max and a step that is a multiple of unit, got {self}")
        if (self.max - self.min) % self.step or (self.default - self.min) % self.step or self.min % self.unit:
            raise ValueError(f"axis {self.name}: max, default and min must lie on its steps, got {self}")
        if (self.carrier == "value") != (self.dimension is None):
            raise ValueError(f"axis {self.name}: length and shape carriers name their dimension, a value carrier has none")
        if self.carrier == "shape" and self.unit != 1:
            raise ValueError(f"axis {self.name}: a shape carrier is the dimension itself, so its unit is 1, got {self.unit}")

    @property
    def span(self) -> Span:
        return Span(self.min, self.max)

    @property
    def values(self) -> range:
        """Every budget of the axis, smallest first."""
        return range(self.min, self.max + 1, self.step)

    def doublings(self) -> list[int]:
        """Both ends and, between them, the budgets nearest to the doublings of the smallest: 16, 32, 64, 128, 256 of
        16-256."""
        wanted = [self.min * 2**n for n in range((self.max // self.min).bit_length())]
        return sorted({self._nearest(want) for want in [*wanted, self.max]})

    def check(self, value: int) -> int:
        """Return `value`; raise BudgetError if it is outside the span or between its steps."""
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise BudgetError(f"{self.name} must be a whole number, got {value!r}")
        if value not in self.values:
            every = "" if self.step == 1 else f" in steps of {self.step}"
            raise BudgetError(
                f"{self.name} {value} is not available: this model offers {self.span}{every}; the nearest is {self._nearest(value)}"
            )
        return int(value)

    def _nearest(self, value: int) -> int:
        """The budget nearest to `value`, the smaller of two."""
        below = self.min + (int(value) - self.min) // self.step * self.step
        return min((min(max(each, self.min), self.max) for each in (below, below + self.step)), key=lambda each: abs(each - value))

    def narrow(self, span: Span) -> "Axis":
        """Return the axis restricted to `span`, whose ends must be budgets of this axis."""
        if span.min > span.max:
            raise BudgetError(f"{self.name} cannot span {span}: its first end is above its second")
        low, high = self.check(span.min), self.check(span.max)
        return msgspec.structs.replace(self, min=low, max=high, default=min(max(self.default, low), high))

    def length(self, value: int) -> int:
        """Length of the carrying input at `value` (K kept latents in G groups: J = K/G)."""
        return value // self.unit

    def feed(self, value: int) -> np.ndarray:
        """The carrying input at `value`: int64, `(length,)` or 0-d. A shape has none: the data carry it."""
        if self.carrier == "shape":
            raise ValueError(f"axis {self.name} is carried by the shape of the data, so no input is made for it")
        self.check(value)
        if self.carrier == "length":
            return np.arange(self.length(value), dtype=np.int64)
        return np.array(value, dtype=np.int64)

    def probes(self) -> list[int]:
        """Budgets worth proving: see `probes`."""
        return probes(self.values)


def probes(values: range) -> list[int]:
    """Both ends of `values`, the middle, and one off the beaten track (an odd step a third of the way)."""
    steps = len(values)
    odd = (steps // 3) | 1
    return [values[i] for i in sorted({0, min(odd, steps - 1), steps // 2, steps - 1})]
