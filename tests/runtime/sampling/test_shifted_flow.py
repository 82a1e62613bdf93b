"""A rectified flow whose scheduler dwells on noise: its times, and the loops over them."""

import msgspec
import numpy as np
import pytest
from fakes import model
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import UsageError
from elastic_runtime.contract.schedule import RectifiedFlow, onward
from elastic_runtime.ralu.plan import Plan
from elastic_runtime.sampling.fitting import sampler, times

NOISE = np.random.default_rng(0).standard_normal((1, 1, 8, 8))
SHIFTED = [RectifiedFlow(shift=3.0), RectifiedFlow(shift=1.6, terminal=0.02), RectifiedFlow(terminal=0.1)]


@pytest.mark.parametrize("schedule", SHIFTED)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_times_are_those_of_a_plan_with_the_same_scheduler(schedule: RectifiedFlow, steps: int) -> None:
    (stage,) = Plan.full(steps, schedule.shift, terminal=schedule.terminal).stages()
    np.testing.assert_array_equal(schedule.times(steps), stage.sigmas)
    if schedule.terminal and steps > 1:
        assert schedule.times(steps)[-2] == pytest.approx(schedule.terminal)
    left = schedule.times(steps, 0.6)
    np.testing.assert_array_equal(left, stage.spaced(steps, 0.6))
    np.testing.assert_array_equal(left, onward(0.6, 0.0, steps, schedule.shift, terminal=schedule.terminal))
    assert (left[0], left[-1]) == (0.6, 0.0)
    assert (np.diff(left) < 0).all()


def test_an_even_flow_is_written_and_visited_as_before() -> None:
    assert msgspec.json.encode(RectifiedFlow()) == b'{"kind":"rectified_flow"}'
    np.testing.assert_array_equal(RectifiedFlow().times(7), np.linspace(1, 0, 8))
    np.testing.assert_array_equal(RectifiedFlow().times(3, 0.7), np.linspace(0.7, 0, 4))


@pytest.mark.parametrize("name", ["euler", "heun", "ab2", "ab3"])
@pytest.mark.parametrize("schedule", SHIFTED)
def test_samplers_visit_them_and_end_in_the_picture(name: str, schedule: RectifiedFlow) -> None:
    described, picture = model(1, schedule=schedule), np.full((1, 1, 8, 8), 0.4)
    _, run = sampler(described, name)
    steps = list(run(lambda x, t, index: (x - picture) / t, NOISE, 6, np.random.default_rng(0)))
    visited = [step.time for step in steps] + [steps[-1].next_time]
    np.testing.assert_array_equal(visited, schedule.times(6))
    np.testing.assert_array_equal(visited, times(described, name, 6))
    np.testing.assert_allclose(steps[-1].sample, picture, atol=1e-6)


def test_the_sde_has_times_of_its_own() -> None:
    assert sampler(model(1), "sde")[0] == "sde"
    with pytest.raises(UsageError, match="sampler 'sde' does not fit; tiny, .* takes euler, heun, ab2 or ab3"):
        sampler(model(1, schedule=SHIFTED[0]), "sde")


@pytest.mark.parametrize("fields", [{"shift": 0.0}, {"shift": float("inf")}, {"terminal": 1.0}, {"terminal": 0.0}, {"shift": float("nan")}])
def test_numbers_that_cannot_be_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs a shift of 1/100000 to 100000 and a terminal between 0 and 1"):
        RectifiedFlow(**fields)


@given(st.integers(2, 40), st.integers(1, 38), st.floats(0.3, 20), st.floats(0.005, 0.2))
def test_what_is_left_of_a_stretched_schedule_is_its_own_rest(steps: int, taken: int, shift: float, terminal: float) -> None:
    whole = RectifiedFlow(shift=shift, terminal=terminal).times(steps)
    taken = min(taken, steps - 1)
    np.testing.assert_allclose(onward(whole[taken], 0.0, steps - taken, shift, terminal=terminal), whole[taken:], rtol=1e-7, atol=1e-9)
