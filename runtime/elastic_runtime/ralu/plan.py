"""A RALU plan: how many steps at which resolution, between which times (arXiv 2507.08422).

Times `t = 1 - sigma` run from 0 (noise) to 1 (picture). A plan of three stages begins at half the height and width,
then grows the patches with the most edges, then all of them. A plan of one stage is plain full-resolution sampling.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from elastic_runtime.contract.manifest import OWN_STEPS
from elastic_runtime.contract.schedule import is_number, onward, spaced, whole_steps
from elastic_runtime.errors import UsageError

STAGES = 3
# Below it no noise makes grown patches white again: the smallest eigenvalue of a block's covariance is 1 - 4/Z^2.
LEAST_Z = 2.0
EMPIRICAL = "empirical"  # what a scheduler's `mu` is where it is FLUX.2's rule


def empirical_shift(tokens: int, steps: int) -> float:
    """FLUX.2's shift of plain sampling, `e^mu`: mu lies on two lines over the image tokens, for 10 and for 200 steps, and between them
    in proportion to the steps; above 4,300 tokens on the second (`compute_empirical_mu` of diffusers' pipelines).

    Raises: UsageError for so many steps that the line has left all use.
    """
    dense = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(dense)
    sparse = 8.73809524e-05 * tokens + 1.89833333
    mu = dense + (sparse - dense) * (200 - steps) / 190
    if abs(mu) > MOST_EXPONENT:
        raise UsageError(f"FLUX.2's rule spaces {steps:,} steps as no model was drawn: take 200 or fewer")
    return math.exp(mu)


@dataclass(frozen=True)
class Stage:
    """One stage: it starts at time `start`, visits `sigmas` (one more than its steps) and ends at time `end`.

    On entering, the sample is renoised, `alpha * n + beta * x`; the first stage has alpha 0 and beta 1, which is
    nothing. `shift` says how its steps are spaced; `empirical` as in `Plan`.
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

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def spaced(self, steps: int, sigma: float | None = None) -> tuple[float, ...]:
        """The sigmas of `steps` steps from `sigma` (the stage's beginning where it is None) to the stage's end."""
        if sigma is None:
            shift = self.shift if self.empirical is None else empirical_shift(self.empirical, steps)
            return sigmas(self.start, self.end, steps, shift, self.least, self.terminal)
        return tuple(float(s) for s in onward(sigma, 1 - self.end, steps, self.shift, self.least, self.terminal))


@dataclass(frozen=True)
class Plan:
    """Stages of a drawing: for each its `steps`, the time at which it ends, and its schedule's `shifts`.

    Args:
        steps: three numbers (low, mixed, full resolution), or one (full resolution).
        end_times: rising, the last is 1.
        shifts: how much each stage dwells on noise; 1 is evenly.
        z: the paper's Z, at least 2: how far each stage steps back in time, and how grown patches are made white again.
        up_ratio: share of the low-resolution patches that grow in the mixed stage, between 0 and 1.
        renoise: False lets stages go on where the one before ended, with copies of what grew: what RALU is compared
        with.
        least: of plain sampling, the sigma before the shift that the last step starts from, where the scheduler names
        one (SD3); None spaces all steps alike (FLUX).
        terminal: of plain sampling, the sigma that the last step starts from, which the schedule is stretched to.
        empirical: of plain sampling, the image tokens that FLUX.2's shift is of: `shifts` follow from them and the steps
        (see `empirical_shift`).

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

    def __post_init__(self) -> None:
        for name in ("steps", "end_times", "shifts"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise UsageError(f"a plan's {name} are a tuple, one value a stage, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        check_outline(self.steps, self.end_times)
        if len(self.shifts) != len(self.steps):
            raise UsageError(f"a plan has a shift for each of its {len(self.steps)} stages, got {self.shifts}")
        if bad := [shift for shift in self.shifts if not (is_number(shift) and 0 < shift < math.inf)]:
            raise UsageError(f"a plan's shifts are above 0, got {bad[0]!r}")
        if self.plain:
            if self.z is not None or self.up_ratio is not None or not self.renoise:
                raise UsageError("a plan of one stage has no z, no up_ratio and no renoise: nothing grows in it")
            for name in ("least", "terminal"):
                value = getattr(self, name)
                if value is not None and not (is_number(value) and 0 < value < 1):
                    raise UsageError(f"a plan's {name} is a sigma between 0 and 1, got {value!r}")
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
    def total(self) -> int:
        """Steps in all."""
        return sum(self.steps)

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, with the sigmas that each visits."""
        stages, start, alpha, beta = [], 0.0, 0.0, 1.0
        for steps, end, shift in zip(self.steps, self.end_times, self.shifts, strict=True):
            visited = sigmas(start, end, steps, shift, self.least, self.terminal)
            stages.append(Stage(start, end, visited, alpha, beta, shift, self.least, self.terminal, self.empirical))
            if self.z is not None:
                start, alpha, beta = restart(end, self.z) if self.renoise else (end, 0.0, 1.0)
        return tuple(stages)

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
        return low, low + 3 * self.grown(low), height * width

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


# Keys of a diffusers flow-match scheduler that space the steps in ways that are not drawn here, and those that are drawn.
UNDRAWN = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
DRAWN = (
    "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal",
    "time_shift_type", "num_train_timesteps", "sigma_min", "mu",
)  # fmt: skip
MOST_TOKENS = 100_000  # of a picture of 5,000 px a side in FLUX.2; e to more is soon no number
MOST_EXPONENT, LEAST_SHIFT, MOST_LENGTH = 20.0, 1e-6, 1e9  # beyond which sigmas are no numbers


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Raise UsageError unless this is the config of a scheduler whose every key is drawn as it says."""
    if not isinstance(scheduler, Mapping):
        raise UsageError(f"the scheduler's config is an object, got {scheduler!r}")
    if on := [name for name in UNDRAWN if scheduler.get(name)]:
        raise UsageError(f"the scheduler has {on[0]}, which is not drawn here: turn it off in scheduler_config.json where that is meant")
    if strange := [name for name in scheduler if name not in (*DRAWN, *UNDRAWN) and scheduler[name] not in (None, False)]:
        raise UsageError(f"the scheduler has an unknown key {strange[0]!r}; known are {', '.join((*DRAWN, *UNDRAWN))}")
    numbers = {"shift": 1.0, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    values = {name: scheduler.get(name, usual) for name, usual in numbers.items()}
    if odd := [name for name, value in values.items() if not is_number(value) or not abs(value) < math.inf]:
        raise UsageError(f"the scheduler's {odd[0]} is a number, got {values[odd[0]]!r}")
    if values["shift"] <= 0 or not values["base_image_seq_len"] < values["max_image_seq_len"]:
        raise UsageError(
            f"the scheduler's shift is above 0 and its base_image_seq_len below max_image_seq_len, got {values['shift']}, "
            f"{values['base_image_seq_len']} and {values['max_image_seq_len']}"
        )
    most = {"base_shift": MOST_EXPONENT, "max_shift": MOST_EXPONENT, "shift": 1 / LEAST_SHIFT}
    far = [name for name, value in values.items() if abs(value) > most.get(name, MOST_LENGTH)]
    if far or values["shift"] < LEAST_SHIFT:
        name = far[0] if far else "shift"
        raise UsageError(f"the scheduler's {name} is beyond any use, got {values[name]!r}")
    if (kind := scheduler.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
        raise UsageError(f"the scheduler's time_shift_type is exponential or linear, got {kind!r}")
    mu = scheduler.get("mu")
    if mu is not None and mu != EMPIRICAL and not (is_number(mu) and abs(mu) <= MOST_EXPONENT):
        raise UsageError(f"the scheduler's mu is a number of at most {MOST_EXPONENT:g} or {EMPIRICAL!r}, got {mu!r}")
    if mu == EMPIRICAL and kind != "exponential":
        raise UsageError(f"the scheduler's time_shift_type is exponential for FLUX.2, got {kind!r}")
    ends = {"sigma_min": scheduler.get("sigma_min"), "shift_terminal": scheduler.get("shift_terminal") or None}
    if odd := [name for name, value in ends.items() if value is not None and not (is_number(value) and 0 < value < 1)]:
        raise UsageError(f"the scheduler's {odd[0]} is a sigma between 0 and 1, got {ends[odd[0]]!r}")


def check_tokens(tokens: Any) -> None:
    """Raise UsageError unless these may be the tokens that a shift is of."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MOST_TOKENS:
        raise UsageError(f"a plan's empirical is the number of image tokens, 1 to {MOST_TOKENS:,}, got {tokens!r}")


def check_outline(steps: tuple[int, ...], end_times: tuple[float, ...]) -> None:
    """Raise UsageError unless these are steps and end times of a plan."""
    if len(steps) not in (1, STAGES):
        raise UsageError(f"a plan has {STAGES} stages, or 1 at full resolution; got steps for {len(steps)}: {steps}")
    if len(end_times) != len(steps):
        raise UsageError(f"a plan has an end time for each of its {len(steps)} stages, got {end_times}")
    for count in steps:
        whole_steps(count)
    if bad := [time for time in end_times if not is_number(time)]:
        raise UsageError(f"end times are numbers, got {bad[0]!r}")
    if not all(early < late for early, late in pairwise((0, *end_times))):  # nor is NaN below anything
        raise UsageError(f"end times rise from above 0, got {end_times}")
    if end_times[-1] != 1:
        raise UsageError(f"the last end time is 1, the finished picture, got {end_times[-1]:g}")


def named(plan: Plan, plans: Mapping[str, Plan]) -> str:
    """The name among `plans` of a plan in whichever number of steps."""
    return next((name for name, each in plans.items() if each.alike(plan)), OWN)


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
OWN = "own"  # a plan of the caller's, which no card grades


def preset(name: str) -> Plan:
    """The plan of that name; raises UsageError listing those that exist."""
    if name not in PRESETS:
        raise UsageError(
            f"there is no plan {name!r}; there are {', '.join(PRESETS)}, full (with its number of steps) and plans of your own: "
            "5,6,7/0.3,0.45,1/0.3 on the command line (steps/end times/share), fit_plan((5, 6, 7), (0.3, 0.45, 1), 0.3) in Python"
        )
    return PRESETS[name]
