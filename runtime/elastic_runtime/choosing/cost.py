"""What a budget costs, as pure functions: time by the roofline of a device, corrected by measured points, and memory.

A step of `batch` samples takes `overhead + max(FLOPs / (peak x efficiency), bytes / bandwidth)` (the roofline model,
Williams et al. 2009). Weights are read once a run however few latents work on them: below the budget where both terms
are equal, the knee, a smaller budget saves arithmetic and no time.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from elastic_runtime.contract.budget import Budget, key
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT, FLOAT32, HALF, PRECISIONS
from elastic_runtime.device import Peak
from elastic_runtime.ralu.plan import Plan

# Share of the peak rate that the matrix products of these graphs reach in a well-tuned runtime: 0.3 for small models, 0.7 for large ones.
EFFICIENCY = 0.5
# Seconds a run takes beside its arithmetic: launching some 300 operators.
OVERHEAD = 5e-4
# What an allocator has reserved after a run, in units of the values that are alive at once; found with ONNX Runtime's arena.
RESERVED = 8.0
# A saving of time below this share is none: it is what two runs at the same budget differ by.
SAME = 0.05
# A DiT block of width D has 18 D^2 weights, 12 D^2 of which work on each token: FLOPs a byte of fp16 weights, for each token.
INTENSITY = 24 / 36


@dataclass(frozen=True)
class Work:
    """One sample's forward pass: FLOPs, and bytes of weights and of activations alive at once (in float32, as the manifest counts)."""

    flops: float
    weight_bytes: float
    activation_bytes: float

    def at(self, precision: str) -> "Work":
        """The same with the bytes of another precision than float32."""
        row = PRECISIONS[precision]
        return Work(self.flops, self.weight_bytes * row.weight_bytes / FLOAT32, self.activation_bytes * row.activation_bytes / FLOAT32)


@dataclass(frozen=True)
class Rates:
    """What a processor gives a runtime: FLOP/s at best, the share of it that is reached, bytes a second, seconds a
    run."""

    flops: float
    bandwidth: float
    efficiency: float = EFFICIENCY
    overhead: float = OVERHEAD

    @classmethod
    def of(cls, peak: Peak, precision: str) -> "Rates":
        """A device's rates at a precision (a name of `contract.precision`), before anything was measured."""
        return cls(flops=PRECISIONS[precision].peak(peak.flops), bandwidth=peak.bandwidth)

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which arithmetic, not memory, sets the time."""
        return self.flops * self.efficiency / self.bandwidth


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measured run: seconds, and the bytes by which the process's peak memory had grown since the session was
    opened."""

    budget: dict[str, int]
    batch: int
    seconds: float
    growth: int | None = None


