import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_runtime import UsageError
from elastic_runtime.sampling.flow import SAMPLERS, Step, euler, heun, sde

NOISE = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
CLEAN = np.random.default_rng(1).uniform(-1, 1, NOISE.shape)


def to_point(x: np.ndarray, t: float, index: int) -> np.ndarray:
    """Exact velocity of the straight path from any x to CLEAN."""
    return (x - CLEAN) / t


def growing(x: np.ndarray, t: float, index: int) -> np.ndarray:
    """dx/dt = x: x(0) = x(1) / e."""
    return x


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 7])
def test_a_straight_path_ends_where_it_leads_in_any_number_of_steps(name: str, steps: int) -> None:
    walk = list(SAMPLERS[name](to_point, NOISE, steps, draw))
    last = walk[-1]
    for step in walk:
        np.testing.assert_allclose(step.denoised, CLEAN, atol=1e-12)
    if name != "sde":  # whose drift leaves the straight path, and which ends with a whole step along it
        np.testing.assert_allclose(last.sample, CLEAN, atol=1e-12)
    assert (last.index, last.steps, last.next_time) == (steps - 1, steps, 0.0)


def test_one_euler_step_goes_all_the_way() -> None:
    (only,) = euler(to_point, NOISE, 1)
    np.testing.assert_allclose(only.sample, CLEAN, atol=1e-12)


def errors(loop: object, counts: tuple[int, ...]) -> list[float]:
    return [float(np.abs([*loop(growing, NOISE, n)][-1].sample - NOISE / np.e).max()) for n in counts]  # type: ignore[operator]


def test_euler_is_of_first_order_and_heun_of_second_but_for_its_last_step() -> None:
    coarse, fine = errors(euler, (40, 80))
    assert coarse / fine == pytest.approx(2, rel=0.05)
    # The last step is Euler's, whose local error is of second order too: halving the step quarters the whole.
    coarse, fine = errors(heun, (40, 80))
    assert coarse / fine == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 5), ("heun", 9), ("sde", 5)])
def test_evaluations_times_and_indices_of_each_sampler(name: str, evaluations: int) -> None:
    asked: list[tuple[float, int]] = []

    def velocity(x: np.ndarray, t: float, index: int) -> np.ndarray:
        asked.append((t, index))
        return np.zeros_like(x)

    steps = list(SAMPLERS[name](velocity, NOISE, 5, draw))
    assert len(asked) == evaluations
    assert [step.index for step in steps] == list(range(5))
    assert steps[0].time == 1.0
    assert [step.next_time for step in steps[:-1]] == [step.time for step in steps[1:]]
    assert sorted({index for _, index in asked}) == list(range(5))
    assert 0.0 not in [t for t, _ in asked], "a velocity at t=0 is never asked for"


def test_the_sde_draws_noise_at_every_step_but_the_last_and_ends_from_004() -> None:
    drawn: list[tuple[int, ...]] = []

    def counted(shape: tuple[int, ...]) -> np.ndarray:
        drawn.append(shape)
        return np.ones(shape)

    steps = list(sde(lambda x, t, i: np.zeros_like(x), NOISE, 6, counted))
    assert drawn == [NOISE.shape] * 5
    assert steps[-1].time == pytest.approx(0.04)
    # by hand, the first step from t=1 to 1-0.192 with v=0: score -x, drift x, noise sqrt(2*0.192)
    np.testing.assert_allclose(steps[0].sample, NOISE * (1 - 0.192) + np.sqrt(2 * 0.192), atol=1e-12)


def test_the_sde_keeps_the_distribution_of_noise_that_has_no_signal() -> None:
    """With clean data at 0, x_t = t eps: v = x / t is exact and the spread at the last time before 0 is 0.04."""
    generator = np.random.default_rng(0)
    steps = list(sde(lambda x, t, i: x / t, generator.standard_normal((400, 1, 8, 8)), 200, generator.standard_normal))
    assert steps[-2].sample.std() == pytest.approx(0.04, rel=0.1)
    assert steps[99].sample.std() == pytest.approx(steps[99].next_time, rel=0.05)


def test_the_sde_needs_noise_and_two_steps() -> None:
    with pytest.raises(UsageError, match="give it a generator"):
        next(sde(growing, NOISE, 4))
    with pytest.raises(UsageError, match="at least 2 steps, got 1"):
        next(sde(growing, NOISE, 1, draw))


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("steps", [0, -1])
def test_a_loop_needs_a_step(name: str, steps: int) -> None:
    with pytest.raises(UsageError, match=f"at least 1 step, got {steps}"):
        next(SAMPLERS[name](growing, NOISE, steps, draw))


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_counted_in_whole_numbers(name: str) -> None:
    with pytest.raises(UsageError, match=r"whole number.*2\.5"):
        next(SAMPLERS[name](growing, NOISE, 2.5, draw))  # type: ignore[arg-type]


@given(st.integers(2, 12), st.sampled_from(sorted(SAMPLERS)))
@settings(max_examples=20, deadline=None)
def test_a_loop_never_writes_to_the_noise_or_to_what_it_yielded(steps: int, name: str) -> None:
    start = NOISE.copy()
    seen = [(step.sample, step.sample.copy()) for step in SAMPLERS[name](growing, start, steps, draw)]
    np.testing.assert_array_equal(start, NOISE)
    for array, copy in seen:
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sending_an_array_replaces_the_state(name: str) -> None:
    loop = SAMPLERS[name](to_point, NOISE, 4, draw)
    step = next(loop)
    states: list[np.ndarray] = []

    def remember(x: np.ndarray, t: float, index: int) -> np.ndarray:
        states.append(x)
        return np.zeros_like(x)

    loop = SAMPLERS[name](remember, NOISE, 4, draw)
    step = next(loop)
    assert isinstance(step, Step)
    states.clear()
    loop.send(np.full(NOISE.shape, 7.0, np.float32))
    np.testing.assert_array_equal(states[0], 7.0)
    assert states[0].dtype == np.float64


def test_a_replacement_of_another_shape_is_refused() -> None:
    loop = euler(to_point, NOISE, 4)
    next(loop)
    with pytest.raises(UsageError, match=r"must have shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"):
        loop.send(NOISE[:1])
