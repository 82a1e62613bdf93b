"""Policies among plans, on a machine of known arithmetic: the headline for models that are drawn along plans."""

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Machine
from simulated_plans import DECODE, described, pipeline, plan_seconds, run_seconds

from elastic_runtime import (
    Auto,
    Budget,
    BudgetError,
    Deadline,
    ElasticPipeline,
    FitLatency,
    FitMemory,
    PerStep,
    Plan,
    Quality,
    Request,
    Result,
    Span,
    UnreachableError,
    UsageError,
)
from elastic_runtime.ralu.plan import PRESETS

FULL = plan_seconds((50,), (64,))
FOUR = plan_seconds((5, 6, 7), (16, 28, 64))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def draw(pipe: ElasticPipeline, policy: Any, **options: Any) -> Result:
    return pipe(1, policy=policy, generator=np.random.default_rng(0), **options)


def steps(result: Result) -> tuple[int, ...]:
    assert result.plan is not None
    return result.plan.steps


def test_the_nearest_time_is_that_of_the_cheapest_plan_with_enough_steps() -> None:
    pipe = pipeline(Machine())
    for least, message in ((14, "14 steps at speed"), (6, "6 steps at speed")):
        with pytest.raises(UnreachableError, match=message):
            draw(pipe, Deadline(0.001, least_steps=least))


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.7)}])
def test_ways_to_draw_are_weighed_once_for_each_kind_of_picture(guidance: dict[str, Any]) -> None:
    pipe = pipeline(Machine())
    first, again, other = (
        pipe.outlook(Request(class_labels=label, policy=Auto(), seeds=(label,), height=side, width=side, **guidance))
        for label, side in ((1, 64), (2, 64), (2, 128))
    )
    frontier = first.frontier()
    assert again.frontier() is frontier
    assert other.frontier() != frontier
    for option, seconds in frontier.items():
        assert seconds == pytest.approx(first.over(option, first.course(option)))


def test_a_larger_picture_takes_longer_to_finish() -> None:
    pipe = pipeline(Machine())
    small, large = (pipe.outlook(Request(class_labels=1, policy=Auto(), height=side, width=side)) for side in (64, 128))
    assert small.finish == pytest.approx(DECODE)
    assert large.finish == pytest.approx(4 * DECODE)
    option = next(option for option in small.options() if option.name == "4x")
    assert large.entering(option) == pytest.approx(4 * small.entering(option))
    assert small.entering(option) > 0


@pytest.mark.parametrize("sides", [Span(16, 16), Span(16, 32), Span(12, 14)])
def test_a_deadline_is_kept_by_a_bundle_whose_decoder_takes_no_previews(sides: Span) -> None:
    whole = described()
    decoder = msgspec.structs.replace(whole.graphs["decoder"], dimensions=whole.graphs["decoder"].dimensions | {"h": sides, "w": sides})
    pipe = pipeline(Machine(), whole=msgspec.structs.replace(whole, graphs=whole.graphs | {"decoder": decoder}))
    upscale = pipe.bundle.manifest.model.vae.upscale  # type: ignore[union-attr]
    side = min(sides.max, 16) * upscale
    result = draw(pipe, Deadline(0.2), plan="full", height=side, width=side)
    assert result.seconds <= 0.2


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_deadline_is_kept_and_its_time_is_used(share: float, guidance: float) -> None:
    pipe = pipeline(Machine())
    seconds = (0.06 + share * FULL) * guidance
    result = draw(pipe, Deadline(seconds), guidance_scale=guidance)
    assert result.seconds <= seconds
    assert result.seconds > 0.8 * seconds
    assert result.steps[-1].next_time == 0
    assert all(step.predicted == pytest.approx(step.seconds, rel=0.2) for step in result.steps)


