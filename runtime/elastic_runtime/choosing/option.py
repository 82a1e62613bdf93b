"""A way to draw that a policy can choose, and what it chose for a step."""

from dataclasses import dataclass
from typing import Any

import msgspec

from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.plan import Plan


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Budgets of one step: for the conditional branch, and for the one it is guided against.

    `plan` is what to draw along, where the model is drawn along plans; it counts before the first step. `steps` are
    those left, this one counted, of each stage still to come, where the policy wants other numbers than are planned.
    `predicted` is the step's seconds by the cost model; `reason` says in a few words why.
    """

    budget: Budget
    guidance_budget: Budget
    steps: tuple[int, ...] | None = None
    predicted: float | None = None
    reason: str = ""
    plan: Plan | None = None

    def left(self, planned: tuple[int, ...]) -> tuple[int, ...]:
        """Steps left of each stage still to come: this choice's, or those that were planned.

        Raises: UsageError where they are not a whole number from 1 for each of the stages.
        """
        if self.steps is None:
            return planned
        if len(self.steps) != len(planned) or not all(type(count) is int and count > 0 for count in self.steps):
            stages = f"each of the {len(planned)} stages" if len(planned) > 1 else "one stage"
            raise UsageError(f"a choice's steps are a whole number from 1 for {stages} still to come, got {self.steps}")
        return self.steps


def check_budget(value: Any, what: str) -> None:
    """Raise UsageError unless `value` is a budget."""
    if not isinstance(value, Budget):
        raise UsageError(f"{what} is a Budget, such as Budget(latents=64), got {value!r}")


@dataclass(frozen=True)
class Option:
    """Budgets of both branches and steps, by stage: one stage for all steps, or those of `plan`. `name` is what users
    call it."""

    name: str
    budgets: tuple[Budget, ...]
    guidance_budgets: tuple[Budget, ...]
    steps: tuple[int, ...]
    plan: Plan | None = None

    @property
    def budget(self) -> Budget:
        """The strong branch's budget in the last stage, which is the largest."""
        return self.budgets[-1]

    def choice(self, steps: tuple[int, ...] | None = None, predicted: float | None = None, reason: str = "", stage: int = 0) -> Choice:
        """This option as what to do in a step of `stage`."""
        return Choice(self.budgets[stage], self.guidance_budgets[stage], steps, predicted, reason, self.plan)
