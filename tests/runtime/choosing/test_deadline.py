"""Pictures on time, on machines that drift, throttle, hiccup and jump."""

import gc
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Machine, described, pipeline, run_seconds

from elastic_runtime import Budget, Deadline, ElasticPipeline, Result, UnreachableError, UsageError

STEPS = 20
FASTEST, SLOWEST = STEPS * run_seconds(4), STEPS * run_seconds(64)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine is another one, though they have one name: no calibration outlives its test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def draw(pipe: ElasticPipeline, seconds: float, steps: int = STEPS, **options: Any) -> Result:
    """One unguided picture by a deadline; its `seconds` are the machine's."""
    policy = options.pop("policy", None) or Deadline(seconds)
    return pipe(1, num_inference_steps=steps, policy=policy, generator=np.random.default_rng(0), output_type="latent", **options)


def latents(result: Result) -> list[int]:
    return [step.budget["latents"] for step in result.steps]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.85])
def test_a_steady_machine_is_used_well_and_the_picture_is_on_time(share: float) -> None:
    seconds = FASTEST + share * (SLOWEST - FASTEST)
    result = draw(pipeline(Machine()), seconds)
    assert 0.85 * seconds < result.seconds <= seconds
    assert len(result.steps) == STEPS
    assert result.steps[-1].next_time == 0


def test_more_time_than_the_best_budget_takes_gives_the_best_budget() -> None:
    result = draw(pipeline(Machine()), 3 * SLOWEST)
    assert set(latents(result)) == {64}


def test_time_that_is_saved_goes_to_the_cleaner_steps() -> None:
    result = draw(pipeline(Machine()), (FASTEST + SLOWEST) / 2)
    assert np.mean(latents(result)[-5:]) >= np.mean(latents(result)[:5])


def test_a_machine_that_slows_down_midway_spreads_the_rest_over_fewer_steps() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018  before the machine slows down
    begun, seconds = machine.now, 1.3 * FASTEST
    machine.slowness = lambda now: 3.0 if now > begun + seconds / 2 else 1.0
    result = draw(pipe, seconds)
    assert result.seconds <= seconds
    assert len(result.steps) < STEPS
    assert (result.steps[0].time, result.steps[-1].next_time) == (1.0, 0.0)
    assert [step.index for step in result.steps] == list(range(len(result.steps)))
    assert all(a.next_time == b.time for a, b in zip(result.steps, result.steps[1:], strict=False))


def test_steps_come_back_when_the_machine_recovers() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    begun, seconds = machine.now, 1.6 * FASTEST
    machine.slowness = lambda now: 4.0 if begun + 0.2 * seconds < now < begun + 0.3 * seconds else 1.0
    result = draw(pipe, seconds)
    assert 0.75 * seconds < result.seconds <= seconds
    assert len(result.steps) > 14


def test_a_deadline_below_the_fastest_budget_takes_fewer_steps_from_the_start() -> None:
    result = draw(pipeline(Machine()), 0.6 * FASTEST)
    assert result.seconds <= 0.6 * FASTEST
    assert 4 <= len(result.steps) < 0.6 * STEPS
    assert result.steps[0].next_time < 1 - 1 / STEPS


def test_an_unreachable_deadline_is_refused_before_the_first_step_with_the_nearest() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    nearest = 4 * run_seconds(4)
    with pytest.raises(UnreachableError, match=rf"the nearest that is reachable is {1e3 * nearest:.0f} ms, 4 steps at latents=4"):
        draw(pipe, 0.9 * nearest)
    calibrated = machine.now
    with pytest.raises(UnreachableError):
        draw(pipe, 0.5 * nearest)
    assert machine.now == calibrated  # not one run more
    assert draw(pipe, 1.05 * nearest).seconds <= 1.05 * nearest


def test_a_machine_that_was_slow_before_is_met_with_steps_that_a_sampler_cannot_give_up_later() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    machine.slowness = lambda now: 2.0
    draw(pipe, 4 * SLOWEST, sampler="sde")
    result = draw(pipe, 1.2 * FASTEST, sampler="sde")
    assert result.seconds <= 1.2 * FASTEST
    assert len(result.steps) < STEPS


def test_a_late_picture_is_finished_and_not_made_worse_than_the_fewest_steps() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    machine.slowness = lambda now: 50.0
    result = draw(pipe, FASTEST)
    assert result.seconds > FASTEST
    assert 4 <= len(result.steps) <= 6
    assert result.steps[-1].reason.endswith("as fast as it goes")


def test_what_a_caller_does_between_steps_is_no_sign_of_a_slow_machine_to_the_next_picture() -> None:
    machine = Machine()
    pipe = pipeline(machine)

    def paused(*_: object) -> dict[str, Any]:
        machine.advance(SLOWEST)
        return {}

    draw(pipe, 2 * SLOWEST, callback_on_step_end=paused)
    assert pipe.gauge.pace == pytest.approx(1, rel=0.05)


