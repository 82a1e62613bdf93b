"""What is left of a run may be walked in another number of steps."""

import itertools

import numpy as np
import pytest
from fakes import model

from elastic_runtime.contract.schedule import CosineMask, LinearBeta, RectifiedFlow, ScaledLinearBeta, ShiftedCosine, VpSde
from elastic_runtime.sampling.fitting import sampler, times
from elastic_runtime.sampling.flow import Loop, Step
from elastic_runtime.sampling.masking import maskgit

NOISE = np.random.default_rng(0).standard_normal((1, 1, 8, 8))
PICTURE = np.random.default_rng(1).uniform(-1, 1, (1, 1, 8, 8))
SCHEDULES = {"euler": (RectifiedFlow(), "velocity"), "heun": (RectifiedFlow(), "velocity"),
             "ddim": (ShiftedCosine(shift=0.0), "velocity"), "ddpm": (ShiftedCosine(shift=0.0), "velocity")}  # fmt: skip


def last(loop: Loop, steps: int | None = None) -> Step:
    return list(itertools.islice(loop, steps))[-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_is_cut_and_goes_on_in_fewer_steps_still_ends_in_the_picture(name: str) -> None:
    """With the exact prediction of one picture, every sampler ends in it from wherever it goes on."""
    schedule, prediction = SCHEDULES[name]
    described = model(1, schedule=schedule, prediction=prediction)
    _, run = sampler(described, name)

    def predict(x: np.ndarray, t: float, index: int) -> np.ndarray:
        alpha, sigma = schedule.alpha_sigma(t)
        return (x - alpha * PICTURE) / sigma - PICTURE

    source = np.random.default_rng(2)
    cut = last(run(predict, NOISE, 8, source), 4)
    rest = list(run(predict, cut.sample, 2, source, cut.next_time))
    assert [step.time for step in rest] == pytest.approx(times(described, name, 2, cut.next_time)[:-1])
    assert rest[0].time == cut.next_time
    assert rest[-1].next_time == 0
    np.testing.assert_allclose(rest[-1].sample, PICTURE, atol=1e-6)
    (only,) = run(predict, cut.sample, 1, source, cut.next_time)
    assert (only.time, only.next_time) == (cut.next_time, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_going_on_at_the_same_pace_is_the_same_run(name: str) -> None:
    schedule, prediction = SCHEDULES[name]
    _, run = sampler(model(1, schedule=schedule, prediction=prediction), name)

    def predict(x: np.ndarray, t: float, index: int) -> np.ndarray:
        return 0.3 * x + t

    whole = last(run(predict, NOISE, 8, np.random.default_rng(3)))
    source = np.random.default_rng(3)
    cut = last(run(predict, NOISE, 8, source), 3)
    np.testing.assert_allclose(last(run(predict, cut.sample, 5, source, cut.next_time)).sample, whole.sample, rtol=1e-9)


def test_masks_that_are_left_are_filled_in_fewer_steps() -> None:
    schedule, source = CosineMask(vocabulary=16), np.random.default_rng(0)
    start = np.full((2, 1, 8, 8), 16)

    def predict(x: np.ndarray, t: float, index: int) -> np.ndarray:
        return np.zeros((2, 64, 16))

    cut = last(maskgit(predict, start, 8, source, schedule), 4)
    masked = int((cut.sample[0] == 16).sum())
    rest = list(maskgit(predict, cut.sample, 2, source, schedule, begin=cut.next_time))
    left = [int((step.sample[0] == 16).sum()) for step in rest]
    assert masked > left[0] > left[1] == 0
    known = cut.sample != 16
    np.testing.assert_array_equal(rest[-1].sample[known], cut.sample[known])


def test_the_counts_of_a_whole_run_are_what_they_were() -> None:
    assert CosineMask(vocabulary=16).masked(196, 8) == [192, 181, 162, 138, 108, 75, 38, 0]


def test_the_timesteps_that_are_left_of_a_discrete_schedule() -> None:
    schedule = LinearBeta()
    assert ScaledLinearBeta().times(3, 334).tolist() == [334, 167, 1, 0]
    assert VpSde().times(3, 333.0).tolist() == [333, 222, 111, 0]
    whole = schedule.times(10)
    assert schedule.times(3, whole[5]).tolist() == [whole[5], 222, 0, -1]
    assert schedule.times(1, whole[5]).tolist() == [whole[5], -1]
