"""What a diffusers flow-match scheduler says of the sigmas of plain sampling, and which of it is drawn here."""

import math
from collections.abc import Mapping
from typing import Any

from elastic_runtime.contract.schedule import is_number
from elastic_runtime.errors import UsageError

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