def test_the_plan_and_its_steps_follow_the_time_that_there_is() -> None:
    short, middle, long = (draw(pipeline(Machine()), Deadline(seconds)) for seconds in (0.05, 0.14, 0.3))
    assert (short.facts["plan"].partition(",")[0], sum(steps(short))) < ("8", 20)
    assert sum(steps(short)) < sum(steps(middle)) < sum(steps(long))
    assert middle.facts["plan"].startswith("4x")


def test_a_machine_that_slows_down_takes_fewer_steps_in_the_stages_still_to_come() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018  before the machine slows down
    seconds = 1.5 * FOUR
    planned = sum(steps(draw(pipeline(Machine()), Deadline(seconds))))
    begun = machine.now
    machine.slowness = lambda now: 2.5 if now > begun + seconds / 3 else 1.0
    result = draw(pipe, Deadline(seconds))
    assert result.seconds <= seconds
    assert 4 <= len(result.steps) < planned
    assert {step.stage for step in result.steps} == {0, 1, 2}
    times = [(step.time, step.next_time) for step in result.steps if step.stage == 2]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(times))
    assert times[-1][1] == 0


def test_a_machine_that_is_slow_before_the_first_step_takes_a_cheaper_plan() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    fast = draw(pipe, Deadline(1.5 * FOUR))
    pipe.gauge.pace = 3.0  # as after a picture on a machine that has become three times as slow
    machine.slowness = lambda now: 3.0
    slow = draw(pipe, Deadline(1.5 * FOUR))
    assert slow.seconds <= 1.5 * FOUR
    assert sum(step.budget["tokens"] for step in slow.steps) < sum(step.budget["tokens"] for step in fast.steps) / 2


def test_an_unreachable_deadline_names_the_nearest() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    nearest = plan_seconds((3, 1), (16, 64)) + DECODE  # nothing is previewed where the spectrum grows
    with pytest.raises(UnreachableError, match=r"the nearest that is reachable is \d+ ms, 4 steps at speed, 3\+1 steps"):
        draw(pipe, Deadline(0.8 * nearest))
    assert draw(pipe, Deadline(1.2 * nearest)).seconds <= 1.2 * nearest


def test_a_plan_that_is_named_is_kept_and_its_steps_are_chosen() -> None:
    for name, stages in (("7x", 3), ("4x", 3), ("speed", 2), ("full", 1)):
        result = draw(pipeline(Machine()), Deadline(0.2), plan=name)
        assert (result.facts["plan"].partition(",")[0], len(steps(result))) == (name, stages)
    own = Plan((2, 2, 3), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)
    assert draw(pipeline(Machine()), Deadline(0.3), plan=own).facts["plan"].startswith("own")
    asked = draw(pipeline(Machine()), Deadline(10.0), plan="full", num_inference_steps=12)
    assert steps(asked) == (12,), "more than was asked for is never taken"


@pytest.mark.parametrize(("plan", "asked"), [("full", 4), ("full", 10), ("speed", 10)])
@pytest.mark.parametrize("graded", [True, False])
def test_steps_that_are_asked_for_are_taken_and_no_others(plan: str, asked: int, graded: bool) -> None:
    for policy in (
        Auto(),
        Auto(0.5),
        FitMemory(1e9),
        FitLatency(60.0),
        Deadline(60.0),
        *([Quality(0.5)] if graded and plan == "full" else []),
    ):
        result = draw(pipeline(Machine(), graded), policy, plan=plan, num_inference_steps=asked, output_type="latent")
        assert sum(steps(result)) == asked, policy
    with pytest.raises(UnreachableError, match=r"the nearest is 9\d\.\d%, at full, 10 steps"):
        draw(pipeline(Machine()), Quality(0.99), plan="full", num_inference_steps=10)


