"""EDM's preconditioning and samplers on Karras' sigmas, against their formulas and diffusers' schedulers."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import model

from elastic_runtime import UsageError
from elastic_runtime.contract.schedule import Edm, RectifiedFlow
from elastic_runtime.sampling.diffusion import preconditioned
from elastic_runtime.sampling.fitting import sampler
from elastic_runtime.sampling.flow import Step
from elastic_runtime.sampling.multistep import History

SHAPE = (2, 3, 4, 4)
SETTINGS = [Edm(sigma_min=0.01, sigma_max=160.0, sigma_data=0.5), Edm(sigma_min=0.002, sigma_max=80.0, sigma_data=1.0, rho=5.0)]
STEPS = 12


def network(x: np.ndarray, sigma: float, index: int = 0) -> np.ndarray:
    """F: what depends on the scaled sample and on sigma, of about its size."""
    return np.tanh(1.3 * x + 0.1 * np.log(sigma)) - 0.2 * x


def run(described: Edm, name: str, noise: np.ndarray, steps: int = STEPS) -> list[Step]:
    _, loop = sampler(model(3, schedule=described, prediction="edm"), name)
    return list(loop(network, noise, steps, np.random.default_rng(0)))


def theirs(kind: str, described: Edm, **more: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, kind)(
        sigma_min=described.sigma_min, sigma_max=described.sigma_max, sigma_data=described.sigma_data, rho=described.rho,
        sigma_schedule="karras", **more,
    )  # fmt: skip
    made.set_timesteps(STEPS)
    return made


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("described", SETTINGS)
@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("dpm++2m", "EDMDPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "zero"}),
    ],
)
def test_euler_and_dpm_2m_are_diffusers(described: Edm, name: str, kind: str, more: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    scheduler = theirs(kind, described, **more)
    np.testing.assert_allclose(described.times(STEPS), scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-7)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    for time, sigma, mine in zip(scheduler.timesteps, described.times(STEPS)[:-1], run(described, name, noise), strict=True):
        output = torch.from_numpy(network(scheduler.scale_model_input(x, time).numpy(), float(sigma)))
        x = scheduler.step(output, time, x).prev_sample
        np.testing.assert_allclose(mine.sample, x.numpy() / np.hypot(1.0, mine.next_time), rtol=0, atol=1e-5)


@pytest.mark.parametrize("described", SETTINGS)
def test_heun_is_the_papers_algorithm(described: Edm) -> None:
    """Algorithm 1 without noise, in EDM's own scale."""
    noise = np.random.default_rng(1).standard_normal(SHAPE)
    sigmas = described.times(STEPS)
    x = noise * np.hypot(1.0, sigmas[0])

    def change(x: np.ndarray, sigma: float) -> np.ndarray:
        variance = sigma**2 + described.sigma_data**2
        c_skip, c_out = described.sigma_data**2 / variance, sigma * described.sigma_data / np.sqrt(variance)
        return (x - (c_skip * x + c_out * network(x / np.sqrt(variance), sigma))) / sigma

    for i, mine in enumerate(run(described, "heun", noise)):
        way, first = sigmas[i + 1] - sigmas[i], change(x, sigmas[i])
        ahead = x + way * first
        if sigmas[i + 1] > 0:
            ahead = x + way * (first + change(ahead, sigmas[i + 1])) / 2
        x = ahead
        np.testing.assert_allclose(mine.sample, x / np.hypot(1.0, mine.next_time), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_heun_is_diffusers_on_karras_sigmas() -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)  # whose ends are those of its betas
    scheduler.set_timesteps(STEPS)
    highest, lowest = float(scheduler.sigmas[0]), float(scheduler.sigmas[-2])
    described = Edm(sigma_min=lowest, sigma_max=highest, sigma_data=0.5)
    picture = preconditioned(network, described)
    noise = np.random.default_rng(2).standard_normal(SHAPE)
    x = torch.from_numpy(noise * np.hypot(1.0, highest))
    samples = []
    for index, time in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[index])
        eps = (x.numpy() - picture(x.numpy() / np.hypot(1.0, sigma), sigma, 0)) / sigma
        x = scheduler.step(torch.from_numpy(eps), time, x).prev_sample
        samples.append(x.numpy())
    ours = run(described, "heun", noise)
    np.testing.assert_allclose(ours[-1].sample, samples[-1], rtol=0, atol=1e-5)
    for number, mine in enumerate(ours[:-1]):
        np.testing.assert_allclose(mine.sample, samples[2 * number + 1] / np.hypot(1.0, mine.next_time), rtol=0, atol=1e-5)


