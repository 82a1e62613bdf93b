import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_runtime import InferenceError, Plan, UsageError
from elastic_runtime.ralu.noise import renoising
from elastic_runtime.ralu.patches import pack, raster, take
from elastic_runtime.ralu.plan import PRESETS
from elastic_runtime.sampling.enlarging import spectral
from elastic_runtime.sampling.stages import PlanStep, along, from_draws

PLAN = Plan((2, 2, 3), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)


def first_ones(latents: np.ndarray, count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(count), (len(latents), count))


def run(
    velocity: Any, shape: tuple[int, ...] = (2, 3, 8, 16), plan: Plan = PLAN, choose: Any = first_ones, seed: int = 0
) -> list[PlanStep]:
    source = np.random.default_rng(seed)
    draw = source.standard_normal
    return list(along(velocity, draw(shape), plan, 2, choose, from_draws(draw), lambda latents, sigma: spectral(latents, sigma, draw)))


def never(latents: np.ndarray, sigma: float) -> np.ndarray:
    raise AssertionError("patches grow here, nothing else")


@given(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), st.floats(0.26, 0.9), st.integers(0, 99))
@settings(max_examples=25)
def test_straight_paths_lead_to_the_picture_whatever_grows(batch: int, high: int, wide: int, ratio: float, seed: int) -> None:
    """With the exact velocity to a picture of equal patches in each 2 x 2, noise and choices leave no trace."""
    source = np.random.default_rng(seed)
    low = source.uniform(-1, 1, (batch, high, wide, 12))
    plan = Plan((2, 2, 3), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, ratio)

    def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
        place = (positions / (2 if stage == 2 else 1)).astype(int)
        clean = low[np.arange(batch)[:, None], place[..., 0], place[..., 1]]
        return (x - clean) / sigma

    def choose(latents: np.ndarray, count: int) -> np.ndarray:
        np.testing.assert_allclose(pack(latents, 2), low.reshape(batch, -1, 12), atol=1e-9)  # the predicted picture
        return np.stack([np.sort(source.permutation(high * wide)[:count]) for _ in range(batch)])

    *_, last = run(velocity, (batch, 3, 4 * high, 4 * wide), plan, choose, seed)
    np.testing.assert_allclose(last.sample, low.repeat(2, 1).repeat(2, 2).reshape(batch, -1, 12), atol=1e-9)
    np.testing.assert_array_equal(last.positions, raster(batch, 2 * high, 2 * wide))


def test_steps_tell_their_stage_their_sigmas_and_their_tokens() -> None:
    asked: list[tuple[int, int, float, int]] = []

    def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
        asked.append((index, stage, sigma, x.shape[1]))
        assert positions.shape == (*x.shape[:2], 2)
        return np.zeros_like(x)

    steps = run(velocity)
    assert [(step.index, step.stage, step.time, step.sample.shape[1]) for step in steps] == asked
    assert [step.stage for step in steps] == [0, 0, 1, 1, 2, 2, 2]
    assert [step.sample.shape[1] for step in steps] == list(PLAN.step_tokens(4, 8))
    assert {step.steps for step in steps} == {7}
    times = [(step.time, step.next_time) for step in steps]
    assert times == [pair for stage in PLAN.stages() for pair in zip(stage.sigmas, stage.sigmas[1:], strict=False)]


def test_the_mixed_stage_has_kept_tokens_first_and_children_in_fours() -> None:
    chosen = np.array([[1, 6], [0, 3]])
    plan = Plan((1, 1, 1), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.25)
    first, mixed, whole = run(lambda x, *_: np.zeros_like(x), plan=plan, choose=lambda latents, count: chosen)
    assert first.positions[0].tolist() == [[row, column] for row in range(2) for column in range(4)]
    assert mixed.positions[0, :6].tolist() == [[0, 0], [0, 2], [0, 3], [1, 0], [1, 1], [1, 3]]
    assert mixed.positions[0, 6:10].tolist() == [[0, 1], [0, 1.5], [0.5, 1], [0.5, 1.5]]
    assert mixed.positions[1, 10:].tolist() == [[0, 3], [0, 3.5], [0.5, 3], [0.5, 3.5]]
    np.testing.assert_array_equal(whole.positions, raster(2, 4, 8))


