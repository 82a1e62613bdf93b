"""Policies that settle before the first step, on a machine of known arithmetic."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from recordings import GIB, MACHINES, meminfo
from simulated import HELD, Machine, described, pipeline, run_seconds

from elastic_runtime import (
    Auto,
    Budget,
    Deadline,
    ElasticPipeline,
    FitLatency,
    FitMemory,
    Fixed,
    MissingError,
    PerStep,
    Plan,
    Policy,
    Quality,
    Result,
    Span,
    UnreachableError,
    UsageError,
)
from elastic_runtime.choosing.cost import RESERVED
from elastic_runtime.choosing.estimates import Outlook
from elastic_runtime.choosing.option import Choice
from elastic_runtime.device import Memory, memory_now


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("floor", [0, -1, 5, "x", True])
def test_a_floor_is_a_share(floor: Any) -> None:
    for policy in (Auto, Quality):
        with pytest.raises(UsageError, match="is a share of the best, above 0 and at most 1"):
            policy(floor)


def test_the_stochastic_sampler_is_never_asked_for_one_step() -> None:
    with pytest.raises(UnreachableError, match="or use a Deadline"):
        pipeline(Machine())(1, policy=FitLatency(1e-4), sampler="sde", output_type="latent")


def draw(pipe: ElasticPipeline, policy: Policy, **options: Any) -> Result:
    return pipe(1, num_inference_steps=4, policy=policy, generator=np.random.default_rng(0), output_type="latent", **options)


def chosen(pipe: ElasticPipeline, policy: Policy, **options: Any) -> int:
    (budget,) = {step.budget for step in draw(pipe, policy, **options).steps}
    return budget["latents"]


@pytest.mark.parametrize(("floor", "latents"), [(0.98 / 0.98, 64), (0.95 / 0.98, 32), (0.9 / 0.98, 16), (0.5, 4), (0.93 / 0.98, 28)])
def test_quality_is_the_cheapest_budget_that_keeps_it(floor: float, latents: int) -> None:
    machine = Machine()
    pipe = pipeline(machine)
    begun = machine.now
    assert chosen(pipe, Quality(floor)) == latents
    assert machine.now - begun == pytest.approx(4 * run_seconds(latents))  # nothing was measured


def test_quality_needs_a_table() -> None:
    with pytest.raises(UsageError, match="no quality table"):
        draw(pipeline(Machine(), graded=False), Quality(0.9))


def test_a_quality_that_the_offered_budgets_do_not_keep_is_refused_with_the_nearest() -> None:
    axis = described().axes[0].narrow(Span(4, 32))
    with pytest.raises(UnreachableError, match=r"keeps 99.0% of the best accuracy: the nearest is 96.9%, at latents=32"):
        draw(pipeline(Machine(), axes=(axis,)), Quality(0.99))


@pytest.mark.parametrize("latents", [4, 20, 44, 64])
def test_latency_is_the_best_budget_that_keeps_it(latents: int) -> None:
    assert chosen(pipeline(Machine()), FitLatency(4 * run_seconds(latents) * 1.001)) == latents


def test_latency_out_of_reach_names_what_is_reachable_and_how_many_steps_would_do() -> None:
    with pytest.raises(UnreachableError, match=r"5 ms are too few for 4 steps: the nearest .* is 9 ms, at latents=4.*take 2 steps"):
        draw(pipeline(Machine()), FitLatency(0.005))


def test_guidance_counts_twice_and_a_cheaper_weak_branch_leaves_more_to_the_strong_one() -> None:
    seconds = 4 * run_seconds(32, 2) * 1.001
    both = chosen(pipeline(Machine()), FitLatency(seconds), guidance_scale=2.0)
    assert both == 32
    weak = chosen(pipeline(Machine()), FitLatency(4 * (run_seconds(48) + run_seconds(4)) * 1.001, Budget(latents=4)), guidance_scale=2.0)
    assert weak == 48


def test_memory_is_the_best_budget_within_it() -> None:
    pipe = pipeline(Machine())
    both = 100_000_000 + RESERVED * 2 * 1000 * (100 + 40) * 1.001  # of guidance, in one run
    assert chosen(pipe, FitMemory(both), guidance_scale=2.0) == 40
    assert chosen(pipe, FitMemory(both)) == 64


def test_memory_below_what_the_weights_need_is_refused_with_what_would_do() -> None:
    needed = 100_000_000 + RESERVED * 1000 * 104
    with pytest.raises(UnreachableError, match=rf"the process holds 100 MB, and at latents=4 it needs {needed / 1e6:.0f} MB"):
        draw(pipeline(Machine()), FitMemory(90e6))


def test_auto_keeps_almost_the_best_quality_without_measuring() -> None:
    machine = Machine()
    pipe = pipeline(machine)
    begun = machine.now
    result = draw(pipe, Auto())
    assert result.steps[0].budget == Budget(latents=56)
    assert "of the best accuracy" in result.steps[0].reason
    assert machine.now - begun == pytest.approx(4 * run_seconds(56))


def test_auto_without_a_table_is_the_default() -> None:
    result = draw(pipeline(Machine(), graded=False), Auto())
    assert result.steps[0].budget == Budget(latents=64)
    assert "the default" in result.steps[0].reason


def test_auto_takes_what_memory_leaves() -> None:
    pipe = pipeline(Machine())
    recording = MACHINES["xeon"]
    short = type(recording)(system="Linux", machine="x86_64", files={**recording.files, "/proc/meminfo": meminfo(1, 900_000 / GIB)})
    pipe.gauge._memory = lambda: memory_now(short)
    result = draw(pipe, Auto())
    assert 4 <= result.steps[0].budget["latents"] < 56
    assert "largest that fits" in result.steps[0].reason
    nothing = pipeline(Machine())
    nothing.gauge._memory = lambda: Memory(total=GIB, available=0)
    with pytest.raises(UnreachableError, match="smallest budget, latents=4, needs"):
        draw(nothing, Auto())


def test_auto_asks_anew_what_memory_is_free() -> None:
    pipe = pipeline(Machine())
    assert chosen(pipe, Auto()) == 56
    pipe.gauge._memory = lambda: Memory(total=GIB, available=1000)
    with pytest.raises(UnreachableError, match="there are 0 MB of memory free"):
        draw(pipe, Auto())


def test_what_an_earlier_picture_left_in_the_process_is_free_for_the_next() -> None:
    gauge, taken = pipeline(Machine()).gauge, 0
    gauge._memory = lambda: Memory(total=GIB, available=1000)
    gauge._held = lambda: HELD + taken
    assert gauge.available == 1000
    with gauge.running():
        taken = 50_000
    assert gauge.available == 51_000
    taken = 80_000  # of which others have some
    assert gauge.available == 51_000
    taken = 0  # what was given back is free
    assert gauge.available == 1000
    gauge._held = lambda: None
    with gauge.running():
        pass
    assert gauge.available == 1000


def test_a_limit_of_memory_needs_a_system_that_tells_what_a_process_holds() -> None:
    pipe = pipeline(Machine())
    pipe.gauge.opened = None
    with pytest.raises(MissingError, match="this system does not tell how much memory a process holds"):
        draw(pipe, FitMemory(3e6))


def test_what_the_process_had_held_before_counts_where_it_was_more() -> None:
    pipe = pipeline(Machine())
    pipe.gauge.before = HELD + 50_000_000
    assert chosen(pipe, FitMemory(HELD + 50_000_000)) == 64
    with pytest.raises(UnreachableError, match="at latents=4 it needs 150 MB"):
        draw(pipe, FitMemory(HELD + 40_000_000))


@pytest.mark.parametrize("policy", [Fixed, lambda budget: PerStep((budget,)), *(
    lambda weak, make=make: make(1.0, weak) for make in (Auto, Quality, FitMemory, FitLatency, Deadline))])  # fmt: skip
@pytest.mark.parametrize("budget", [{"latents": 64}, 64])
def test_budgets_are_budgets(policy: Any, budget: Any) -> None:
    with pytest.raises(UsageError, match=r"is a Budget, such as Budget\(latents=64\), got (\{'latents': )?64"):
        policy(budget)


class Own:
    """A policy of one's own that answers `answer`, of an option where it is a function."""

    def __init__(self, answer: Any):
        self.answer = answer

    def init(self, outlook: Outlook) -> Any:
        return self.answer(outlook) if callable(self.answer) else self.answer

    def next(self, state: Any, index: int, seconds: float) -> Any:
        return (state[0], state) if isinstance(state, tuple) else state


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((Choice(Budget(), Budget()), None), "a choice names every axis, latents, got none"),
        ((Choice({"latents": 64}, Budget(latents=64)), None), "a choice names every axis, latents, got {'latents': 64}"),  # type: ignore[arg-type]
        ((Choice(Budget(latents=3), Budget(latents=3)), None), "latents"),
        ((Choice(Budget(latents=64), Budget(latents=64), plan=Plan.full(2)), None), "draws at budgets, not along a plan: leave plan out"),
        (Choice(Budget(latents=64), Budget(latents=64)), "`next` returns a Choice and the state that follows"),
        (None, "`next` returns a Choice and the state that follows, .* got None"),
        (lambda outlook: outlook.fixed({"latents": 64}, None), "budget is a Budget"),
        (lambda outlook: outlook.options({"latents": 64}), "guidance_budget is a Budget"),
    ],
)
def test_a_policy_of_one_s_own_is_told_what_it_does_wrong(answer: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(pipeline(Machine()), Own(answer))
    assert chosen(pipeline(Machine()), Own(lambda outlook: (outlook.fixed(Budget(latents=8), None).choice(), None))) == 8


def test_auto_takes_what_is_free_below_the_knee() -> None:
    """Where reading the weights takes longer than the arithmetic, a larger budget costs nothing."""
    heavy = tuple(msgspec.structs.replace(row, weight_bytes=10_000_000_000) for row in described().cost)
    result = draw(pipeline(Machine(), cost=heavy), Auto())
    assert result.steps[0].budget == Budget(latents=64)
    assert "takes no longer" in result.steps[0].reason


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FitMemory(0), "a memory limit must be a number of bytes above zero"),
        (lambda: FitMemory(-5), "above zero"),
        (lambda: FitLatency(0), "a time must be a number of seconds above zero"),
        (lambda: FitLatency("fast"), "above zero"),  # type: ignore[arg-type]
        (lambda: Quality(0), "above 0 and at most 1"),
        (lambda: Quality(1.2), "above 0 and at most 1"),
    ],
)
def test_goals_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_weak_branch_with_nothing_above_it_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves no larger one"):
        draw(pipeline(Machine()), Quality(0.9, Budget(latents=64)), guidance_scale=2.0, autoguidance=True)
