"""A plan: how many steps at which resolution, between which times.

Times `t = 1 - sigma` run from 0 (noise) to 1 (picture). A plan of one stage is plain full-resolution sampling. One of two
begins at half the height and width and grows once: in its spectrum (SPEED, arXiv 2605.18736), or as a finished picture in its pixels
(MrFlow, arXiv 2607.01642). One of three, RALU's (arXiv
2507.08422), grows the patches with the most edges, then all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from elastic_runtime.contract.manifest import OWN_STEPS
from elastic_runtime.contract.schedule import is_number, onward, spaced, whole_steps
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.schedulers import EMPIRICAL, check_scheduler, check_tokens, empirical_shift

# What grows between stages: chosen patches and then the others; the spectrum of the latents; the pixels of a finished picture.
Growth = Literal["patches", "spectrum", "pixels"]
STAGES = 3  # of RALU
# Below it no noise makes grown patches white again: the smallest eigenvalue of a block's covariance is 1 - 4/Z^2.
LEAST_Z = 2.0


@dataclass(frozen=True)
class Stage:
    """One stage: it starts at time `start`, visits `sigmas` (one more than its steps) and ends at time `end`.

    On entering, the sample is renoised, `alpha * n + beta * x`; the first stage has alpha 0 and beta 1, which is
    nothing. `shift` says how its steps are spaced; `empirical` as in `Plan`. A stage that goes on along another schedule
    than from its own first sigma has the sigma which that one is left at, `grid`: its later times are those that follow
    there.
    """

    start: float
    end: float
    sigmas: tuple[float, ...]
    alpha: float
    beta: float
    shift: float = 1.0
    least: float | None = None
    terminal: float | None = None
    empirical: int | None = None
    grid: float | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def spaced(self, steps: int, sigma: float | None = None) -> tuple[float, ...]:
        """The sigmas of `steps` steps from `sigma` (the stage's beginning where it is None) to the stage's end."""
        first = 1 - self.start
        if self.grid is None and sigma is None:
            shift = self.shift if self.empirical is None else empirical_shift(self.empirical, steps)
            return sigmas(self.start, self.end, steps, shift, self.least, self.terminal)
        begins = self.grid is not None and (sigma is None or sigma == first)
        left = self.grid if begins else sigma
        assert left is not None
        visited = onward(left, 1 - self.end, steps, self.shift, self.least, self.terminal)
        return tuple(float(s) for s in (first if begins else visited[0], *visited[1:]))


@dataclass(frozen=True)
class Plan:
    """Stages of a drawing: for each its `steps`, the time at which it ends, and its schedule's `shifts`.

    Args:
        steps: one number (full resolution), two (low, full) or three (low, mixed, full).
        end_times: rising, the last is 1.
        shifts: how much each stage dwells on noise; 1 is evenly.
        z: the paper's Z, at least 2: how far each stage steps back in time, and how grown patches are made white again.
        up_ratio: share of the low-resolution patches that grow in the mixed stage, between 0 and 1.
        renoise: False lets stages go on where the one before ended, with copies of what grew: what RALU is compared
        with.
        least: of plain sampling, the sigma before the shift that the last step starts from, where the scheduler names
        one (SD3); None spaces all steps alike (FLUX).
        terminal: of plain sampling, the sigma that the last step starts from, which the schedule is stretched to. Both
        are of the last stage of two as well.
        empirical: of plain sampling, the image tokens that FLUX.2's shift is of: `shifts` follow from them and the steps
        (see `empirical_shift`).
        begin: of plain sampling, the sigma that it starts from; below 1 that of a picture which is drawn over.
        growth: what grows between stages: `patches` of three, the `spectrum` or `pixels` of two. In pixels it is a
        finished picture, so both stages end at time 1.
        again: the sigma from which what grew in pixels is drawn again.

    Raises: UsageError naming the value that is wrong.
    """

    steps: tuple[int, ...]
    end_times: tuple[float, ...] = (1.0,)
    shifts: tuple[float, ...] = (1.0,)
    z: float | None = None
    up_ratio: float | None = None
    renoise: bool = True
    least: float | None = None
    terminal: float | None = None
    empirical: int | None = None
    growth: Growth = "patches"
    begin: float = 1.0
    again: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "end_times", "shifts"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise UsageError(f"a plan's {name} are a tuple, one value a stage, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        check_outline(self.steps, self.end_times, finished=self.growth == "pixels")
        if len(self.shifts) != len(self.steps):
            raise UsageError(f"a plan has a shift for each of its {len(self.steps)} stages, got {self.shifts}")
        if bad := [shift for shift in self.shifts if not (is_number(shift) and 0 < shift < math.inf)]:
            raise UsageError(f"a plan's shifts are above 0, got {bad[0]!r}")
        if not self.mixed:
            if self.z is not None or self.up_ratio is not None or not self.renoise:
                raise UsageError(f"z, up_ratio and renoise are of a plan of {STAGES} stages, whose patches grow, got {len(self.steps)}")
            for name in ("least", "terminal"):
                value = getattr(self, name)
                if value is not None and not (is_number(value) and 0 < value < 1):
                    raise UsageError(f"a plan's {name} is a sigma between 0 and 1, got {value!r}")
        if self.growth not in (("patches",) if self.plain or self.mixed else ("spectrum", "pixels")):
            raise UsageError(
                f"a plan of {STAGES} stages grows in patches, one of 2 in its spectrum or in pixels (growth='spectrum' or 'pixels'), one "
                f"of 1 not at all; got {len(self.steps)} stages and growth {self.growth!r}"
            )
        placed = is_number(self.again) and 0 < self.again < 1
        if placed != (self.growth == "pixels") or not (placed or self.again is None):
            raise UsageError(f"again is a sigma between 0 and 1 of a plan that grows in pixels, got {self.again!r} of {self.growth}")
        if not (is_number(self.begin) and 0 < self.begin <= 1) or (self.begin < 1 and not self.plain):
            raise UsageError(f"begin is a sigma above 0, and below 1 of a plan of one stage only, got {self.begin!r}")
        if not self.mixed:
            if self.empirical is not None:
                check_tokens(self.empirical)
                object.__setattr__(self, "shifts", (empirical_shift(self.empirical, self.steps[0]),))
            return
        if any(value is not None for value in (self.least, self.terminal, self.empirical)):
            raise UsageError(f"least, terminal and empirical are of plain sampling, not of a plan of {STAGES} stages")
        if self.z is None or not is_number(self.z) or not LEAST_Z <= self.z < math.inf:
            raise UsageError(f"a plan of {STAGES} stages needs z of {LEAST_Z:g} or more, got {self.z!r}")
        check_ratio(self.up_ratio)

    @classmethod
    def full(
        cls,
        steps: int,
        shift: float = 1.0,
        least: float | None = None,
        terminal: float | None = None,
        empirical: int | None = None,
    ) -> "Plan":
        """Plain sampling at full resolution; `shift` 1 spaces the steps evenly; see `full` for a model's own."""
        return cls((steps,), shifts=(shift,), least=least, terminal=terminal, empirical=empirical)

    @property
    def plain(self) -> bool:
        """Whether it is one stage at full resolution."""
        return len(self.steps) == 1

    @property
    def mixed(self) -> bool:
        """Whether patches grow, so that in between each picture has tokens at places of its own."""
        return len(self.steps) == STAGES

    @property
    def total(self) -> int:
        """Steps in all."""
        return sum(self.steps)

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, with the sigmas that each visits."""
        if len(self.steps) == 2:
            return self._grown()
        if self.begin < 1:
            over = Stage(1 - self.begin, 1.0, (), 0.0, 1.0, self.shifts[0], self.least, self.terminal, grid=self.begin)
            return (replace(over, sigmas=over.spaced(*self.steps)),)
        stages, start, alpha, beta = [], 0.0, 0.0, 1.0
        for steps, end, shift in zip(self.steps, self.end_times, self.shifts, strict=True):
            visited = sigmas(start, end, steps, shift, self.least, self.terminal)
            stages.append(Stage(start, end, visited, alpha, beta, shift, self.least, self.terminal, self.empirical))
            if self.z is not None:
                start, alpha, beta = restart(end, self.z) if self.renoise else (end, 0.0, 1.0)
        return tuple(stages)

    def _grown(self) -> tuple[Stage, ...]:
        """The low stage ends where the plan says, or in a picture; the other one goes on from the sigma that growing leads to, at the times
        that the schedule has left."""
        (low, high), (end, _), (first, second) = self.steps, self.end_times, self.shifts
        ends = (self.least, self.terminal) if self.again else (None, None)
        left = self.again or 1 - end
        begun = Stage(0.0, end, sigmas(0.0, end, low, first, *ends), 0.0, 1.0, first, *ends)
        grown = Stage(1 - (self.again or scale(left) * left), 1.0, (), 0.0, 1.0, second, self.least, self.terminal, grid=left)
        return begun, replace(grown, sigmas=grown.spaced(high))

    def over(self, strength: float) -> "Plan":
        """Plain sampling that draws over a picture: of its steps the last `strength`, as diffusers' image-to-image counts them.

        Raises: UsageError for a strength that is none, or a plan of several stages.
        """
        if not is_number(strength) or not 0 < strength <= 1:
            raise UsageError(f"strength is above 0 (the picture as it is) and at most 1 (nothing of it is left), got {strength!r}")
        if not self.plain or self.begin < 1:
            raise UsageError("a picture is drawn over along a plan of one stage from pure noise, such as 'full'")
        (steps,) = self.steps
        left_out = int(max(steps - min(steps * strength, steps), 0))
        begin = self.stages()[0].sigmas[left_out]
        return replace(self, steps=(steps - left_out,), begin=begin, shifts=self.shifts, empirical=None)  # whose shift was that of all

    def alike(self, other: "Plan") -> bool:
        """Whether two plans differ in their steps at most."""
        return len(self.steps) == len(other.steps) and replace(self, steps=other.steps) == other

    def spread(self, total: int) -> "Plan":
        """The same stages in `total` steps, shared out as they are now, at least one a stage.

        Raises: UsageError for fewer steps than stages.
        """
        if total < len(self.steps):
            raise UsageError(f"a plan of {len(self.steps)} stages takes at least as many steps, got {total}")
        return replace(self, steps=shares(self.steps, total))

    def grown(self, patches: int) -> int:
        """How many of `patches` low-resolution patches grow in the mixed stage.

        Raises: UsageError where the ratio leaves none, or all, of so few.
        """
        if self.up_ratio is None:
            return 0
        count = int(patches * self.up_ratio)
        if not 0 < count < patches:
            raise UsageError(f"up_ratio {self.up_ratio:g} of {patches} patches grows {count}: take a larger picture or another ratio")
        return count

    def tokens(self, height: int, width: int) -> tuple[int, ...]:
        """Image tokens of each stage for a picture of `height` x `width` full-resolution tokens."""
        if self.plain:
            return (height * width,)
        low = height * width // 4
        return (low, low + 3 * self.grown(low), height * width) if self.mixed else (low, height * width)

    def step_tokens(self, height: int, width: int) -> tuple[int, ...]:
        """Image tokens of each step."""
        return tuple(count for count, steps in zip(self.tokens(height, width), self.steps, strict=True) for _ in range(steps))


def shares(weights: Sequence[int], total: int) -> tuple[int, ...]:
    """`total` in whole numbers in proportion to `weights`, none below one: what is furthest from its share is mended
    first."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while (rest := total - sum(counts)) != 0:
        step = 1 if rest > 0 else -1
        changeable = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(changeable, key=lambda i: step * (exact[i] - counts[i]))] += step
    return tuple(counts)