def test_noise_comes_before_the_sort_and_where_tokens_grew() -> None:
    asked: list[tuple[tuple[int, ...], slice, float]] = []

    def renoise(shape: tuple[int, ...], grew: slice, z: float) -> np.ndarray:
        asked.append((shape, grew, z))
        return np.broadcast_to(np.arange(shape[1], dtype=np.float64)[:, None], shape)

    seen: list[np.ndarray] = []

    def velocity(x: np.ndarray, *_: Any) -> np.ndarray:
        seen.append(x)
        return np.zeros_like(x)

    plan = Plan((1, 1, 1), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.25)
    list(along(velocity, np.zeros((1, 1, 8, 16)), plan, 2, lambda latents, count: np.array([[1, 6]]), renoise, never))
    assert asked == [((1, 14, 4), slice(6, None), 4.0), ((1, 32, 4), slice(0, 24), 4.0)]
    stages = plan.stages()
    np.testing.assert_allclose(seen[1][0, :, 0], stages[1].alpha * np.arange(14))
    # stage 3 in raster order: token (0, 0) is the first child of the first kept one, (0, 2) that of the first grown one
    order = (seen[2][0, :, 0] - np.repeat(0, 32)) / stages[2].alpha
    assert order[0] == pytest.approx(0)
    assert order[8] == pytest.approx(2)


def test_without_renoising_grown_patches_are_copies_and_no_noise_is_drawn() -> None:
    seen: list[np.ndarray] = []

    def velocity(x: np.ndarray, *_: Any) -> np.ndarray:
        seen.append(x)
        return np.zeros_like(x)

    def renoise(shape: tuple[int, ...], grew: slice, z: float) -> np.ndarray:
        raise AssertionError("noise was drawn")

    noise = np.arange(128.0).reshape(1, 1, 8, 16)
    plan = Plan((1, 1, 1), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.25, renoise=False)
    list(along(velocity, noise, plan, 2, lambda latents, count: np.array([[1, 6]]), renoise, never))
    low = pack(noise[:, :, ::2, ::2], 2)
    np.testing.assert_array_equal(seen[1][:, 6:], low[:, [1, 1, 1, 1, 6, 6, 6, 6]])
    rows, columns = np.divmod(np.arange(32), 8)
    np.testing.assert_array_equal(seen[2], low[:, rows // 2 * 4 + columns // 2])


def test_a_plan_of_one_stage_is_euler_from_the_noise_itself() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 3, 6, 4))  # which no plan of three stages could halve
    steps = list(along(lambda x, p, sigma, i, s: x / sigma, noise, Plan.full(4, 2.0), 2, None, None, None))  # type: ignore[arg-type]
    assert [step.time for step in steps] == list(Plan.full(4, 2.0).stages()[0].sigmas[:-1])
    np.testing.assert_allclose(steps[0].sample, pack(noise, 2) * steps[0].next_time)
    np.testing.assert_allclose(steps[-1].sample, 0, atol=1e-12)


def test_sending_tokens_replaces_the_state() -> None:
    seen: list[np.ndarray] = []

    def velocity(x: np.ndarray, *_: Any) -> np.ndarray:
        seen.append(x)
        return np.zeros_like(x)

    loop = along(velocity, np.zeros((1, 3, 8, 8)), PLAN, 2, first_ones, lambda shape, grew, z: np.zeros(shape), never)
    step = next(loop)
    loop.send(np.ones(step.sample.shape, np.float32))
    assert seen[1].dtype == np.float64
    np.testing.assert_array_equal(seen[1], 1)
    with pytest.raises(UsageError, match=r"must have shape \(1, 4, 12\), got \(1, 3, 12\)"):
        loop.send(np.ones((1, 3, 12)))


@pytest.mark.parametrize(
    ("shape", "plan", "message"),
    [
        ((1, 3, 8, 10), PLAN, "8 x 10 do not divide into patches of 2 at half the height and width: take multiples of 4"),
        ((1, 3, 8, 7), Plan.full(3), "8 x 7 do not divide into patches of 2: take multiples of 2"),
        ((1, 3, 0, 8), PLAN, "0 x 8 do not divide"),
        ((1, 3, 8, 4), PRESETS["7x"], "up_ratio 0.1 of 2 patches grows 0"),
    ],
)
def test_sizes_that_do_not_fit_the_plan_are_refused(shape: tuple[int, ...], plan: Plan, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        run(lambda x, *_: x, shape, plan)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (np.array([[0, 1, 2]]), "shape (1, 4)"),
        (np.array([[0.0, 1, 2, 3]]), "whole numbers"),
        (np.array([[0, 2, 1, 3]]), "must rise within 0 to 15"),
        (np.array([[0, 1, 1, 3]]), "must rise"),
        (np.array([[0, 1, 2, 16]]), "must rise within 0 to 15"),
    ],
)
def test_a_choice_that_is_none_is_refused(chosen: np.ndarray, message: str) -> None:
    with pytest.raises(InferenceError, match=re.escape(message)):
        run(lambda x, *_: np.zeros_like(x), (1, 3, 16, 16), choose=lambda latents, count: chosen)


