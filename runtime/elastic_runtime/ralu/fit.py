"""Schedules for plans of one's own: NT-DM, noise-timestep distribution matching (arXiv 2507.08422, equations 7 to 9)."""

import numpy as np

from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.ralu.plan import LEAST_Z, STAGES, Plan, check_outline, check_ratio, restart

GRID = np.linspace(0.0, 1.0, 1000)
LEAST_DENSITY = 1e-10
SHIFTS, ZS = (0.5, 10.0), (LEAST_Z, 100.0)
NEAR = 1 - 1e-3  # of a bound: the distance is flat there, and on some machines the search stops this far before it


def fit(steps: tuple[int, int, int], end_times: tuple[float, float, float], up_ratio: float, base_shift: float = 3.0) -> Plan:
    """The plan whose timesteps are distributed most like those of plain sampling with `base_shift`.

    It finds the stages' shifts and Z that minimise the Jensen-Shannon distance. scipy is needed here only.

    Raises: UsageError for steps, times or a ratio that no plan can have, and for a `base_shift` at which the search runs into its bounds:
        the stages would then restart so close to pure noise that those before are thrown away; MissingError without scipy.
    """
    for name, given in (("steps", steps), ("end_times", end_times)):
        if not isinstance(given, tuple | list):
            raise UsageError(f"a plan's {name} are a tuple, one value a stage, got {given!r}")
    steps, end_times = tuple(steps), tuple(end_times)  # type: ignore[assignment]
    if len(steps) != STAGES:
        raise UsageError(f"a schedule is fitted for plans of {STAGES} stages, got steps for {len(steps)}: {steps}")
    check_outline(steps, end_times)
    check_ratio(up_ratio)
    if not 0 < base_shift < float("inf"):
        raise UsageError(f"base_shift is above 0, got {base_shift}")
    try:
        from scipy.optimize import minimize
        from scipy.spatial.distance import jensenshannon
    except ImportError:
        raise MissingError(
            "fitting a schedule needs scipy: pip install 'elastic-export[ralu]', or give the plan its shifts and z"
        ) from None

    def distance(unknown: np.ndarray) -> float:
        *shifts, z = unknown
        starts = [0.0, *(restart(end, z)[0] for end in end_times[:-1])]
        overlaps = list(zip(starts[1:], end_times, strict=False))  # times that two stages visit
        wanted = _density(GRID, base_shift) + sum((end - start) * _truncated(base_shift, start, end) for start, end in overlaps)
        wanted = wanted / (1 + sum(end - start for start, end in overlaps))
        stages = zip(steps, shifts, starts, end_times, strict=True)
        given = sum(count * _truncated(shift, start, end) for count, shift, start, end in stages) / sum(steps)
        p, q = (np.clip(density, LEAST_DENSITY, None) for density in (wanted, given))
        return float(jensenshannon(p / p.sum(), q / q.sum()))

    minimum = minimize(distance, [3.0] * STAGES + [2.0], bounds=[SHIFTS] * STAGES + [ZS])
    *shifts, z = (float(value) for value in minimum.x)
    ends = [("shift", value, SHIFTS[1]) for value in shifts] + [("z", z, ZS[1])]
    reached = [f"{name} {most:g}" for name, value, most in ends if value >= most * NEAR]
    if reached:
        raise UsageError(
            f"no schedule of steps {steps} with end times {end_times} is like plain sampling with base_shift {base_shift:g}: the search "
            f"runs into its bound at {reached[0]}, where each stage starts again from all but pure noise. Take plan 'speed', which goes by "
            "any shift, or 'full'"
        )
    return Plan(steps, end_times, tuple(shifts), z, up_ratio)


def _density(times: np.ndarray, shift: float) -> np.ndarray:
    """Density of the timesteps of evenly spaced steps shifted by `shift`."""
    return shift / (1 + (shift - 1) * times) ** 2


def _truncated(shift: float, start: float, end: float) -> np.ndarray:
    """The same on the grid, within [start, end] only and of integral 1."""
    low, high = (shift * time / (1 + (shift - 1) * time) for time in (start, end))
    inside = (start <= GRID) & (end >= GRID)
    return np.where(inside, _density(GRID, shift) / (high - low), 0.0)
