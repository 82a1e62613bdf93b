import keyword

import pytest
from fakes import LATENTS
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Axis, Budget, BudgetError
from elastic_runtime.contract.budget import key, parse_key

LOOPS = Axis(name="loops", min=1, max=8, step=1, default=4, input="loops", carrier="value")
names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
budgets = st.dictionaries(names, st.integers(0, 4096), max_size=4).map(lambda values: Budget(**values))


@given(budgets)
def test_a_budget_reads_back_from_its_repr_and_its_key(budget: Budget) -> None:
    assert eval(repr(budget)) == budget
    assert parse_key(key(budget)) == budget


@given(budgets)
def test_equal_budgets_are_one_key_of_a_dict(budget: Budget) -> None:
    turned = Budget(**dict(reversed(list(budget.items()))))
    assert {budget: 1}[turned] == 1


def test_a_budget_is_filled_in_with_defaults() -> None:
    assert Budget(loops=2).on([LATENTS, LOOPS]) == Budget(latents=64, loops=2)
    assert Budget().on([]) == Budget()


def test_an_axis_that_the_model_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(BudgetError, match="no axis 'tokens'; it has latents, loops"):
        Budget(tokens=3).on([LATENTS, LOOPS])
    with pytest.raises(BudgetError, match="it has none"):
        Budget(tokens=3).on([])


def test_a_value_between_steps_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"latents 63 is not available: this model offers 4-64 in steps of 4; the nearest is 64"):
        Budget(latents=63).on([LATENTS])