def restart(end: float, z: float) -> tuple[float, float, float]:
    """Where the stage after one that ended at time `end` starts, and the (alpha, beta) of its renoising (section
    3.3)."""
    whole = z * (1 - end) + end
    start = end / whole
    return start, 1 - start, 1 / whole


def scale(sigma: float) -> float:
    """Of latents of twice the height and width whose spectrum was grown at `sigma`: what they are multiplied by. Their noise is then of
    sigma times as much, and they lie on the path again (SPEED)."""
    return 2 / (1 + sigma)


def sigmas(
    start: float, end: float, steps: int, shift: float, least: float | None = None, terminal: float | None = None
) -> tuple[float, ...]:
    """The `steps + 1` sigmas from time `start` to time `end`, falling: see `schedule.spaced`."""
    return tuple(float(s) for s in spaced(1 - start, 1 - end, steps, shift, least, terminal))


def full(steps: int, tokens: int, scheduler: Mapping[str, Any]) -> Plan:
    """Plain sampling of `tokens` full-resolution tokens, with the shift of a diffusers flow-match scheduler's config.

    FLUX.1-dev's grows with the picture: e to a line through two (tokens, exponent) points, unless `mu` is the exponent,
    or "empirical" for FLUX.2's rule (see `empirical_shift`), as the model's pipeline has it. `sigma_min` is the
    scheduler's own, where the model's pipeline leaves the sigmas to it. An empty config spaces steps evenly.

    Raises: UsageError for a config that is none (see `check_scheduler`).
    """
    check_scheduler(scheduler)
    ends: dict[str, Any] = {"least": scheduler.get("sigma_min"), "terminal": scheduler.get("shift_terminal") or None}
    if not scheduler.get("use_dynamic_shifting", False):
        return Plan.full(steps, float(scheduler.get("shift", 1.0)), **ends)
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    if (mu := scheduler.get("mu")) == EMPIRICAL:
        return Plan.full(steps, empirical=tokens, **ends)
    exponent = base + (most - base) * (tokens - low) / (high - low) if mu is None else mu
    linear = scheduler.get("time_shift_type", "exponential") == "linear"
    return Plan.full(steps, exponent if linear else math.exp(exponent), **ends)


