"""The plans that go by a name, for a model's scheduler and a picture's tokens: which suit them, and why others do not."""

import contextlib
from collections.abc import Mapping
from typing import Any

from elastic_runtime.contract.schedule import is_number, unshifted, whole_steps
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.plan import FULL, MRFLOW, PRESETS, SPEED, Plan, full

# The base shift up to which a schedule can be fitted to a preset's outline before the search runs into its bounds (see `fit`).
MOST_BASE = {"4x": 5.5, "7x": 3.5}
TRANSITION = 0.6  # the sigma at which plan `speed` grows: of 0.9, 0.75, 0.6 and 0.45 the best on ralu-digits at equal FLOPs

AGAIN = 0.4  # the sigma from which plan `mrflow` draws again what it enlarged


def base_shift(steps: int, tokens: int, scheduler: Mapping[str, Any]) -> float:
    """The shift of plain sampling of so many full-resolution `tokens` in `steps`, which a plan's schedule is fitted to: see `fit`.

    Raises: UsageError as `full`.
    """
    return full(steps, tokens, scheduler).shifts[0]


def unsuited(name: str, tokens: int, scheduler: Mapping[str, Any], few_steps: int | None = None) -> str | None:
    """Why the preset `name` does not suit pictures of so many full-resolution `tokens` of a model with this scheduler, and what to take
    instead; None where it does.

    `few_steps` are those that the model was distilled to draw in, None where any number is fine.
    """
    if name not in PRESETS:
        return None
    plan, instead = PRESETS[name], f"take plan {SPEED!r} or {FULL!r}"
    base = base_shift(plan.total, tokens, scheduler)
    if base > MOST_BASE[name]:
        return (
            f"plan {name!r} does not suit this model at {tokens} image tokens: no schedule of its stages is like plain sampling with a "
            f"shift above {MOST_BASE[name]:g}, and the scheduler's is {base:.3g} there; {instead}, or a smaller picture"
        )
    if few_steps is not None and plan.total > few_steps:
        return (
            f"plan {name!r} does not suit this model, which was distilled to draw in {few_steps} steps, fewer than the {plan.total} of the "
            f"plan: {instead}"
        )
    return None


def offers(steps: int, tokens: int, scheduler: Mapping[str, Any], few_steps: int | None = None) -> dict[str, Plan]:
    """The plans that suit, by name, the usual one first; those along the model's own schedule in so many `steps`."""
    suited = {name: plan for name, plan in PRESETS.items() if unsuited(name, tokens, scheduler, few_steps) is None}
    suited[FULL] = full(steps, tokens, scheduler)
    for name in (SPEED, MRFLOW):
        with contextlib.suppress(UsageError):  # so few steps, or a schedule that ends above where it would grow
            suited[name] = stepped(name, steps, tokens, scheduler, few_steps)
    return suited


def stepped(name: str, steps: int, tokens: int, scheduler: Mapping[str, Any], few_steps: int | None = None) -> Plan:
    """One of the plans along the model's own schedule; MrFlow's last step comes on top of the few of a distilled model."""
    if name == FULL:
        return full(steps, tokens, scheduler)
    return speed(steps, tokens, scheduler) if name == SPEED else mrflow(steps + (steps == few_steps), tokens, scheduler)


def mrflow(steps: int, tokens: int, scheduler: Mapping[str, Any], again: float = AGAIN) -> Plan:
    """MrFlow's plan (arXiv 2607.01642) for pictures of so many full-resolution `tokens`: all `steps` but one draw a picture of half the
    height and width, which is enlarged in its pixels and drawn again from sigma `again` in one step.

    Raises: UsageError for fewer than two steps, or an `again` that is no sigma between 0 and 1.
    """
    whole_steps(steps)
    if steps < 2:
        raise UsageError(f"plan {MRFLOW!r} takes a step at each of its two resolutions, got {steps}")
    small, large = full(steps - 1, tokens // 4, scheduler), full(1, tokens, scheduler)
    shifts = *small.shifts, *large.shifts
    return Plan((steps - 1, 1), (1.0, 1.0), shifts, least=small.least, terminal=small.terminal, growth="pixels", again=again)


def speed(steps: int, tokens: int, scheduler: Mapping[str, Any], transition: float = TRANSITION) -> Plan:
    """SPEED's plan of two resolutions (spectral progressive diffusion, arXiv 2605.18736) for pictures of so many full-resolution `tokens`:
    `steps` along the schedule of plain sampling, those above sigma `transition` at half the height and width.

    Raises: UsageError for fewer than two steps, or a transition that is no sigma between 0 and 1.
    """
    whole_steps(steps)
    if steps < 2:
        raise UsageError(f"plan {SPEED!r} takes a step at each of its two resolutions, got {steps}")
    if not is_number(transition) or not 0 < transition < 1:
        raise UsageError(f"the transition is a sigma between 0 and 1, got {transition!r}")
    plain = full(steps, tokens, scheduler)
    (shift,) = plain.shifts
    low = min(max(round(steps * (1 - unshifted(transition, shift))), 1), steps - 1)
    for value in (plain.least, plain.terminal):
        if value is not None and value >= transition:
            raise UsageError(f"the transition lies above the scheduler's last step, at sigma {value:g}, got {transition:g}")
    return Plan((low, steps - low), (1 - transition, 1.0), (shift, shift), least=plain.least, terminal=plain.terminal, growth="spectrum")
