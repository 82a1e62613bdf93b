"""DDIM and DDPM against diffusers' schedulers, which are given the same alphas and the same noise."""

from typing import Any

import numpy as np
import pytest

from elastic_runtime.contract.schedule import LEAST_LOGSNR, RectifiedFlow, ShiftedCosine
from elastic_runtime.sampling.diffusion import PICTURE, ddim, ddpm
from elastic_runtime.sampling.flow import Step

SHAPE = (2, 1, 4, 4)
PATH = ShiftedCosine.at(32)
GRID = 24


def answer(x: np.ndarray, time: float) -> np.ndarray:
    """A prediction that depends on the state and the time, of about its size."""
    return np.tanh(1.3 * x + time) - 0.2 * x


def states(loop: Any) -> list[np.ndarray]:
    return [step.sample for step in loop]


def scheduler(kind: str, prediction: str, clip: bool, spacing: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    alphas = np.array([1.0] + [PATH.alpha_sigma(n / GRID)[0] ** 2 for n in range(1, GRID + 1)])
    shared = {
        "num_train_timesteps": GRID,
        "trained_betas": 1 - alphas[1:] / alphas[:-1],
        "prediction_type": {"v": "v_prediction", "epsilon": "epsilon"}[prediction],
        "clip_sample": clip,
        "timestep_spacing": spacing,
    }
    made = getattr(diffusers, kind)(
        **shared, **({"variance_type": "fixed_small"} if kind == "DDPMScheduler" else {"set_alpha_to_one": True})
    )
    made.alphas_cumprod = torch.from_numpy(alphas[1:])  # in float64: products of its float32 betas drift
    made.one = made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return made


@pytest.mark.parametrize("steps", [GRID, GRID // 4])
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_ddim_is_diffusers_ddim(prediction: str, limit: float | None, steps: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = scheduler("DDIMScheduler", prediction, limit is not None, "trailing")
    theirs.set_timesteps(steps)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    ours = states(ddim(lambda x, t, i: answer(x, t), noise, steps, None, PATH, prediction, limit))  # type: ignore[arg-type]
    x = torch.from_numpy(noise)
    for step, mine in zip(theirs.timesteps, ours, strict=True):
        output = torch.from_numpy(answer(x.numpy(), (int(step) + 1) / GRID))
        x = theirs.step(output, step, x, eta=0.0, use_clipped_model_output=True).prev_sample
        np.testing.assert_allclose(mine, x.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [GRID, GRID // 4])
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_ddpm_is_diffusers_ddpm(prediction: str, limit: float | None, steps: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = scheduler("DDPMScheduler", prediction, limit is not None, "trailing")
    theirs.set_timesteps(steps)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    source, same = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    draw = lambda shape: torch.randn(shape, generator=source, dtype=torch.float64).numpy()  # noqa: E731
    ours = states(ddpm(lambda x, t, i: answer(x, t), noise, steps, draw, PATH, prediction, limit))
    x = torch.from_numpy(noise)
    for step, mine in zip(theirs.timesteps, ours, strict=True):
        output = torch.from_numpy(answer(x.numpy(), (int(step) + 1) / GRID))
        x = theirs.step(output, step, x, generator=same).prev_sample
        np.testing.assert_allclose(mine, x.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loop", [ddim, ddpm])
@pytest.mark.parametrize("prediction", list(PICTURE))
def test_a_model_that_knows_the_picture_draws_it(loop: Any, prediction: str) -> None:
    generator = np.random.default_rng(1)
    picture = generator.uniform(-1, 1, SHAPE)

    def perfect(x: np.ndarray, t: float, index: int) -> np.ndarray:
        alpha, sigma = PATH.alpha_sigma(t)
        eps = (x - alpha * picture) / sigma
        return {"v": alpha * eps - sigma * picture, "epsilon": eps, "velocity": eps - picture, "picture": picture}[prediction]

    for steps in (1, 2, 7):
        drawn = states(loop(perfect, generator.standard_normal(SHAPE), steps, generator.standard_normal, PATH, prediction))[-1]
        np.testing.assert_allclose(drawn, picture, atol=1e-6)


def test_ancestral_steps_keep_the_right_share_of_noise() -> None:
    """With the true picture known, the state at any time is N(alpha x_0, sigma^2)."""
    generator = np.random.default_rng(2)
    shape = (20_000, 1, 1, 1)

    def perfect(x: np.ndarray, t: float, index: int) -> np.ndarray:
        alpha, sigma = PATH.alpha_sigma(t)
        return (x - alpha * 0.5) / sigma

    for step in ddpm(perfect, generator.standard_normal(shape), 5, generator.standard_normal, PATH, "epsilon"):
        alpha, sigma = PATH.alpha_sigma(step.next_time)
        assert step.sample.mean() == pytest.approx(alpha * 0.5, abs=0.03)
        assert step.sample.std() == pytest.approx(sigma, abs=0.03)


def test_the_caller_can_replace_the_state() -> None:
    loop = ddim(lambda x, t, i: np.zeros_like(x), np.ones(SHAPE), 3, None, PATH, "v")  # type: ignore[arg-type]
    first = next(loop)
    assert isinstance(first, Step)
    assert (first.index, first.steps, first.time) == (0, 3, 1.0)
    assert not loop.send(np.zeros(SHAPE)).sample.any()


def test_shifted_cosine_is_the_papers_formula() -> None:
    for size in (32, 64, 256):
        path = ShiftedCosine.at(size)
        for time in (0.05, 0.3, 0.5, 0.9):
            alpha, sigma = path.alpha_sigma(time)
            logsnr = -2 * np.log(np.tan(np.pi * time / 2)) + 2 * np.log(64 / size)
            assert alpha**2 == pytest.approx(1 / (1 + np.exp(-logsnr)))
            assert sigma**2 == pytest.approx(1 / (1 + np.exp(logsnr)))
    assert PATH.alpha_sigma(0.0) == (1.0, 0.0)
    alpha, sigma = PATH.alpha_sigma(1.0)
    assert 2 * np.log(alpha / sigma) == pytest.approx(LEAST_LOGSNR)


def test_ddim_on_straight_paths_is_euler() -> None:
    from elastic_runtime.sampling.flow import euler

    noise = np.random.default_rng(3).standard_normal(SHAPE)
    predict = lambda x, t, i: answer(x, t)  # noqa: E731
    for a, b in zip(ddim(predict, noise, 5, None, RectifiedFlow(), "velocity"), euler(predict, noise, 5), strict=True):  # type: ignore[arg-type]
        np.testing.assert_allclose(a.sample, b.sample, atol=1e-12)