@pytest.mark.parametrize("described", SETTINGS)
def test_every_sampler_ends_in_the_picture_that_is_always_seen(described: Edm) -> None:
    picture = np.random.default_rng(3).uniform(-2, 2, SHAPE)

    def exact(x: np.ndarray, sigma: float, index: int) -> np.ndarray:
        c_skip, c_out, c_in = described.preconditioning(sigma)
        return (picture - c_skip * x / c_in) / c_out

    for name in ("dpm++2m", "euler", "heun"):
        _, loop = sampler(model(3, schedule=described, prediction="edm"), name)
        steps = list(loop(exact, np.random.default_rng(4).standard_normal(SHAPE), 6, np.random.default_rng(0)))
        np.testing.assert_allclose(steps[-1].sample, picture, atol=1e-6)
        np.testing.assert_allclose(steps[2].denoised, picture, atol=1e-9)


@pytest.mark.parametrize("name", ["dpm++2m", "ab3"])
def test_a_run_that_goes_on_at_its_pace_is_the_same_run(name: str) -> None:
    described = SETTINGS[0]
    noise = np.random.default_rng(5).standard_normal(SHAPE)
    _, loop = sampler(model(3, schedule=described, prediction="edm"), name)
    history, source = History(), np.random.default_rng(0)
    first = loop(network, noise, STEPS, source, history=history)
    cut = [next(first) for _ in range(5)][-1]
    rest = list(loop(network, cut.sample, STEPS - 5, source, cut.next_time, history))
    np.testing.assert_allclose(rest[-1].sample, run(described, name, noise)[-1].sample, rtol=1e-9)


def test_the_times_of_a_run_and_of_what_is_left() -> None:
    described = SETTINGS[0]
    whole = described.times(STEPS)
    assert (len(whole), whole[0], whole[-1]) == (STEPS + 1, 160.0, 0.0)
    assert whole[-2] == pytest.approx(0.01)
    assert (np.diff(whole) < 0).all()
    np.testing.assert_allclose(described.times(STEPS - 4, whole[4]), whole[4:], rtol=1e-9)
    assert described.times(1).tolist() == [160.0, 0.0]
    assert described.times(2, 0.01).tolist() == [0.01, 0.005, 0.0], "below the least sigma"
    shares = described.share(whole)
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    np.testing.assert_allclose(np.diff(shares[:-1]), shares[1] - 1.0, rtol=1e-6)
    with pytest.raises(UsageError, match="at least 1 step, got 0"):
        described.times(0)


@pytest.mark.parametrize(
    "wrong", [{"sigma_min": 0.0}, {"sigma_min": 200.0}, {"sigma_data": 0.0}, {"rho": 0.5}, {"sigma_max": float("nan")}, {"rho": 1e9}]
)
def test_sigmas_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs 0 < sigma_min < sigma_max"):
        msgspec.structs.replace(SETTINGS[0], **wrong)


def test_the_prediction_goes_with_its_schedule() -> None:
    described = model(3, schedule=SETTINGS[0], prediction="edm")
    assert msgspec.json.decode(msgspec.json.encode(described), type=type(described)) == described
    assert sampler(described)[0] == "dpm++2m"
    with pytest.raises(UsageError, match=r"schedule is edm, takes dpm\+\+2m, euler, heun, ab2 or ab3"):
        sampler(described, "ddpm")
    for changes in ({"prediction": "v"}, {"schedule": msgspec.to_builtins(RectifiedFlow())}):
        with pytest.raises(msgspec.ValidationError, match="the prediction and the schedule are both edm or neither"):
            msgspec.convert(msgspec.to_builtins(described) | changes, type(described))
