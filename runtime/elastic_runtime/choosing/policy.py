"""What chooses budgets: asked before each step, for each branch of guidance.

A policy is immutable. `init` gives the state for one picture; `next` takes the state and the step and returns a choice with
the state that follows, so that a policy can be shared by threads and replayed in tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import BudgetError

if TYPE_CHECKING:
    from elastic_runtime.choosing.estimates import Outlook


@dataclass(frozen=True)
class Choice:
    """Budgets of one step: for the conditional branch, and for the one it is guided against.

    `steps` is how many steps are left, this one counted, where the policy wants another number than is planned; `predicted` is the
    step's seconds by the cost model; `reason` says in a few words why these budgets.
    """

    budget: Budget
    guidance_budget: Budget
    steps: int | None = None
    predicted: float | None = None
    reason: str = ""


class Policy(Protocol):
    """`init` before the first step, `next` before each step."""

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook") -> Any:
        """Return the state before the first step; `outlook` tells what budgets would take here, and measures only when asked.

        Raises: BudgetError for what the axes cannot give; UnreachableError for a goal that no budget reaches.
        """

    def next(self, state: Any, index: int, seconds: float) -> tuple[Choice, Any]:
        """Choose for step `index`, `seconds` after the picture was begun; return the choice and the next state."""


@dataclass(frozen=True)
class Fixed:
    """The same budgets at every step. A cheaper `guidance_budget` is CCFG (ELIT) or Lite-CFG (DC-DiT)."""

    budget: Budget = field(default_factory=Budget)
    guidance_budget: Budget | None = None

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook | None" = None) -> Choice:
        full = self.budget.on(axes)
        return Choice(full, full if self.guidance_budget is None else self.guidance_budget.on(axes), reason="as asked")

    def next(self, state: Choice, index: int, seconds: float) -> tuple[Choice, Choice]:
        return state, state


@dataclass(frozen=True)
class PerStep:
    """One budget for each step, first step (pure noise) first."""

    budgets: tuple[Budget, ...]
    guidance_budget: Budget | None = None

    def init(self, axes: Sequence[Axis], steps: int, outlook: "Outlook | None" = None) -> tuple[Choice, ...]:
        if len(self.budgets) != steps:
            raise BudgetError(f"{len(self.budgets)} budgets were given for {steps} steps: give one for each step")
        return tuple(Fixed(budget, self.guidance_budget).init(axes, steps) for budget in self.budgets)

    def next(self, state: tuple[Choice, ...], index: int, seconds: float) -> tuple[Choice, tuple[Choice, ...]]:
        return state[index], state
