import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Caching, Plan, UsageError
from elastic_runtime.ralu.plan import PRESETS

X, P = np.zeros((1, 4, 2)), np.zeros((1, 4, 2))
PLAN = Plan((4, 4, 5), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)


def visit(velocity: Any, plan: Plan = PLAN) -> list[np.ndarray]:
    index, velocities = 0, []
    for number, stage in enumerate(plan.stages()):
        for sigma in stage.sigmas[:-1]:
            velocities.append(velocity(X, P, sigma, index, number))
            index += 1
    return velocities


def counted(value: Any) -> tuple[Any, list[int]]:
    asked: list[int] = []

    def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
        asked.append(index)
        return np.full(x.shape, value(sigma, index, stage), dtype=np.float64)

    return velocity, asked


@pytest.mark.parametrize("skip", [3, None, {2.5}, "35", [True], [[3]]])
def test_what_is_skipped_are_whole_numbers(skip: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"caching skips steps, whole numbers such as {{3, 5}}, got {skip!r}")):
        Caching(skip)
    assert Caching([np.int64(3), 5]) == Caching(frozenset({3, 5}))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="caching has order 0"):
        Caching.every(PLAN, 2, "1")  # type: ignore[arg-type]


def test_extrapolation_is_exact_where_the_velocity_is_linear_in_sigma() -> None:
    """Each stage has a line of its own: nothing is carried over."""
    velocity, asked = counted(lambda sigma, index, stage: (stage + 1) * (2 - 3 * sigma))
    exact = visit(velocity)
    asked.clear()
    cached = visit(Caching.every(PLAN, 3).apply(velocity, PLAN))
    np.testing.assert_allclose(cached, exact, atol=1e-12)
    assert asked == [0, 1, 4, 5, 8, 9, 12]


def test_reuse_repeats_the_last_computed_prediction() -> None:
    velocity, asked = counted(lambda sigma, index, stage: index)
    cached = visit(Caching.every(PLAN, 2, order=0).apply(velocity, PLAN))
    assert [int(v[0, 0, 0]) for v in cached] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12]
    assert asked == [0, 2, 4, 6, 8, 10, 12]


def test_the_line_goes_through_the_last_two_computed_steps() -> None:
    velocity, _ = counted(lambda sigma, index, stage: sigma**2)
    plan = Plan.full(4)  # sigmas 1, .75, .5, .25
    cached = visit(Caching(frozenset({2, 3})).apply(velocity, plan), plan)
    slope = (0.75**2 - 1) / (0.75 - 1)
    assert cached[2][0, 0, 0] == pytest.approx(0.75**2 - 0.25 * slope)
    assert cached[3][0, 0, 0] == pytest.approx(0.75**2 - 0.5 * slope)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(2, 5), st.sampled_from([0, 1]))
def test_every_makes_what_check_allows_and_computes_as_rarely_as_asked(steps: list[int], interval: int, order: Any) -> None:
    plan = Plan(tuple(steps), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)
    caching = Caching.every(plan, interval, order)
    caching.check(plan)
    for begin, count in zip(np.cumsum([0, *steps[:-1]]), steps, strict=True):
        computed = [step for step in range(begin, begin + count) if step not in caching.skip]
        assert computed[: order + 1] == list(range(begin, begin + min(order + 1, count)))
        assert all(late - early == interval for early, late in zip(computed[order:], computed[order + 1 :], strict=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Caching(frozenset({0})).check(PLAN), "needs two computed steps before step 0 in its stage, which begins at 0"),
        (lambda: Caching(frozenset({5})).check(PLAN), "needs two computed steps before step 5 in its stage, which begins at 4"),
        (lambda: Caching(frozenset({8}), 0).check(PLAN), "order 0 needs a computed step before step 8"),
        (lambda: Caching(frozenset({13})).check(PLAN), "skips step 13, but the plan's steps are 0 to 12"),
        (lambda: Caching(frozenset({-1})).check(PLAN), "skips step -1"),
        (lambda: Caching(frozenset({3}), 2), "order 0 (reuse) or 1 (extrapolate), got 2"),
        (lambda: Caching.every(PLAN, 1), "got an interval of 1"),
    ],
)
def test_steps_that_cannot_be_skipped_are_named(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make()


def test_a_cached_velocity_is_of_one_run() -> None:
    velocity, asked = counted(lambda sigma, index, stage: sigma)
    caching = Caching.every(PRESETS["4x"], 2)
    for _ in range(2):
        visit(caching.apply(velocity, PRESETS["4x"]), PRESETS["4x"])
    assert len(asked) == 2 * (18 - len(caching.skip))


def test_a_name_is_no_plan() -> None:
    with pytest.raises(UsageError, match=r"laid over a Plan, PRESETS\['4x'\] or .* got '4x'"):
        Caching.every("4x", 2)  # type: ignore[arg-type]
