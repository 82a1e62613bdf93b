import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Plan, UsageError
from elastic_runtime.ralu.offers import speed
from elastic_runtime.ralu.plan import PRESETS, full, preset, restart, sigmas

GOOD: dict[str, Any] = {"steps": (5, 6, 7), "end_times": (0.3, 0.45, 1.0), "shifts": (5.0, 2.6, 2.2), "z": 6.3, "up_ratio": 0.3}

plans = st.builds(
    lambda steps, ends, shifts, z, ratio: Plan(tuple(steps), (*sorted(ends), 1.0), tuple(shifts), z, ratio),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2, unique_by=lambda end: round(end, 3)),
    st.lists(st.floats(0.5, 10), min_size=3, max_size=3),
    st.floats(2, 100),
    st.floats(0.01, 0.99),
)


@given(plans)
def test_stages_meet_at_a_step_back_in_time_and_sigmas_fall(plan: Plan) -> None:
    stages = plan.stages()
    assert [stage.steps for stage in stages] == list(plan.steps)
    assert (stages[0].sigmas[0], stages[-1].sigmas[-1]) == (1.0, 0.0)
    for stage in stages:
        assert stage.sigmas[0] == pytest.approx(1 - stage.start)
        assert stage.sigmas[-1] == pytest.approx(1 - stage.end)
        assert all(late < early for early, late in pairwise(stage.sigmas))
    for before, after in pairwise(stages):
        assert 0 < after.start < before.end


@given(st.floats(0.01, 0.99), st.floats(2, 100))
def test_renoising_gives_the_noise_and_the_picture_that_the_time_has(end: float, z: float) -> None:
    """A grown block of four equal tokens holds `end x_0 + (1 - end) eps`; after it, noise of the next time, white but for the slack."""
    start, alpha, beta = restart(end, z)
    assert beta * end == pytest.approx(start)
    covariance = beta**2 * (1 - end) ** 2 * np.ones((4, 4)) + alpha**2 * (np.eye(4) - np.ones((4, 4)) / z**2)
    np.testing.assert_allclose(covariance, (1 - start) ** 2 * np.eye(4), atol=1e-12)


@given(plans)
def test_without_renoising_stages_meet_where_the_one_before_ended(plan: Plan) -> None:
    stages = replace(plan, renoise=False).stages()
    assert [(stage.alpha, stage.beta) for stage in stages] == [(0, 1)] * 3
    assert all(before.sigmas[-1] == pytest.approx(after.sigmas[0]) for before, after in pairwise(stages))
    assert (stages[0].sigmas[0], stages[-1].sigmas[-1]) == (1.0, 0.0)


