"""Multistep solvers: their order where the answer is known, DPM-Solver++ against diffusers', and runs that change on the way."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime.contract.schedule import LinearBeta, ShiftedCosine
from elastic_runtime.sampling.diffusion import ddim
from elastic_runtime.sampling.flow import euler
from elastic_runtime.sampling.multistep import History, dpm_2m, flow_adams, path_adams, weights

SHAPE, GRID, PATH = (2, 1, 4, 4), 24, ShiftedCosine.at(32)
SPREAD, MIDDLE = 0.5, 1.5  # data are Gaussian: the velocity towards them has a closed form


def states(loop: Any) -> list[np.ndarray]:
    return [step.sample for step in loop]


def answer(x: np.ndarray, time: float) -> np.ndarray:
    return np.tanh(1.3 * x + time) - 0.2 * x


def velocity(x: np.ndarray, t: float, index: int) -> np.ndarray:
    """E[eps - x_0 | x] for x_0 of N(MIDDLE, SPREAD^2)."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MIDDLE) - MIDDLE


def exact(noise: np.ndarray) -> np.ndarray:
    return MIDDLE + SPREAD * noise


def error(loop: Any, noise: np.ndarray) -> float:
    return float(np.abs(states(loop)[-1] - exact(noise)).max())


def test_twice_the_steps_leave_a_third_of_the_error_and_a_higher_order_leaves_less() -> None:
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    errors = {order: [error(flow_adams(order, velocity, noise, steps), noise) for steps in (10, 20, 40)] for order in (2, 3)}
    for each in errors.values():
        assert all(3 * fine < coarse for coarse, fine in itertools.pairwise(each))
    assert all(2 * third < second < error(euler(velocity, noise, 40), noise) for second, third in zip(*errors.values(), strict=True))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_on_a_path_they_come_nearer_than_ddim_to_what_many_steps_give(prediction: str, order: int) -> None:
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    path = LinearBeta()

    def predict(x: np.ndarray, t: float, index: int) -> np.ndarray:
        alpha, sigma = path.alpha_sigma(t)
        variance = alpha**2 * SPREAD**2 + sigma**2
        picture = MIDDLE + alpha * SPREAD**2 / variance * (x - alpha * MIDDLE)
        eps = (x - alpha * picture) / sigma
        return eps if prediction == "epsilon" else alpha * eps - sigma * picture

    converged = states(path_adams(2, predict, noise, 1000, path, prediction))[-1]
    plain = states(ddim(predict, noise, 25, None, path, prediction))[-1]  # type: ignore[arg-type]
    ours = states(path_adams(order, predict, noise, 25, path, prediction))[-1]
    assert np.abs(ours - converged).max() < np.abs(plain - converged).max() / 4


def test_what_a_step_shows_may_be_changed() -> None:
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    plain = states(dpm_2m(answer_of, noise, 6, PATH, "v"))
    touched = []
    for step in dpm_2m(answer_of, noise, 6, PATH, "v"):
        assert step.denoised is not None
        step.denoised[...] = 0
        touched.append(step.sample)
    np.testing.assert_array_equal(touched, plain)


def answer_of(x: np.ndarray, t: float, index: int) -> np.ndarray:
    return answer(x, t)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3, unique_by=lambda place: round(place, 2)), st.floats(0.05, 1.0))
def test_the_weights_integrate_polynomials_exactly(places: list[float], length: float) -> None:
    low = places[-1]
    known = np.array(places)
    for power in range(len(places)):
        integral = ((low + length) ** (power + 1) - low ** (power + 1)) / (power + 1)
        assert float(weights(known, low, low + length) @ known**power) == pytest.approx(integral, abs=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_dpm_2m_is_diffusers(prediction: str) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    alphas = np.array([1.0] + [PATH.alpha_sigma(n / GRID)[0] ** 2 for n in range(1, GRID + 1)])
    theirs = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=GRID, trained_betas=1 - alphas[1:] / alphas[:-1], timestep_spacing="trailing", lower_order_final=False,
        prediction_type={"v": "v_prediction", "epsilon": "epsilon"}[prediction], final_sigmas_type="zero",
    )  # fmt: skip
    theirs.alphas_cumprod = torch.from_numpy(alphas[1:])
    steps = GRID // 2
    theirs.set_timesteps(steps)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    ours = states(dpm_2m(lambda x, t, i: answer(x, t), noise, steps, PATH, prediction))
    x = torch.from_numpy(noise)
    for step, mine in zip(theirs.timesteps, ours, strict=True):
        x = theirs.step(torch.from_numpy(answer(x.numpy(), (int(step) + 1) / GRID)), step, x).prev_sample
        np.testing.assert_allclose(mine, x.numpy(), rtol=1e-4, atol=1e-4)  # its sigmas are float32


def test_a_run_that_goes_on_in_other_steps_keeps_its_order() -> None:
    noise = np.random.default_rng(0).standard_normal(SHAPE)

    def run(keep: bool) -> float:
        history = History()
        first = list(itertools.islice(flow_adams(3, velocity, noise, 20, history=history), 10))[-1]
        rest = flow_adams(3, velocity, first.sample, 15, first.next_time, history if keep else None)
        return error(rest, noise)

    assert run(True) < run(False) / 3


def test_a_state_that_was_replaced_begins_anew() -> None:
    """Answers along another path say nothing of this one."""
    history = History()
    loop = flow_adams(3, velocity, np.zeros(SHAPE), 5, history=history)
    next(loop)
    next(loop)
    assert len(history.latest(3)[1]) == 2
    loop.send(np.ones(SHAPE))
    assert len(history.latest(3)[1]) == 1
