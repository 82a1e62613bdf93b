"""What is left of a run, and how it is spaced anew."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.ralu.plan import PRESETS, Plan, shares
from elastic_runtime.sampling.course import Course

PLANS = [*PRESETS.values(), Plan.full(20, 3.0)]


def flow(steps: int) -> Course:
    return Course.of((steps,), lambda stage, begin, count: RectifiedFlow().times(count, 1.0 if begin is None else begin))


@given(st.sampled_from(PLANS), st.integers(0, 30), st.lists(st.integers(1, 60), max_size=8))
def test_however_it_is_spaced_every_stage_falls_to_its_end(plan: Plan, taken: int, totals: list[int]) -> None:
    course, stages = Course.along(plan), plan.stages()
    for step in range(taken):
        if not course.times:
            break
        if step < len(totals):
            course = course.spaced(totals[step])
            assert course.total == max(totals[step], len(course.times))
        for number, times in enumerate(course.times, start=course.first):
            assert (np.diff(times) < 0).all()
            assert times[-1] == pytest.approx(1 - stages[number].end, abs=1e-12)
        before = course.times[0][0]
        course = course.onward()
        if course.times and course.first == len(stages) - len(course.times):
            assert course.times[0][0] < before or course.enters


@given(st.integers(1, 50), st.integers(0, 49))
def test_what_is_left_at_its_own_spacing_is_what_was_asked_for(steps: int, taken: int) -> None:
    course = flow(steps)
    for _ in range(min(taken, steps - 1)):
        course = course.onward()
    left = steps - min(taken, steps - 1)
    assert course.steps == (left,) == course.densest
    assert course.rest == pytest.approx(left)
    assert course.spaced(left) is course


def test_fewer_steps_may_become_as_many_again() -> None:
    course = flow(10).onward().spaced(3)
    assert course.steps == (3,)
    np.testing.assert_allclose(course.times[0], np.linspace(0.9, 0, 4))
    course = course.onward()
    assert course.densest == (6,)
    np.testing.assert_allclose(course.spaced(6).times[0], np.linspace(0.6, 0, 7))


def test_a_run_that_cannot_change_keeps_its_times() -> None:
    course = Course.of((5,), lambda stage, begin, count: RectifiedFlow().times(count), flexible=False)
    assert course.spaced(2) is course


def test_a_plan_enters_its_later_stages() -> None:
    course = Course.along(Plan((1, 2, 1), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3))
    entering = []
    while course.times:
        entering.append((course.first, course.enters))
        course = course.onward()
    assert entering == [(0, False), (1, True), (1, False), (2, True)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 200))
def test_shares_add_up_and_leave_none_out(weights: list[int], more: int) -> None:
    total = len(weights) + more
    counts = shares(weights, total)
    assert sum(counts) == total
    assert min(counts) >= 1
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(count <= max(1, share + 1) for count, share in zip(counts, exact, strict=True))


def test_shares_of_the_same_total_are_the_weights() -> None:
    assert shares((5, 6, 7), 18) == (5, 6, 7)
    assert (shares((2, 3, 5), 6), shares((2, 3, 5), 20)) == ((1, 2, 3), (4, 6, 10))