def test_every_step_says_what_was_predicted_and_why() -> None:
    result = draw(pipeline(Machine()), SLOWEST)
    assert all(step.predicted == pytest.approx(step.seconds, rel=0.02) for step in result.steps)
    assert "ms left for 20 steps at pace 1.00" in result.steps[0].reason


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_samplers_with_guidance_on_a_part_of_the_times(sampler: str) -> None:
    pipe = pipeline(Machine())
    whole = draw(pipe, 100.0, guidance_scale=2.0, guidance_interval=(0.3, 0.8), sampler=sampler).seconds
    for share in (0.75, 0.9):
        result = draw(pipe, share * whole, guidance_scale=2.0, guidance_interval=(0.3, 0.8), sampler=sampler)
        assert 0.8 * share * whole < result.seconds <= share * whole


def test_a_cheaper_weak_branch_stays_as_it_was_given() -> None:
    policy = Deadline(SLOWEST, guidance_budget=Budget(latents=8))
    result = draw(pipeline(Machine()), 0.0, policy=policy, guidance_scale=2.0)
    assert {step.guidance_budget for step in result.steps} == {Budget(latents=8)}
    assert min(latents(result)) >= 8
    assert result.seconds <= SLOWEST


def test_autoguidance_never_meets_a_strong_branch_that_is_no_stronger() -> None:
    policy = Deadline(1.2 * FASTEST, guidance_budget=Budget(latents=8))
    result = draw(pipeline(Machine()), 0.0, policy=policy, guidance_scale=2.0, autoguidance=True)
    assert min(latents(result)) > 8


def test_budgets_that_are_no_better_are_never_paid_for() -> None:
    rows = described().quality
    level = tuple(msgspec.structs.replace(row, accuracy=min(row.accuracy, 0.9)) for row in rows)
    assert set(latents(draw(pipeline(Machine(), quality=level), 10.0))) == {16}


@pytest.mark.parametrize("jump", [-50.0, 50.0, math.inf])
def test_a_clock_that_jumps_leaves_a_whole_picture(jump: float) -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    reads = 0

    def clock() -> float:
        nonlocal reads
        reads += 1
        return machine.now + (jump if reads > 20 else 0)

    pipe._clock = clock
    result = draw(pipe, SLOWEST)
    assert (result.steps[0].time, result.steps[-1].next_time) == (1.0, 0.0)
    assert 4 <= len(result.steps) <= STEPS
    assert 1 / 8 <= pipe.gauge.pace <= 8
    pipe._clock = machine.clock
    for _ in range(3):
        result = draw(pipe, SLOWEST)
    assert result.seconds <= SLOWEST


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon", True])
def test_a_deadline_is_a_number_of_seconds_above_zero(seconds: Any) -> None:
    with pytest.raises(UsageError, match="a deadline must be a number of seconds above zero"):
        Deadline(seconds)


@pytest.mark.parametrize("options", [{"margin": 1.0}, {"margin": -0.1}, {"least_steps": 0}, {"least_steps": 2.5}])
def test_odd_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Deadline(1.0, **options)


def test_a_policy_is_shared_and_keeps_nothing() -> None:
    policy = Deadline(SLOWEST)
    first, second = pipeline(Machine()), pipeline(Machine(lambda now: 2.0))
    alone = latents(draw(pipeline(Machine()), 0.0, policy=policy))
    draw(second, 0.0, policy=policy)
    assert latents(draw(first, 0.0, policy=policy)) == alone


@given(
    share=st.floats(0, 1), jitter=st.floats(0, 0.15), slow=st.floats(1, 2.5), when=st.floats(0.2, 0.6), seed=st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=25)
def test_whatever_slows_the_machine_the_grid_ends_at_zero_and_budgets_are_offered(
    share: float, jitter: float, slow: float, when: float, seed: int
) -> None:
    machine = Machine(jitter=jitter, seed=seed)
    pipe = pipeline(machine)
    seconds, begun = 1.1 * FASTEST + share * (SLOWEST - FASTEST), machine.now
    machine.slowness = lambda now: slow if now > begun + when * seconds else 1.0
    result = draw(pipe, seconds)
    assert result.steps[-1].next_time == 0
    assert [step.time for step in result.steps] == sorted((step.time for step in result.steps), reverse=True)
    assert len(result.steps) <= STEPS
    assert set(latents(result)) <= set(range(4, 65, 4))


def test_five_hundred_pictures_keep_the_word_and_memory_does_not_grow() -> None:
    """95 % arrive and 80 % of the time is used, on a machine that drifts, throttles, and gets a busy neighbour in every other picture."""
    machine, source, steps = Machine(jitter=0.05), np.random.default_rng(1), 16
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    fastest, slowest, begun = steps * run_seconds(4), steps * run_seconds(64), machine.now
    arrived, uses, sizes = [], [], []
    for i in range(500):
        seconds = source.uniform(1.1 * fastest, slowest)
        neighbour = machine.now + seconds / 2 if i % 2 else math.inf

        def slowness(now: float, neighbour: float = neighbour) -> float:
            drift = 1 + 0.1 * math.sin((now - begun) / 5)
            return drift * (1.3 if (now - begun) % 8 > 4 else 1.0) * (1.8 if now > neighbour else 1.0)

        machine.slowness = slowness
        result = draw(pipe, seconds, steps)
        arrived.append(result.seconds <= seconds)
        uses.append(min(result.seconds / seconds, 1))
        if i in (100, 499):
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert np.mean(arrived) >= 0.95
    assert np.mean(uses) >= 0.8
    assert sizes[1] - sizes[0] < 100
