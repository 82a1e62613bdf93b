"""Token slots: as many as the picture needs and no more, with the results of all of them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_router import LENGTH, TOKENS, described, kept_by_hand, pipeline, probabilities, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_runtime import Axis, Budget, BudgetError, Guidance, PerStep, Span
from elastic_runtime.contract.schedule import LinearBeta
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.denoising.guidance import Branches
from elastic_runtime.denoising.router import Routing, Slots, buckets, kept_set
from elastic_runtime.denoising.tokens import Conditions

ALL = Budget(tokens=LENGTH)
COUNTS = st.integers(2, LENGTH)


def by_step(counts: list[int], steps: int) -> Any:
    """A router whose counts follow a list over the steps, and differ a little by label."""
    return lambda t, label: min(max(counts[round((999 - t) / 999 * (steps - 1)) if steps > 1 else 0] + label % 3, 2), LENGTH)


def draw(pipe: Any, labels: list[int], steps: int, **more: Any) -> Any:
    more = {"generator": np.random.default_rng(0), "output_type": "latent"} | more
    return pipe(labels, num_inference_steps=steps, **more)


@given(st.lists(COUNTS, min_size=2, max_size=9), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([1.0, 2.0]))
@settings(max_examples=25)
def test_exact_pictures_are_those_of_all_slots_whatever_is_kept(counts: list[int], labels: list[int], scale: float) -> None:
    steps = len(counts)
    router = by_step(counts, steps)
    (sized, fake), (whole, every) = pipeline(router), pipeline(router, budgets=(ALL,))
    weak = {} if scale == 1.0 else {"guidance_drop_fraction": 0.5}
    ours, theirs = (draw(pipe, labels, steps, guidance_scale=scale, **weak) for pipe in (sized, whole))
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert {slots for _, slots in runs(every)} == {LENGTH}
    assert sum(step.reruns for step in theirs.steps) == 0
    for step in ours.steps:
        assert step.kept == tuple(router(step.time, label) for label in labels)
        assert max(step.kept) <= step.slots <= LENGTH
        assert (step.guidance_kept is None) == (scale == 1.0)
        assert step.guidance_kept is None or max(step.guidance_kept) <= step.guidance_slots
    extra = len(fake.calls) - sum(step.reruns for step in ours.steps)
    assert steps <= extra <= steps * (1 if scale == 1.0 else 2)
    assert {slots for _, slots in runs(fake)} <= set(buckets(TOKENS))


@given(st.lists(COUNTS, min_size=2, max_size=9), st.integers(TOKENS.min, LENGTH))
@settings(max_examples=25)
def test_capped_pictures_never_exceed_the_cap_and_are_those_of_the_cap(counts: list[int], cap: int) -> None:
    router, budget = by_step(counts, len(counts)), Budget(tokens=cap)
    (sized, fake), (whole, _) = pipeline(router), pipeline(router, budgets=(budget,))
    ours, theirs = (draw(pipe, [1, 5], len(counts), guidance_scale=3.0, budget=budget) for pipe in (sized, whole))
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert max(slots for _, slots in runs(fake)) <= cap
    assert all(step.slots <= cap and step.guidance_slots <= cap and step.budget == budget for step in ours.steps)


@given(st.lists(COUNTS, min_size=1, max_size=6), st.integers(TOKENS.min, LENGTH), st.integers(TOKENS.min, LENGTH), st.floats(0, 0.95))
@settings(max_examples=25)
def test_branches_with_caps_of_their_own_answer_as_if_run_at_their_caps(counts: list[int], cap: int, weak: int, drop: float) -> None:
    fake = pipeline(by_step(counts, len(counts)))[1]
    denoiser, choice = Denoiser(fake, described()), Branches(Budget(tokens=cap), Budget(tokens=weak))
    x, labels = np.random.default_rng(1).standard_normal((3, 1, 8, 8)), np.array([0, 4, 8])
    routing = denoiser.routing(0.1, drop)
    for time in LinearBeta().times(len(counts))[:-1]:
        sized = denoiser.guided(x, time, Conditions(labels=labels), Guidance(2.5), choice, routing)
        at_caps = denoiser.guided(x, time, Conditions(labels=labels), Guidance(2.5), choice, Routing(0.1, drop))
        np.testing.assert_array_equal(sized.prediction, at_caps.prediction)
        assert at_caps.routed is None
        assert sized.routed.slots <= cap
        assert sized.guidance_routed.slots <= weak
        assert sized.routed.mask.sum(1).tolist() == [min(kept, cap) for kept in sized.routed.kept]
        routing = routing.after(sized.routed, sized.guidance_routed)


def test_slots_are_spent_as_the_picture_needs_them() -> None:
    """A router that keeps a fifth at first and half in the end, as in the paper's figure."""
    pipe, fake = pipeline(lambda t, label: round(LENGTH * (0.5 - 0.3 * t / 999)))
    result = draw(pipe, [3], 50)
    assert sum(slots for _, slots in runs(fake)) < 0.55 * LENGTH * 50
    assert sum(step.reruns for step in result.steps) <= 3
    assert [step.kept[0] for step in result.steps] == sorted(step.kept[0] for step in result.steps)


