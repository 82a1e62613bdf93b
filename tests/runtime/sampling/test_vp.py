"""The schedules of the public U-ViT: Stable Diffusion's betas, counted from 1, against diffusers', and the variance preserving SDE."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import model

from elastic_runtime import UsageError
from elastic_runtime.contract.schedule import LinearBeta, ScaledLinearBeta, VpSde
from elastic_runtime.sampling.fitting import sampler

SHAPE = (2, 4, 4, 4)
SD, SDE = ScaledLinearBeta(), VpSde()


def network(x: np.ndarray, time: float, index: int = 0) -> np.ndarray:
    return np.tanh(1.3 * x + time / 400) - 0.2 * x


def scheduler(kind: str, steps: int, **more: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, kind)(
        beta_start=SD.beta_start, beta_end=SD.beta_end, beta_schedule="scaled_linear", timestep_spacing="linspace", **more
    )
    made.set_timesteps(steps)
    return made


def test_the_betas_are_stable_diffusions_and_the_timesteps_begin_at_1() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for time in (1, 2, 500, 1000):
        alpha, sigma = SD.alpha_sigma(time)
        assert alpha**2 == pytest.approx(np.prod(1 - betas[:time]), rel=1e-12)
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
    assert SD.alpha_sigma(0) == (1.0, 0.0)
    assert SD.times(4).tolist() == [1000, 667, 334, 1, 0]
    assert SD.times(1).tolist() == [1000, 0]
    assert SD.times(3, 334).tolist() == [334, 167, 1, 0]
    assert (SD.share(1000), SD.share(500), SD.share(0)) == (1.0, 0.5, 0.0)
    with pytest.raises(UsageError, match="at most 1000 steps"):
        SD.times(1001)
    assert ScaledLinearBeta(beta_start=1e-4, beta_end=0.02) != LinearBeta()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("steps", [4, 28, 1000])
@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
        ("dpm++2m", "DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "zero"}),
    ],
)
def test_ddim_and_dpm_2m_are_diffusers(name: str, kind: str, more: dict[str, Any], steps: int) -> None:
    """Their timesteps are ours less one. DPM-Solver's sigmas are float32."""
    torch = pytest.importorskip("torch")
    theirs = scheduler(kind, steps, **more)
    times = SD.times(steps)
    if name == "ddim":
        theirs.num_inference_steps = 1000 // (999 // (steps - 1))  # they go on by 1000 // this
        theirs.timesteps = torch.from_numpy(times[:-1] - 1).long()
        theirs.alphas_cumprod = torch.from_numpy(np.cumprod(1 - SD.betas))  # theirs are float32
        theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    else:
        theirs.set_timesteps(timesteps=(times[:-1] - 1).astype(int).tolist())
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    _, run = sampler(model(4, schedule=SD, prediction="epsilon"), name)
    x = torch.from_numpy(noise)
    for step, mine in zip(theirs.timesteps, run(network, noise, steps, np.random.default_rng(0)), strict=True):
        assert mine.time == int(step) + 1
        x = theirs.step(torch.from_numpy(network(x.numpy(), int(step) + 1)), step, x).prev_sample
        np.testing.assert_allclose(mine.sample, x.numpy(), **dict.fromkeys(("rtol", "atol"), 1e-9 if name == "ddim" else 1e-5))


def test_the_sde_is_the_papers() -> None:
    """`dx = -beta x / 2 dt + sqrt(beta) dw` keeps the variance: alpha falls by beta alpha / 2, and the model is told 999 t."""
    for time in (0.0, 1.0, 250.0, 999.0):
        t = time / 999
        alpha, sigma = SDE.alpha_sigma(time)
        assert alpha**2 == pytest.approx(np.exp(-0.1 * t - 19.9 * t**2 / 2))
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
    assert SDE.times(2).tolist() == [999.0, 499.5, 0.0]
    assert SDE.times(2, 499.5).tolist() == [499.5, 249.75, 0.0]
    assert (SDE.share(999.0), SDE.share(0.0)) == (1.0, 0.0)


def test_ddpms_betas_are_the_sde_in_steps() -> None:
    for time in range(0, 1000, 37):
        np.testing.assert_allclose(SDE.alpha_sigma(time), LinearBeta().alpha_sigma(time), atol=0.011)


@pytest.mark.parametrize("schedule", [SD, SDE])
def test_the_manifest_holds_them_and_the_public_sampler_comes_first(schedule: Any) -> None:
    described = model(4, prediction="epsilon", schedule=schedule)
    assert msgspec.json.decode(msgspec.json.encode(described), type=type(described)) == described
    assert sampler(described)[0] == "dpm++2m"


@pytest.mark.parametrize("wrong", [{"beta_min": 0.0}, {"beta_max": 0.01}, {"beta_max": float("inf")}])
def test_sdes_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 < beta_min <= beta_max"):
        VpSde(**wrong)