@pytest.mark.parametrize(("floor", "name"), [(0.99, "4x"), (0.97, "full, 20 steps"), (0.72, "7x, 1+1+2 steps"), (0.9, "7x")])
def test_quality_is_the_cheapest_graded_way_that_keeps_it(floor: float, name: str) -> None:
    machine = Machine()
    pipe = pipeline(machine)
    result = draw(pipe, Quality(floor), output_type="latent")
    allowed = {name} if name != "4x" else {"4x", "4x, 15+18+21 steps"}
    if floor == 0.97:
        allowed = {"full, 20 steps", "4x"}
    assert result.facts["plan"] in allowed
    assert "of the best accuracy" in result.steps[0].reason


def test_quality_needs_a_table_and_says_which() -> None:
    with pytest.raises(UsageError, match=r"no quality table \(accuracy by plan\), so .* kept: name a plan, or .*/evaluate_plans"):
        draw(pipeline(Machine(), graded=False), Quality(0.9))


def test_without_a_table_the_reason_says_what_stood_in() -> None:
    result = draw(pipeline(Machine(), graded=False), Deadline(0.2))
    assert "the card has no quality table (accuracy by plan), so what takes more counts as better" in result.steps[0].reason
    auto = draw(pipeline(Machine(), graded=False), Auto())
    assert auto.plan == PRESETS["4x"]
    assert "is the default: the card has no quality table (accuracy by plan)" in auto.steps[0].reason


def test_auto_is_the_cheapest_of_almost_the_best_and_measures_nothing() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    begun = machine.now
    result = draw(pipe, Auto(0.96), output_type="latent")
    assert result.plan == PRESETS["4x"]
    assert machine.now - begun == pytest.approx(FOUR + DECODE / 4)


def test_auto_takes_nothing_that_is_recognised_and_looks_worse() -> None:
    rows = tuple(
        msgspec.structs.replace(row, accuracy=0.95, frechet_distance=60.0 if sum(row.steps or ()) < 10 else 40.0)
        for row in described().quality
    )
    whole = msgspec.structs.replace(described(), quality=rows)
    assert draw(pipeline(Machine(), whole=whole), Auto()).plan == PRESETS["7x"]
    assert sum(steps(draw(pipeline(Machine(), whole=whole), Quality(0.99)))) < 10, "which promises accuracy alone"


def test_latency_and_memory_choose_among_plans() -> None:
    result = draw(pipeline(Machine()), FitLatency(1.1 * FOUR + 2 * DECODE))
    assert result.seconds <= 1.1 * FOUR + 2 * DECODE
    assert "allowed" in result.steps[0].reason
    with pytest.raises(UnreachableError, match=r"are too few for 4 steps: .* at speed, 3\+1 steps\. Allow that, or draw a smaller"):
        draw(pipeline(Machine()), FitLatency(0.001))
    assert draw(pipeline(Machine()), FitMemory(1e9)).plan == Plan((15, 18, 21), *(getattr(PRESETS["4x"], name) for name in (
        "end_times", "shifts", "z", "up_ratio")))  # fmt: skip
    with pytest.raises(UnreachableError, match=r"Allow that much, or draw a smaller picture, or fewer at once\."):
        draw(pipeline(Machine()), FitMemory(90e6))


def test_predictions_of_whole_pictures_are_those_of_the_machine() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    for count, guidance in ((1, 1.0), (1, 3.0), (3, 2.0)):
        for policy in (FitLatency(5.0), FitLatency(0.5 * count * guidance), Deadline(1.0 * count * guidance)):
            begun = machine.now
            result = pipe([1] * count, policy=policy, guidance_scale=guidance)
            predicted = sum(step.predicted or 0.0 for step in result.steps)
            if predicted:
                assert predicted == pytest.approx(machine.now - begun - DECODE * count, rel=0.05)


def test_what_a_plan_was_compiled_for_limits_the_choice() -> None:
    pipe = pipeline(Machine())
    session = pipe.session("denoiser")
    session.budgets = tuple(Budget(tokens=count, T=1) for count in (16, 19, 64))
    assert {draw(pipe, Deadline(seconds)).facts["plan"].partition(",")[0] for seconds in (0.06, 0.3)} <= {"7x", "full"}
    session.budgets = (Budget(tokens=30, T=1),)
    with pytest.raises(BudgetError, match="was compiled for 30 image tokens"):
        draw(pipe, Deadline(0.3))