class Costs:
    """Predictions for one graph of a bundle, on one device: by measured `points` where there are some, else by `rates`.

    Between measured budgets time is a straight line in FLOPs, and between or beyond measured batches a straight line in
    the batch.
    """

    def __init__(self, manifest: Manifest, rates: Rates, precision: str = EXACT, points: Iterable[Point] = ()):
        self._table = {Budget(**row.budget): Work(row.flops, row.weight_bytes, row.activation_bytes) for row in manifest.cost}
        self._rows = dict(self._table)  # and those between, as they are asked for
        self._quadratic = any(axis.carrier == "shape" for axis in manifest.axes)  # attention over all tokens, exactly
        self._precision = precision
        self.rates = rates
        self.points = tuple(points)
        self._lines = {name: self._by_batch(name) for name in ("seconds", "growth")}

    def work(self, budget: Budget) -> Work:
        """FLOPs and bytes of a budget; between rows of the manifest's table a straight line, or for a picture's own
        tokens a parabola."""
        if budget not in self._rows:
            self._rows[budget] = self._between(budget) if self._table else Work(0.0, 0.0, 0.0)
        return self._rows[budget]

    def _between(self, budget: Budget) -> Work:
        size = _size(budget)
        rows = sorted(self._table, key=_size)
        sizes, table = [_size(row) for row in rows], [self._table[row] for row in rows]
        columns = [[getattr(work, name) for work in table] for name in ("flops", "weight_bytes", "activation_bytes")]
        if self._quadratic and len(sizes) > 2:
            places = [0, len(sizes) // 2, -1]
            return Work(*(_parabola([sizes[i] for i in places], [column[i] for i in places], size) for column in columns))
        return Work(*(float(np.interp(size, sizes, column)) for column in columns))

    def seconds(self, budget: Budget, batch: int) -> float:
        """Predicted seconds of one run of `batch` samples."""
        if lines := self._lines["seconds"]:
            return max(_over_batches(lines, self.work(budget).flops, batch), 1e-9)
        return roofline(self.work(budget).at(self._precision), batch, self.rates)

    def growth(self, budget: Budget, batch: int) -> float:
        """Predicted bytes that a run adds to the process's peak memory, beyond what opening the session took."""
        if lines := self._lines["growth"]:
            return max(_over_batches(lines, self.work(budget).flops, batch), 0.0)
        return RESERVED * batch * self.work(budget).at(self._precision).activation_bytes

    def knee(self, budgets: Sequence[Budget], batch: int) -> Budget:
        """The largest of `budgets` whose time is that of the smallest: below it a smaller budget saves no time."""
        least = min(self.seconds(budget, batch) for budget in budgets)
        same = [budget for budget in budgets if self.seconds(budget, batch) <= least * (1 + SAME)]
        return max(same, key=lambda budget: self.work(budget).flops)

    def _by_batch(self, name: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """For each measured batch, FLOPs and what was measured there, both rising: a larger budget never costs less."""
        pairs_by_batch: dict[int, list[tuple[float, float]]] = {}
        for point in self.points:
            if (value := getattr(point, name)) is not None:
                pairs_by_batch.setdefault(point.batch, []).append((self.work(Budget(**point.budget)).flops, value))
        columns = {batch: np.array(sorted(pairs)).T for batch, pairs in sorted(pairs_by_batch.items())}
        return {batch: (flops, np.maximum.accumulate(values)) for batch, (flops, values) in columns.items()}


def roofline(work: Work, batch: int, rates: Rates) -> float:
    """Seconds of one run by peak rates."""
    arithmetic = batch * work.flops / (rates.flops * rates.efficiency)
    memory = (work.weight_bytes + batch * work.activation_bytes) / rates.bandwidth
    return rates.overhead + max(arithmetic, memory)


def _size(budget: Mapping[str, int]) -> float:
    return float(np.prod([float(value) for value in budget.values()])) if budget else 1.0


def _parabola(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """The parabola through three points, at `at` (Lagrange)."""
    terms = (y[i] * math.prod((at - x[j]) / (x[i] - x[j]) for j in range(3) if j != i) for i in range(3))
    return float(sum(terms))


def _over_batches(lines: dict[int, tuple[np.ndarray, np.ndarray]], flops: float, batch: int) -> float:
    values = {each: _line(*line, flops) for each, line in lines.items()}
    if len(values) == 1:
        (only, value), = values.items()  # fmt: skip
        return value * batch / only if batch > only else value
    batches = sorted(values)
    low = max((each for each in batches[:-1] if each <= batch), default=batches[0])
    high = batches[batches.index(low) + 1]
    slope = max(values[high] - values[low], 0.0) / (high - low)
    return values[low] + slope * (batch - low)


def _line(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """`y` at `at`: straight between points, and beyond the ends along the nearest pair, never falling."""
    if len(x) == 1 or x[0] <= at <= x[-1]:
        return float(np.interp(at, x, y))
    a, b = (0, 1) if at < x[0] else (-2, -1)
    if x[b] == x[a]:
        return float(y[b])
    return float(y[a] + (y[b] - y[a]) / (x[b] - x[a]) * (at - x[a]))


def plan_flops(manifest: Manifest, plan: Plan, size: tuple[int, int], skipped: Container[int] = frozenset(), references: int = 0) -> int:
    """FLOPs of a picture of `size` (rows, columns) of full-resolution tokens along a plan, one sample and one branch of
    guidance.

    Text encoders and the decoder are not counted; `skipped` steps cost nothing; tokens of `references` stand beside the
    picture's own. It comes from the manifest's cost table.
    """
    work = Costs(manifest, Rates(1.0, 1.0)).work
    assert manifest.model.patches is not None  # it draws along plans
    tokens = manifest.model.patches.filled_all(count + references for count in plan.step_tokens(*size))
    return round(sum(work(Budget(tokens=count)).flops for step, count in enumerate(tokens) if step not in skipped))


def forecast(manifest: Manifest, peak: Peak, precision: str = HALF) -> dict[str, Any]:
    """What a step of one sample takes at best on a device that is not here: `{"seconds": {budget: ...}, "knee",
    "tokens"}`.

    `tokens` is K*, below which the blocks' weights take longer to read than their arithmetic does, whatever the model.
    """
    rates = replace(Rates.of(peak, precision), efficiency=1.0, overhead=0.0)
    costs = Costs(manifest, rates, precision)
    budgets = sorted((Budget(**row.budget) for row in manifest.cost), key=lambda budget: costs.work(budget).flops)
    ends = {key(budget): costs.seconds(budget, 1) for budget in (budgets[0], budgets[-1])}
    return {"seconds": ends, "knee": key(costs.knee(budgets, 1)), "tokens": rates.ridge / INTENSITY}
