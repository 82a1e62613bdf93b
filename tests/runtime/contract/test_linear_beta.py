"""The discrete schedule of DDPM and DiT: its respacing, and DDPM with a learned variance and DDIM on it against diffusers'."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import model
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Guidance, UsageError
from elastic_runtime.contract.schedule import LinearBeta, RectifiedFlow, ShiftedCosine
from elastic_runtime.sampling.diffusion import ddim, ddpm
from elastic_runtime.sampling.fitting import sampler

DIT = LinearBeta()
SHAPE = (2, 3, 4, 4)


def answer(x: np.ndarray, time: float) -> np.ndarray:
    """A prediction with a variance half, which goes a little past its ends; both depend on the state and the time."""
    return np.concatenate([np.tanh(1.3 * x + time / 400) - 0.2 * x, 1.1 * np.sin(3 * x + time)], axis=1)


def test_the_products_are_ddpms() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    for time in (0, 1, 499, 999):
        alpha, sigma = DIT.alpha_sigma(time)
        assert alpha**2 == pytest.approx(np.prod(1 - betas[: time + 1]), rel=1e-12)
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
    assert DIT.alpha_sigma(-1.0) == (1.0, 0.0)
    assert (DIT.share(999), DIT.share(-1), RectifiedFlow().share(0.25)) == (1.0, 0.0, 0.25)


def test_250_steps_are_the_public_codes() -> None:
    """`space_timesteps(1000, "250")`, written out as a sum of strides."""
    wanted, at = [], 0.0
    for _ in range(250):
        wanted.append(round(at))
        at += 999 / 249
    assert DIT.times(250).tolist() == [*wanted[::-1], -1.0]
    assert DIT.times(4).tolist() == [999, 666, 333, 0, -1]
    assert DIT.times(1).tolist() == [999, -1]
    assert DIT.times(1000).tolist() == list(range(999, -2, -1))


@given(st.integers(2, 1000))
def test_every_respacing_falls_from_the_last_timestep_to_the_first(steps: int) -> None:
    times = DIT.times(steps)
    assert (len(times), times[0], times[-2], times[-1]) == (steps + 1, 999, 0, -1)
    assert (np.diff(times) < 0).all()
    assert (times == np.round(times)).all()


@pytest.mark.parametrize(("steps", "message"), [(0, "at least 1 step, got 0"), (1001, "at most 1000 steps, one a timestep, got 1001")])
def test_runs_that_the_schedule_does_not_have(steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DIT.times(steps)


def scheduler(kind: str, described: LinearBeta, limit: float | None, steps: int, **more: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    made = getattr(diffusers, kind)(
        num_train_timesteps=described.num_train_timesteps, beta_start=described.beta_start, beta_end=described.beta_end,
        clip_sample=limit is not None, timestep_spacing="linspace", **more,
    )  # fmt: skip
    betas = np.linspace(described.beta_start, described.beta_end, described.num_train_timesteps)
    made.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))  # theirs are float32
    made.one = made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("steps", [250, 37])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_ddpm_with_a_learned_variance_is_diffusers(limit: float | None, steps: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = scheduler("DDPMScheduler", DIT, limit, steps, variance_type="learned_range")
    theirs.set_timesteps(timesteps=theirs.timesteps.tolist())  # their previous timestep is right for a list only
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    source, same = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    draw = lambda shape: torch.randn(shape, generator=source, dtype=torch.float64).numpy()  # noqa: E731
    steps_ = list(ddpm(lambda x, t, i: answer(x, t), noise, steps, draw, DIT, "epsilon", limit, learned_variance=True))
    assert [step.time for step in steps_] == theirs.timesteps.tolist()
    x = torch.from_numpy(noise)
    for step, mine in zip(theirs.timesteps, steps_, strict=True):
        output = theirs.step(torch.from_numpy(answer(x.numpy(), int(step))), step, x, generator=same)
        x = output.prev_sample
        np.testing.assert_allclose(mine.sample, x.numpy(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(mine.denoised, output.pred_original_sample.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("timesteps", "steps"), [(25, 25), (25, 13), (1000, 4), (1000, 1000)])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_ddim_is_diffusers(limit: float | None, timesteps: int, steps: int) -> None:
    torch = pytest.importorskip("torch")
    described = LinearBeta(num_train_timesteps=timesteps)
    theirs = scheduler("DDIMScheduler", described, limit, steps, set_alpha_to_one=True)
    theirs.num_inference_steps = timesteps // ((timesteps - 1) // (steps - 1))  # they go on by timesteps // this
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    ours = list(ddim(lambda x, t, i: answer(x, t), noise, steps, None, described, "epsilon", limit, learned_variance=True))  # type: ignore[arg-type]
    x = torch.from_numpy(noise)
    for step, mine in zip(theirs.timesteps, ours, strict=True):
        output = torch.from_numpy(answer(x.numpy(), int(step))[:, :3])
        x = theirs.step(output, step, x, eta=0.0, use_clipped_model_output=True).prev_sample
        np.testing.assert_allclose(mine.sample, x.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("value", "deviation"), [(1.0, "beta"), (-1.0, "posterior")])
def test_the_ends_of_the_variance(value: float, deviation: str) -> None:
    """With nothing predicted and noise of ones, what is added is the deviation itself."""
    path = LinearBeta(num_train_timesteps=10)
    predict = lambda x, t, i: np.concatenate([0 * x, np.full_like(x, value)], axis=1)  # noqa: E731
    step = next(ddpm(predict, np.zeros(SHAPE), 5, np.ones, path, "epsilon", learned_variance=True))
    (alpha, sigma), (alpha_next, sigma_next) = path.alpha_sigma(step.time), path.alpha_sigma(step.next_time)
    beta = 1 - alpha**2 / alpha_next**2
    np.testing.assert_allclose(step.sample**2, {"beta": beta, "posterior": beta * sigma_next**2 / sigma**2}[deviation], rtol=1e-9)


def test_the_manifest_holds_what_sampling_needs() -> None:
    described = model(4, prediction="epsilon", schedule=DIT, learned_variance=True, guided_channels=3)
    assert msgspec.json.decode(msgspec.json.encode(described), type=type(described)) == described
    assert (sampler(described)[0], sampler(described, "ddim")[0]) == ("ddpm", "ddim")
    with pytest.raises(UsageError, match="whose schedule is linear_beta, takes ddpm, ddim, ab2, ab3 or dpm\\+\\+2m"):
        sampler(described, "euler")
    assert Guidance(2.0, 0.0, 0.5).active(DIT.share(499))
    assert not Guidance(2.0, 0.0, 0.5).active(DIT.share(500))


def test_older_manifests_read_as_before() -> None:
    described = model(4, schedule=ShiftedCosine(shift=0.0), prediction="v")
    old = {name: value for name, value in msgspec.to_builtins(described).items() if name not in ("learned_variance", "guided_channels")}
    assert msgspec.convert(old, type(described)) == described


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned_variance": True}, "`learned_variance` is for schedules that ddpm draws from, not rectified_flow"),
        ({"guided_channels": 0}, "`guided_channels` must be 1 to 4, the sample's, got 0"),
        ({"guided_channels": 5}, "got 5"),
    ],
)
def test_descriptions_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    whole = msgspec.to_builtins(model(4)) | changes
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(whole, type(model()))


@pytest.mark.parametrize(
    "wrong", [{"num_train_timesteps": 1}, {"beta_start": 0.0}, {"beta_start": 0.5, "beta_end": 0.1}, {"beta_end": 1.0}]
)
def test_betas_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 < beta_start <= beta_end < 1"):
        LinearBeta(**wrong)