def check_outline(steps: tuple[int, ...], end_times: tuple[float, ...], finished: bool = False) -> None:
    """Raise UsageError unless these are steps and end times of a plan, of whose stages each may end in a `finished` picture."""
    if not 1 <= len(steps) <= STAGES:
        raise UsageError(f"a plan has 1 to {STAGES} stages, the last at full resolution; got steps for {len(steps)}: {steps}")
    if len(end_times) != len(steps):
        raise UsageError(f"a plan has an end time for each of its {len(steps)} stages, got {end_times}")
    for count in steps:
        whole_steps(count)
    if bad := [time for time in end_times if not is_number(time)]:
        raise UsageError(f"end times are numbers, got {bad[0]!r}")
    if finished and set(end_times) != {1}:
        raise UsageError(f"what grows in pixels is a finished picture, so both end times are 1, got {end_times}")
    if not finished and not all(early < late for early, late in pairwise((0, *end_times))):  # nor is NaN below anything
        raise UsageError(f"end times rise from above 0, got {end_times}")
    if end_times[-1] != 1:
        raise UsageError(f"the last end time is 1, the finished picture, got {end_times[-1]:g}")


def named(plan: Plan, *plans: Mapping[str, Plan]) -> str:
    """The name among `plans` of a plan in whichever number of steps."""
    return next((name for known in plans for name, each in known.items() if each.alike(plan)), OWN)