def test_only_the_pictures_that_did_not_fit_run_again() -> None:
    pipe, fake = pipeline(lambda t, label: {0: 8, 1: 60, 2: 40}[label])
    (step,) = draw(pipe, [0, 1, 0, 2], 1).steps
    assert runs(fake) == [(4, 32), (2, 64)]
    assert (step.kept, step.slots, step.reruns) == ((8, 60, 8, 40), 64, 1)


def test_all_run_again_where_so_few_are_no_batch() -> None:
    pipe, fake = pipeline(lambda t, label: {0: 8, 1: 60}[label], batch=Span(4, 4))
    draw(pipe, [0, 1, 0, 0], 1)
    assert runs(fake) == [(4, 32), (4, 64)]


def test_a_step_under_a_cap_runs_again_up_to_the_cap_only() -> None:
    pipe, fake = pipeline(lambda t, label: 60)
    result = draw(pipe, [0], 3, budget=Budget(tokens=45))
    assert runs(fake) == [(1, 32), (1, 45), (1, 45), (1, 45)]
    assert [(step.kept, step.slots, step.reruns) for step in result.steps] == [((60,), 45, 1), ((60,), 45, 0), ((60,), 45, 0)]


def test_many_pictures_share_a_size_over_all_runs() -> None:
    pipe, fake = pipeline(lambda t, label: 10 + label, batch=Span(1, 2))
    draw(pipe, [0, 9, 1], 2)
    assert runs(fake) == [(2, 32), (1, 32), (2, 24), (1, 24)]  # 19, and 19 // 8 * 1.5 more


def test_branches_of_one_size_share_a_run_and_others_do_not() -> None:
    pipe, fake = pipeline(lambda t, label: 20)
    result = draw(pipe, [3], 2, guidance_scale=2.0)
    assert runs(fake) == [(2, 32), (2, 24)]
    pipe, fake = pipeline(lambda t, label: 20)
    result = draw(pipe, [3], 2, guidance_scale=2.0, guidance_drop_fraction=0.9)
    assert runs(fake) == [(1, 32), (1, 4), (1, 24), (1, 4)]
    assert [(step.kept, step.guidance_kept, step.guidance_slots) for step in result.steps] == [((20,), (2,), 4)] * 2


def test_a_cap_for_each_step() -> None:
    pipe, fake = pipeline(lambda t, label: 64)
    result = draw(pipe, [3], 3, policy=PerStep(tuple(Budget(tokens=n) for n in (10, 20, 64))))
    assert runs(fake) == [(1, 10), (1, 20), (1, 64)]
    assert [step.kept > (step.slots,) for step in result.steps] == [True, True, False]


