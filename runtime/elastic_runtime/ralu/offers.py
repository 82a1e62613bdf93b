"""The plans that go by a name, for a model's scheduler and a picture's tokens: which suit them, and why others do not."""

from collections.abc import Mapping
from typing import Any

from elastic_runtime.ralu.plan import FULL, PRESETS, Plan, full

# The base shift up to which a schedule can be fitted to a preset's outline before the search runs into its bounds (see `fit`).
MOST_BASE = {"4x": 5.5, "7x": 3.5}


def unsuited(name: str, tokens: int, scheduler: Mapping[str, Any], few_steps: int | None = None) -> str | None:
    """Why the preset `name` does not suit pictures of so many full-resolution `tokens` of a model with this scheduler, and what to take
    instead; None where it does.

    `few_steps` are those that the model was distilled to draw in, None where any number is fine.
    """
    if name not in PRESETS:
        return None
    plan, instead = PRESETS[name], f"take plan {FULL!r}"
    base = full(plan.total, tokens, scheduler).shifts[0]
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
    """The plans that suit, by name, the usual one first; `full` in so many `steps`."""
    suited = {name: plan for name, plan in PRESETS.items() if unsuited(name, tokens, scheduler, few_steps) is None}
    return suited | {FULL: full(steps, tokens, scheduler)}
