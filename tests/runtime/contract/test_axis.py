from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Axis, BudgetError, Span


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    """Any valid axis, carried by a length or a value."""
    unit = draw(st.integers(1, 16))
    step = unit * draw(st.integers(1, 4))
    low = unit * draw(st.integers(1, 8))
    count = draw(st.integers(1, 40))
    default = low + step * draw(st.integers(0, count - 1))
    carrier: Any = draw(st.sampled_from(["length", "value"]))
    return Axis(
        name="latents", min=low, max=low + step * (count - 1), step=step, default=default,
        input="latent_ids", carrier=carrier, unit=unit, dimension="J" if carrier == "length" else None,
    )  # fmt: skip


def latents(**changes: Any) -> Axis:
    fields = {"min": 16, "max": 256, "step": 16, "default": 256, "unit": 16, "dimension": "J"} | changes
    return Axis(name="latents", input="latent_ids", carrier="length", **fields)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_span_reads_back_what_it_writes(a: int, b: int) -> None:
    span = Span(min(a, b), max(a, b))
    assert Span.parse(str(span)) == span
    assert eval(repr(span)) == span
    assert Span.parse(str(span.min)) == Span(span.min, span.min)


@pytest.mark.parametrize("text", ["", "-", "16-", "-16", "a-b", "1-2-3", "16..32", "1.5-2", "16 32"])
def test_a_span_that_is_not_one_is_quoted(text: str) -> None:
    with pytest.raises(BudgetError, match="written 32-256") as caught:
        Span.parse(text)
    assert repr(text) in str(caught.value)


def test_a_number_of_more_digits_than_python_reads_is_refused() -> None:
    assert Span.parse("9" * 18) == Span(10**18 - 1, 10**18 - 1)
    for text in ("9" * 19, "1 - " + "9" * 5000):
        with pytest.raises(BudgetError, match=r"a number has 18 digits at most, got one of \d+, 999999999999999999\.\.\."):
            Span.parse(text)


def test_a_reversed_span_is_answered_with_the_right_one() -> None:
    with pytest.raises(BudgetError, match="reversed: write 32-256"):
        Span.parse("256-32")


def test_spaces_in_a_span_are_allowed() -> None:
    assert Span.parse(" 32 - 256 ") == Span(32, 256)


@given(axes())
def test_every_value_of_an_axis_is_a_budget_and_its_neighbours_are_not(axis: Axis) -> None:
    values = list(axis.values)
    assert values[0] == axis.min
    assert values[-1] == axis.max
    assert axis.default in values
    assert [axis.check(value) for value in values] == values
    for wrong in (axis.min - axis.step, axis.max + axis.step, *([axis.min + 1] if axis.step > 1 else [])):
        with pytest.raises(BudgetError, match="is not available"):
            axis.check(wrong)


@given(axes())
def test_feeds_carry_the_budget(axis: Axis) -> None:
    for value in axis.values:
        array = axis.feed(value)
        assert array.dtype == np.int64
        if axis.carrier == "length":
            assert array.tolist() == list(range(value // axis.unit))
        else:
            assert array.shape == ()
            assert int(array) == value


@given(axes())
def test_probes_are_budgets_from_end_to_end(axis: Axis) -> None:
    probes = axis.probes()
    assert set(probes) <= set(axis.values)
    assert probes == sorted(set(probes))
    assert probes[0] == axis.min
    assert probes[-1] == axis.max
    assert len(probes) == min(4, len(axis.values)) or len(axis.values) < 8


@given(axes(), st.data())
def test_narrowing_keeps_the_steps_and_a_default_inside(axis: Axis, data: st.DataObject) -> None:
    low = data.draw(st.sampled_from(axis.values))
    high = data.draw(st.sampled_from([value for value in axis.values if value >= low]))
    narrow = axis.narrow(Span(low, high))
    assert list(narrow.values) == [value for value in axis.values if low <= value <= high]
    assert narrow.default in narrow.values
    if low <= axis.default <= high:
        assert narrow.default == axis.default


@pytest.mark.parametrize("span", [Span(17, 256), Span(16, 250), Span(0, 256), Span(16, 512)])
def test_narrowing_to_what_the_axis_lacks_names_what_it_offers(span: Span) -> None:
    with pytest.raises(BudgetError, match="16-256 in steps of 16; the nearest is"):
        latents().narrow(span)


@pytest.mark.parametrize("value", [64.0, "64", None, True])
def test_a_budget_must_be_a_whole_number(value: Any) -> None:
    with pytest.raises(BudgetError, match="must be a whole number"):
        latents().check(value)


def test_numpy_integers_are_whole_numbers() -> None:
    assert latents().check(np.int64(64)) == 64


def test_a_shape_is_carried_by_the_data_and_has_no_feed_of_its_own() -> None:
    fields: Any = {"name": "tokens", "min": 4, "max": 64, "step": 1, "default": 64, "input": "hidden_states", "carrier": "shape"}
    axis = Axis(**fields, dimension="S")
    assert (axis.length(17), axis.narrow(Span(5, 9)).span) == (17, Span(5, 9))
    with pytest.raises(ValueError, match="carried by the shape of the data"):
        axis.feed(16)
    for wrong in ({}, {"dimension": "S", "min": 4, "step": 2, "unit": 2}):
        with pytest.raises(ValueError, match="axis tokens: "):
            Axis(**fields | wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"min": 0}, {"min": 32, "default": 16}, {"max": 250}, {"default": 40}, {"step": 8}, {"dimension": None}, {"unit": 0}, {"max": 8},
    ],
)  # fmt: skip
def test_an_axis_that_contradicts_itself_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="axis latents"):
        latents(**changes)