def test_policies_of_budgets_are_refused_with_what_fits() -> None:
    pipe = pipeline(Machine())
    for policy in (Deadline(1.0, Budget(tokens=16)), Auto(guidance_budget=Budget(tokens=16))):
        with pytest.raises(UsageError, match="leave guidance_budget out"):
            draw(pipe, policy)
    with pytest.raises(UsageError, match=r"as many tokens as its plan and the picture's size say|budgets by step are for"):
        draw(pipe, PerStep((Budget(tokens=16),)))
    for name, value in (("budget", Budget(tokens=16)), ("drop_fraction", 0.5), ("sampler", "heun"), ("autoguidance", True)):
        with pytest.raises(UsageError, match=f"{name} does not fit tiny, which draws along a plan"):
            pipe(1, **{name: value})


@given(
    share=st.floats(0, 1), jitter=st.floats(0, 0.1), slow=st.floats(1, 2.0), when=st.floats(0.2, 0.6), seed=st.integers(0, 99),
    count=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=25)
def test_whatever_slows_the_machine_the_picture_is_whole(
    share: float, jitter: float, slow: float, when: float, seed: int, count: int
) -> None:
    machine = Machine(jitter=jitter, seed=seed)
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    seconds, begun = count * (0.06 + share * FULL), machine.now
    machine.slowness = lambda now: slow if now > begun + when * seconds else 1.0
    result = pipe([0] * count, policy=Deadline(seconds), output_type="latent")
    assert result.images.shape == (count, 4, 16, 16)
    assert np.abs(result.images).max() < 1e-5, "the exact velocity of straight paths leads to the empty picture in any steps"
    assert result.steps[-1].next_time == 0
    assert [step.index for step in result.steps] == list(range(len(result.steps)))


def test_two_hundred_pictures_keep_the_word() -> None:
    """95 % arrive and 80 % of the time is used, on a machine that drifts and gets a busy neighbour in every other picture."""
    machine, source = Machine(jitter=0.05), np.random.default_rng(1)
    pipe = pipeline(machine)
    pipe.gauge.calibrated  # noqa: B018
    begun, arrived, uses = machine.now, [], []
    for i in range(200):
        seconds = source.uniform(0.08, FULL)
        neighbour = machine.now + seconds / 2 if i % 2 else math.inf

        def slowness(now: float, neighbour: float = neighbour) -> float:
            return (1 + 0.1 * math.sin((now - begun) / 5)) * (1.8 if now > neighbour else 1.0)

        machine.slowness = slowness
        result = draw(pipe, Deadline(seconds))
        arrived.append(result.seconds <= seconds)
        uses.append(min(result.seconds / seconds, 1))
    assert np.mean(arrived) >= 0.95
    assert np.mean(uses) >= 0.8


def test_many_steps_are_planned_within_the_time() -> None:
    """Planning is no part of the machine's time here, so the clock is the wall's: it has to be done at all."""
    from time import perf_counter

    from simulated import pipeline as budgets

    machine = Machine()
    pipe = budgets(machine)
    pipe.gauge.calibrated  # noqa: B018
    begun = perf_counter()
    pipe(1, num_inference_steps=3000, policy=Deadline(0.5), output_type="latent")
    assert perf_counter() - begun < 20


def test_a_card_of_other_plans_grades_nothing() -> None:
    rows = tuple(msgspec.structs.replace(row, plan="5x") for row in described().quality)
    with pytest.raises(UsageError, match="no quality table"):
        draw(pipeline(Machine(), whole=msgspec.structs.replace(described(), quality=rows)), Quality(0.9))
    assert run_seconds(64) > run_seconds(16)
