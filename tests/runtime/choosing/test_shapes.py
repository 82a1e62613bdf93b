"""What a plan is worth in steps that no card has graded: never less for more steps of a stage, never more than the rows vouch for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Plan
from elastic_runtime.choosing.shapes import LEAST, Grades, shapes, tails
from elastic_runtime.ralu.plan import PRESETS

FLOPS = np.array([1.0, 2.0, 4.0])
Shape = tuple[int, int, int]
counts = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
rows = st.dictionaries(counts, st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 5.0)), min_size=1, max_size=8)


def grades(table: dict[Shape, tuple[float, float]]) -> Grades:
    steps = np.array(list(table))
    accuracy, distance = np.array(list(table.values())).T
    return Grades(steps, steps @ FLOPS, accuracy, distance)


def of(table: dict[Shape, tuple[float, float]], *asked: Shape) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array(asked)
    return grades(table).of(steps, steps @ FLOPS)


def test_a_row_vouches_for_itself_and_for_more_steps() -> None:
    table = {(3, 3, 4): (0.9, 1.2)}
    quality, distance = of(table, (3, 3, 4), (9, 3, 4), (9, 9, 9))
    assert quality.tolist() == [0.9, 0.9, 0.9]
    assert distance.tolist() == [1.2, 1.2, 1.2]


def test_between_two_rows_the_stage_that_is_furthest_behind_counts() -> None:
    table = {(2, 2, 2): (0.5, 3.0), (6, 6, 2): (0.9, 1.0)}
    quality, distance = of(table, (4, 4, 2), (6, 4, 9), (6, 2, 2))
    assert quality == pytest.approx([0.7, 0.7, 0.5])
    assert distance == pytest.approx([2.0, 2.0, 3.0])


def test_below_all_rows_it_falls_to_nothing() -> None:
    table = {(2, 2, 2): (0.8, 1.5), (4, 4, 4): (0.9, 1.0)}
    quality, distance = of(table, (2, 2, 1), (1, 1, 1))
    assert quality == pytest.approx([0.8 * 10 / 14, 0.8 * 7 / 14])
    assert distance == pytest.approx([1.5, 1.5])


@given(table=rows, one=counts, more=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)))
def test_more_steps_are_never_worse_and_no_better_than_the_best_row(
    table: dict[Shape, tuple[float, float]], one: Shape, more: Shape
) -> None:
    other = (one[0] + more[0], one[1] + more[1], one[2] + more[2])
    quality, distance = of(table, one, other)
    assert quality[1] >= quality[0] - 1e-9 or not any(all(a <= b for a, b in zip(row, one, strict=True)) for row in table)
    if any(all(a <= b for a, b in zip(row, one, strict=True)) for row in table):
        assert distance[1] <= distance[0] + 1e-9
    assert quality.max() <= max(accuracy for accuracy, _ in table.values()) + 1e-9
    assert distance.min() >= min(each for _, each in table.values()) - 1e-9


@given(graded=st.lists(counts, max_size=4), most=st.sampled_from([0.0, 60.0, 400.0]))
def test_shapes_have_every_stage_and_cost_no_more_than_allowed(graded: list[Shape], most: float) -> None:
    plan = PRESETS["4x"]
    every = shapes(plan, graded, FLOPS.tolist(), most)
    assert (every >= 1).all()
    assert len(np.unique(every, axis=0)) == len(every)
    assert every.sum(1).min() >= min(LEAST, *(sum(shape) for shape in graded), LEAST)
    if most:
        assert ((every @ FLOPS <= most) | (every.sum(1) <= plan.total)).all()
    assert plan.steps in {tuple(row) for row in every.tolist()}


def test_plain_sampling_takes_any_number_up_to_its_own() -> None:
    assert shapes(Plan.full(6), [(50,)], [4.0], 0.0).ravel().tolist() == [4, 5, 6]
    assert shapes(Plan.full(2), [], [4.0], 0.0).ravel().tolist() == [2]


@given(taken=st.one_of(st.tuples(st.integers(0, 40)), st.tuples(counts.map(lambda c: c[0]), st.integers(0, 40)), counts))
def test_what_is_left_is_always_something_in_every_stage(taken: tuple[int, ...]) -> None:
    every = shapes(PRESETS["4x"], [(10, 12, 4)], FLOPS.tolist(), 0.0)
    rest = tails(every, taken)
    assert len(rest)
    assert rest.shape[1] == 3 - len(taken) + 1
    assert (rest >= 1).all()
