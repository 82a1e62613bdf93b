"""What chooses how a picture is drawn: asked before each step, for each branch of guidance.

A policy is immutable. `init` gives the state for one picture; `next` takes the state and the step and returns a choice
with the state that follows, so that a policy can be shared by threads and replayed in tests. Those of this package are
records: they read and write as JSON in a request.
"""

from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from elastic_runtime.choosing.estimates import Outlook
from elastic_runtime.choosing.option import Choice, check_budget
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import BudgetError, UsageError


class Policy(Protocol):
    """`init` before the first step, `next` before each step."""

    def init(self, outlook: Outlook) -> Any:
        """Return the state before the first step; `outlook` tells what there is to choose and what it takes here, and
        measures when asked.

        Raises: BudgetError for what the axes cannot give; UnreachableError for a goal that nothing reaches.
        """

    def next(self, state: Any, index: int, seconds: float) -> tuple[Choice, Any]:
        """Choose for step `index`, `seconds` after the picture was begun; return the choice and the next state."""


def chosen(policy: Policy, outlook: Outlook, state: Any, index: int, seconds: float) -> tuple[Choice, Any]:
    """What a policy chooses for step `index`, and its next state.

    Raises: UsageError where a policy of one's own gives something else, or a choice that the model does not take.
    """
    answer = policy.next(state, index, seconds)
    if isinstance(policy, Record):
        return answer
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Choice):
        raise UsageError(f"a policy's `next` returns a Choice and the state that follows, such as option.choice() and None, got {answer!r}")
    outlook.check(answer[0], index)
    return answer


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="policy"):
    """Base of the policies that are records."""

    def __post_init__(self) -> None:
        if (weak := getattr(self, "guidance_budget", None)) is not None:
            check_budget(weak, "guidance_budget")


class Settled(Record, frozen=True):
    """What policies share that choose once: the choice made at first is the state, and stays."""

    def next(self, state: Choice, index: int, seconds: float) -> tuple[Choice, Choice]:
        return state, state


class Fixed(Settled, frozen=True, tag="fixed"):
    """The same budgets at every step. A cheaper `guidance_budget` is CCFG (ELIT) or Lite-CFG (DC-DiT)."""

    budget: Budget = Budget()
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget, "budget")

    def init(self, outlook: Outlook) -> Choice:
        return outlook.fixed(self.budget, self.guidance_budget).choice(reason="as asked")


class PerStep(Record, frozen=True, tag="per_step"):
    """One budget for each step, first step (pure noise) first."""

    budgets: tuple[Budget, ...]
    guidance_budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.budgets, tuple | list):
            raise UsageError(f"budgets by step are a tuple, one Budget for each step, got {self.budgets!r}")
        for budget in self.budgets:
            check_budget(budget, "a budget by step")

    def init(self, outlook: Outlook) -> tuple[Choice, ...]:
        if not self.budgets:
            raise BudgetError("budgets by step are one for each step, got none")
        options = tuple(outlook.fixed(budget, self.guidance_budget) for budget in self.budgets)
        for option in options:
            if len(option.steps) > 1 or option.plan:
                raise UsageError("budgets by step are for models that are drawn at budgets; this one is drawn along a plan: give plan")
            if option.steps != (len(options),):
                raise BudgetError(f"{len(options)} budgets were given for {option.steps[0]} steps: give one for each step")
        return tuple(option.choice(reason="as asked") for option in options)

    def next(self, state: tuple[Choice, ...], index: int, seconds: float) -> tuple[Choice, tuple[Choice, ...]]:
        return state[index], state


class Replay(Record, frozen=True, tag="replay"):
    """What another policy chose, step by step, for drawing the same picture again; the first names the plan, if there is one."""

    choices: tuple[Choice, ...]

    def init(self, outlook: Outlook) -> None:
        if not self.choices:
            raise UsageError("a replay has a choice for each step, got none")
        first = self.choices[0]
        left = first.plan.steps if first.plan else (outlook.steps or 1,)
        for index, choice in enumerate(self.choices):
            outlook.check(replace(choice, plan=first.plan))
            if not left:
                raise UsageError(f"a replay has a choice for each step: {index} are taken, and it has {len(self.choices)}")
            now, *later = choice.left(left)
            left = (now - 1, *later) if now > 1 else tuple(later)
        if left:
            raise UsageError(f"a replay has a choice for each step: it ends after {len(self.choices)}, and {sum(left)} are left to take")

    def next(self, state: None, index: int, seconds: float) -> tuple[Choice, None]:
        return replace(self.choices[index], reason="as recorded"), None