def test_the_noise_of_a_source_is_correlated_where_tokens_grew() -> None:
    drawn = from_draws(np.random.default_rng(3).standard_normal)((2, 9, 5), slice(1, None), 3.0)
    white = np.random.default_rng(3).standard_normal((2, 9, 5))
    np.testing.assert_array_equal(drawn, renoising(white, slice(1, None), 3.0))


SPEED = Plan((2, 3), (0.25, 1.0), (2.0, 2.0), growth="spectrum")


@given(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), st.floats(0.05, 0.95), st.integers(0, 99))
@settings(max_examples=25)
def test_straight_paths_lead_to_the_picture_whatever_its_spectrum_was_grown_at(
    batch: int, high: int, wide: int, sigma: float, seed: int
) -> None:
    """With the exact velocity to a smooth picture, of which the low stage draws a small one, noise leaves no trace."""
    source = np.random.default_rng(seed)
    small = source.uniform(-1, 1, (batch, 3, 2 * high, 2 * wide))
    large = spectral(small, 0.0, lambda shape: np.zeros(shape))
    pictures = [pack(small, 2), pack(large, 2)]
    plan = Plan((2, 3), (1 - sigma, 1.0), (2.0, 2.0), growth="spectrum")
    steps = run(lambda x, positions, at, index, stage: (x - pictures[stage]) / at, (batch, 3, 4 * high, 4 * wide), plan)
    assert [step.stage for step in steps] == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(steps[-1].sample, pictures[1], atol=1e-9)
    # what the second stage begins with lies on the path: the picture and noise in the shares of its sigma
    assert steps[2].time == pytest.approx(2 * sigma / (1 + sigma))


def test_a_plan_of_two_stages_runs_at_whole_places_of_its_own_two_pictures() -> None:
    places: list[np.ndarray] = []

    def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
        places.append(positions)
        return np.zeros_like(x)

    steps = run(velocity, plan=SPEED)
    for seen, size in zip(places, [(2, 4)] * 2 + [(4, 8)] * 3, strict=True):
        np.testing.assert_array_equal(seen, raster(2, *size))
    assert [step.index for step in steps] == list(range(5))


@pytest.mark.parametrize("left", [[1, 3], [2, 1], [4, 6]])
def test_a_plan_of_two_stages_takes_other_steps_than_its_own(left: list[int]) -> None:
    taken = list(left)
    empty, still = np.zeros((1, 1, 8, 8)), lambda x, *_: np.zeros_like(x)
    steps = list(along(still, empty, SPEED, 2, first_ones, from_draws(np.zeros), lambda x, sigma: empty, taken))
    assert [step.stage for step in steps] == [0] * left[0] + [1] * left[1]
    assert (steps[0].time, steps[left[0] - 1].next_time, steps[-1].next_time) == (1.0, pytest.approx(0.75), 0.0)
    assert steps[left[0]].time == pytest.approx(2 * 0.75 / 1.75)


def test_each_step_tells_the_picture_that_was_seen_at_the_resolution_of_its_stage() -> None:
    low = np.random.default_rng(3).uniform(-1, 1, (2, 3, 4, 8))
    whole = low.repeat(2, axis=2).repeat(2, axis=3)
    coarse, fine = pack(low, 2), pack(whole, 2)

    def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
        places = positions if stage == 2 else 2 * positions
        clean = take(fine, (places @ (8, 1)).astype(int))
        kept = x.shape[1] if stage == 0 else 8 - PLAN.grown(8)
        if stage < 2:
            clean[:, :kept] = take(coarse, (positions[:, :kept] @ (4, 1)).astype(int))
        return (x - clean) / sigma

    steps = run(velocity)
    for step in steps:
        np.testing.assert_allclose(step.denoised, (low, whole, whole)[step.stage], atol=1e-9)
    for plan in (Plan.full(2), Plan((2, 2), (0.3, 1.0), (3.0, 3.0), growth="spectrum")):
        walk = run(lambda x, *_: np.zeros_like(x), plan=plan)
        sides = [(4, 8), (8, 16)] if len(plan.steps) == 2 else [(8, 16)]
        assert [step.denoised.shape[2:] for step in walk if step.denoised is not None] == [sides[step.stage] for step in walk]