def test_sigmas_by_hand() -> None:
    assert sigmas(0.0, 1.0, 4, 1.0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    # shifted by 3: 3s / (1 + 2s) of the even ones
    assert sigmas(0.0, 1.0, 4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    # from sigma 0.9 to 0.5 with shift 3: even from 0.75 to 0.25
    assert sigmas(0.1, 0.5, 2, 3.0) == pytest.approx((0.9, 0.75, 0.5))


def test_the_presets_grow_what_the_paper_grows_at_1024_px() -> None:
    assert PRESETS["4x"].tokens(64, 64) == (1024, 1945, 4096)
    assert PRESETS["7x"].tokens(64, 64) == (1024, 1330, 4096)
    assert PRESETS["7x"].step_tokens(64, 64) == (1024,) * 2 + (1330,) * 3 + (4096,) * 5
    assert preset("4x").total == 18
    with pytest.raises(UsageError, match=r"no plan '5x'; there are 4x, 7x, full, speed, mrflow"):
        preset("5x")


def test_full_sampling_follows_the_model_s_scheduler() -> None:
    assert full(4, 4096, {}).stages()[0].sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert full(28, 4096, {"shift": 3.0}).shifts == (3.0,)
    flux = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    assert [full(28, tokens, flux).shifts[0] for tokens in (256, 4096)] == pytest.approx([math.exp(0.5), math.exp(1.15)])
    assert full(28, 4096, flux | {"time_shift_type": "linear"}).shifts == pytest.approx((1.15,))
    assert full(7, 64, {}).tokens(8, 8) == (64,)
    assert full(7, 64, {}).plain


def test_flux_2_s_shift_goes_with_the_steps() -> None:
    known = {"use_dynamic_shifting": True, "mu": "empirical"}
    plan = full(50, 4096, known)
    assert plan.shifts[0] == pytest.approx(7.564, rel=1e-4)
    assert plan.spread(4) == full(4, 4096, known)
    assert plan.alike(full(4, 4096, known))
    assert not plan.alike(full(50, 4000, known))
    assert plan.stages()[0].spaced(4) == full(4, 4096, known).stages()[0].sigmas
    assert full(4, 4096, known | {"mu": 1.15}).shifts == pytest.approx((math.exp(1.15),))
    assert full(4, 4096, {"mu": "empirical"}).shifts == (1.0,)
    for wrong in ("dynamic", True, 21.0, math.nan):
        with pytest.raises(UsageError, match="the scheduler's mu is a number of at most 20 or 'empirical'"):
            full(4, 4096, known | {"mu": wrong})
    with pytest.raises(UsageError, match="FLUX.2's rule spaces 5,000 steps as no model was drawn"):
        full(5000, 1024, known)
    for wrong in (0, -1, 1.5, True, 10**6):
        with pytest.raises(UsageError, match="a plan's empirical is the number of image tokens"):
            Plan((4,), empirical=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="least, terminal and empirical are of plain sampling"):
        Plan((5, 6, 7), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 6.3, 0.3, empirical=4096)


@pytest.mark.parametrize("size", [256, 1024, 4096])
def test_full_sampling_visits_diffusers_own_sigmas(size: int) -> None:
    """FLUX's pipeline gives its scheduler evenly spaced sigmas, which it shifts by the size."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers' scheduler")
    config = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    steps, exponent = 9, 0.5 + (1.15 - 0.5) * (size - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=exponent)
    np.testing.assert_allclose(full(steps, size, config).stages()[0].sigmas, scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_times": (0.45, 0.3, 1.0)}, "end times rise from above 0, got (0.45, 0.3, 1.0)"),
        ({"end_times": (0.3, 0.3, 1.0)}, "end times rise"),
        ({"end_times": (0.0, 0.3, 1.0)}, "end times rise from above 0"),
        ({"end_times": (0.3, 0.45, 0.9)}, "the last end time is 1, the finished picture, got 0.9"),
        ({"end_times": (0.3, 0.45, 1.1)}, "the last end time is 1, the finished picture, got 1.1"),
        ({"end_times": (0.3, 1.0)}, "an end time for each of its 3 stages"),
        ({"end_times": (0.3, "a", 1.0)}, "end times are numbers, got 'a'"),
        ({"end_times": (float("nan"), 0.4, 1.0)}, "end times rise"),
        ({"steps": (5, 0, 7)}, "at least 1 step, got 0"),
        ({"steps": (5, 6, 7, 8)}, "a plan has 1 to 3 stages, the last at full resolution; got steps for 4"),
        ({"steps": (5, 6.5, 7)}, "whole number, got 6.5"),
        ({"steps": 18}, "steps are a tuple, one value a stage, got 18"),
        ({"shifts": (5.0, 2.6)}, "a shift for each of its 3 stages"),
        ({"shifts": (5.0, 0.0, 2.2)}, "shifts are above 0, got 0.0"),
        ({"z": 1.9}, "needs z of 2 or more, got 1.9"),
        ({"z": None}, "needs z of 2 or more, got None"),
        ({"up_ratio": 0}, "up_ratio lies between 0 and 1, got 0 (with 0 the mixed stage would be the low one again)"),
        ({"up_ratio": 1.0}, "got 1.0 (with 1 nothing is left to grow in the last stage)"),
        ({"up_ratio": -0.1}, "up_ratio lies between 0 and 1, got -0.1"),
        ({"up_ratio": None}, "up_ratio lies between 0 and 1, got None"),
        (
            {"steps": (9,), "end_times": (1.0,), "shifts": (1.0,)},
            "z, up_ratio and renoise are of a plan of 3 stages, whose patches grow, got 1",
        ),
        (
            {"steps": (9,), "end_times": (1,), "shifts": (1,), "z": None, "up_ratio": None, "renoise": False},
            "z, up_ratio and renoise are of",
        ),
    ],
)
def test_a_wrong_plan_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Plan(**GOOD | changes)


@given(st.integers(4, 4096), st.floats(0.001, 0.999))
def test_as_many_patches_grow_as_the_ratio_says_or_it_is_refused(patches: int, ratio: float) -> None:
    plan = Plan(**GOOD | {"up_ratio": ratio})
    if int(patches * ratio) == 0:
        with pytest.raises(UsageError, match="grows 0: take a larger picture"):
            plan.grown(patches)
    else:
        assert plan.grown(patches) == int(patches * ratio) < patches


def test_a_plan_is_written_as_code() -> None:
    assert eval(repr(PRESETS["4x"])) == PRESETS["4x"]
    assert Plan([3, 4, 5], [0.2, 0.4, 1], [3, 3, 3], 4, 0.5).steps == (3, 4, 5)  # type: ignore[arg-type]


@given(st.integers(2, 60), st.floats(0.5, 25), st.floats(0.05, 0.95), st.sampled_from([{}, {"sigma_min": 0.003}, {"shift_terminal": 0.02}]))
def test_speed_takes_the_steps_above_its_transition_at_half_the_sides(
    steps: int, shift: float, transition: float, ends: dict[str, float]
) -> None:
    plan = speed(steps, 64, {"shift": shift} | ends, transition)
    low, high = plan.stages()
    assert plan.total == steps
    assert plan.tokens(8, 8) == (16, 64)
    assert (low.sigmas[0], low.sigmas[-1], high.sigmas[-1]) == (1.0, pytest.approx(transition), 0.0)
    assert high.sigmas[0] == pytest.approx(2 * transition / (1 + transition))
    assert all(late < early for stage in (low, high) for early, late in pairwise(stage.sigmas))
    assert high.spaced(high.steps) == high.sigmas == high.spaced(high.steps, high.sigmas[0])
    if ends.get("shift_terminal") and high.steps > 1:
        assert high.sigmas[-2] == pytest.approx(0.02)
    assert [stage.sigmas[0] for stage in plan.spread(steps + 5).stages()] == [low.sigmas[0], high.sigmas[0]]


def test_speed_goes_on_at_the_times_that_the_schedule_has_left() -> None:
    whole = full(10, 64, {"shift": 2.0}).stages()[0].sigmas
    low, high = speed(10, 64, {"shift": 2.0}, whole[4]).stages()
    assert low.sigmas == pytest.approx(whole[:5])
    assert high.sigmas[1:] == pytest.approx(whole[5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 64, {}), "plan 'speed' takes a step at each of its two resolutions, got 1"),
        ((9, 64, {}, 1.0), "the transition is a sigma between 0 and 1, got 1.0"),
        ((9, 64, {"shift_terminal": 0.5}, 0.4), "the transition lies above the scheduler's last step, at sigma 0.5, got 0.4"),
        ((0, 64, {}), "at least 1 step"),
    ],
)
def test_speed_says_what_it_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        speed(*arguments)


@pytest.mark.parametrize(
    "changes",
    [{"growth": "patches"}, {"z": 3.0}, {"up_ratio": 0.3}, {"growth": "pixels"}, {"again": 0.3}, {"steps": (2, 2, 2)}, {"least": 2.0}],
)
def test_a_plan_of_two_stages_has_no_more_than_it_needs(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(**{"steps": (2, 3), "end_times": (0.25, 1.0), "shifts": (2.0, 2.0), "growth": "spectrum"} | changes)