def check_ratio(up_ratio: Any) -> None:
    """Raise UsageError unless it is a share strictly between nothing and everything."""
    if not is_number(up_ratio) or not 0 < up_ratio < 1:
        edges: dict[float, str] = {
            0: " (with 0 the mixed stage would be the low one again)",
            1: " (with 1 nothing is left to grow in the last stage)",
        }
        raise UsageError(f"up_ratio lies between 0 and 1, got {up_ratio!r}{edges.get(up_ratio, '') if is_number(up_ratio) else ''}")


# The authors' plans for FLUX.1-dev, named for how much less they compute than 50 plain steps.
PRESETS = {
    "4x": Plan(OWN_STEPS["4x"], (0.3, 0.45, 1.0), (5.019, 2.589, 2.226), 6.317, 0.3),
    "7x": Plan(OWN_STEPS["7x"], (0.2, 0.3, 1.0), (8.141, 2.856, 2.193), 6.261, 0.1),
}


FULL = "full"
SPEED, MRFLOW = "speed", "mrflow"
STEPPED = (FULL, SPEED, MRFLOW)  # plans by a name in any number of steps, along the model's own schedule
OWN = "own"  # a plan of the caller's, which no card grades


def preset(name: str) -> Plan:
    """The plan of that name; raises UsageError listing those that exist."""
    if name not in PRESETS:
        raise UsageError(
            f"there is no plan {name!r}; there are {', '.join((*PRESETS, *STEPPED))}, and plans of your own: "
            "5,6,7/0.3,0.45,1/0.3 on the command line (steps/end times/share), fit_plan((5, 6, 7), (0.3, 0.45, 1), 0.3) in Python"
        )
    return PRESETS[name]