def test_a_branch_that_rests_is_sized_by_what_it_was_seen_to_keep() -> None:
    pipe, fake = pipeline(lambda t, label: 12)
    result = draw(pipe, [3], 6, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    assert [step.guidance_kept for step in result.steps] == [None, None, (12,), (12,), None, None]
    assert runs(fake) == [(1, 32), (1, 16), (1, 16), (1, 32), (2, 16), (1, 16), (1, 16)]


def test_an_artifact_that_was_compiled_for_some_sizes_runs_at_these() -> None:
    offered = tuple(Budget(tokens=n) for n in (8, 16, 48, 64))
    pipe, fake = pipeline(lambda t, label: 20 if t > 500 else 50, budgets=offered)
    draw(pipe, [3], 4)
    assert runs(fake) == [(1, 48), (1, 48), (1, 48), (1, 64), (1, 64)]
    with pytest.raises(BudgetError, match=r"compiled for tokens=8, .*, tokens=64; a cap must be one of these, got tokens=32"):
        draw(pipe, [3], 4, budget=Budget(tokens=32))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 200))
def test_buckets_lie_on_the_axis_and_reach_both_ends(low: int, step: int, count: int) -> None:
    high = low + step * count
    sizes = buckets(Axis(name="tokens", min=low, max=high, step=step, default=high, input="slots", carrier="length", dimension="K"))
    assert (sizes[0], sizes[-1]) == (low, high)
    assert list(sizes) == sorted(set(sizes))
    assert all((size - low) % step == 0 for size in sizes)
    assert all(b - a <= max(8, a / 8) + step for a, b in itertools.pairwise(sizes))


def test_buckets_are_few() -> None:
    axis = Axis(name="tokens", min=16, max=4096, step=1, default=4096, input="slots", carrier="length", dimension="K")
    assert len(buckets(axis)) < 70
    assert buckets(axis)[:3] == (16, 24, 32)
    assert {64, 128, 256, 512, 1024, 2048} < set(buckets(axis))


@given(st.lists(COUNTS, max_size=12), st.integers(TOKENS.min, LENGTH))
def test_a_state_is_a_value_and_its_sizes_lie_under_the_cap(counts: list[int], cap: int) -> None:
    state = before = Slots.of(TOKENS, None, 0.3)
    for count in counts:
        state = state.after([count, 2])
    assert before == Slots.of(TOKENS, None, 0.3)
    size = state.first(Budget(tokens=cap))["tokens"]
    assert TOKENS.min <= size <= cap
    if counts:
        assert size >= min(counts[-1], cap)
        assert len(state.seen) <= 8
    assert state.first(Budget(tokens=cap, other=3))["other"] == 3


def test_a_routing_without_slots_stays_as_it_is() -> None:
    assert Routing(0.3, 0.9).after(None, None) == Routing(0.3, 0.9)


@given(COUNTS, st.floats(0, 0.99), st.integers(1, LENGTH), st.integers(0, 5))
def test_the_kept_set_is_the_papers(count: int, drop: float, slots: int, seed: int) -> None:
    values = probabilities(count, seed)
    mask = kept_set(values[None], drop, slots)
    assert set(np.flatnonzero(mask[0]).tolist()) == set(kept_by_hand(values, drop, slots)[0])


def test_counts_are_rounded_as_in_float32() -> None:
    """90 kept, 70 % dropped: 62.999996 in float64's 0.7 would floor to 62, the graph's float32 to 63."""
    values = np.linspace(1.0, 0.51, 90, dtype=np.float32)[None]
    assert kept_set(values, 0.7, 90).sum() == 90 - int(np.floor(np.float32(90) * np.float32(0.7)))


def test_the_kept_sets_of_the_golden_data(golden: Path) -> None:
    with np.load(golden / "dcdit-a.io.npz") as arrays:
        for name in ("0.0", "0.3", "0.6", "0.9", "per_sample_0.2_0.5"):
            drops = [float(part) for part in name.removeprefix("per_sample_").split("_")]
            for row in range(2):
                mask = kept_set(arrays[f"keep_prob_drop_{name}"][row : row + 1], drops[row % len(drops)], 256)
                np.testing.assert_array_equal(mask[0], arrays[f"kept_drop_{name}"][row] > 0)
