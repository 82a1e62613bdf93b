from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NULL, decoder_graph, manifest, session
from PIL import Image

from elastic_runtime import (
    Auto,
    Budget,
    BudgetError,
    Bundle,
    ElasticPipeline,
    FakeSession,
    Fixed,
    Guidance,
    InferenceError,
    PerStep,
    Request,
    Span,
    UsageError,
)
from elastic_runtime.choosing.option import Choice
from elastic_runtime.choosing.policy import Replay
from elastic_runtime.contract.manifest import Vae

FULL, LOW = Budget(latents=64), Budget(latents=4)
VAE = Vae(scaling_factor=0.5, shift_factor=0.25, upscale=2)


def to_label(x: np.ndarray, t: np.ndarray, labels: np.ndarray, kept: int) -> Any:
    """Straight to a picture whose every pixel is label / 10."""
    return (x - labels / 10) / t


def pipeline(field: Any = to_label, channels: int = 1, batch: Span = Span(1, 4), vae: bool = False) -> tuple[ElasticPipeline, FakeSession]:  # noqa: B008
    fake = session(field, channels, batch)
    decoder = None
    if vae:
        decoder = FakeSession(
            decoder_graph(channels), lambda feeds: {"image": np.repeat(feeds["latent"][:, :1], 3, 1).repeat(2, 2).repeat(2, 3)}
        )
    described = manifest(channels, batch, VAE if vae else None)
    return ElasticPipeline(Bundle(Path("bundle"), described), {"denoiser": fake} | ({"decoder": decoder} if decoder else {})), fake


def kept(fake: FakeSession) -> list[int]:
    return [call["latent_ids"][0] for call in fake.calls]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_an_exact_velocity_gives_the_exact_picture(sampler: str) -> None:
    pipe, _ = pipeline()
    latents = pipe([0, 5, 9], sampler=sampler, num_inference_steps=5, generator=rng(), output_type="latent").images
    np.testing.assert_allclose(latents, np.broadcast_to(np.array([0, 0.5, 0.9]).reshape(3, 1, 1, 1), (3, 1, 8, 8)), atol=1e-5)


def test_output_types() -> None:
    pipe, _ = pipeline()
    (picture,) = pipe(5, generator=rng()).images
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("L", (8, 8), 191)
    array = pipe(5, generator=rng(), output_type="np").images
    assert (array.shape, array.dtype) == ((1, 8, 8, 1), np.float32)
    np.testing.assert_allclose(array, 0.75, atol=1e-5)
    assert pipe(5, generator=rng(), output_type="latent").images.dtype == np.float64


def test_three_channels_are_colours_and_values_are_clipped() -> None:
    pipe, _ = pipeline(lambda x, t, labels, kept: (x - np.array([9.0, 0.0, -9.0]).reshape(1, 3, 1, 1)) / t, channels=3)
    (picture,) = pipe(5, generator=rng()).images
    assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (255, 128, 0))


def test_a_decoder_takes_scaled_and_shifted_latents() -> None:
    pipe, _ = pipeline(channels=4, vae=True)
    pictures = pipe([2, 2], generator=rng(), output_type="np").images
    assert pictures.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(pictures, (0.2 / 0.5 + 0.25) / 2 + 0.5, atol=1e-5)


def test_latents_without_a_decoder_are_refused_before_any_step_is_run() -> None:
    pipe, fake = pipeline(channels=4)
    with pytest.raises(UsageError, match="4-channel latents and it holds no decoder: export it again with --vae DIR"):
        pipe(5, generator=rng())
    assert fake.calls == []
    assert pipe(5, generator=rng(), output_type="latent").images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_the_same_seed_gives_the_same_picture_and_another_seed_another(sampler: str) -> None:
    pipe, _ = pipeline(lambda x, t, labels, kept: 0.3 * x)
    first, again, other = (pipe([1], sampler=sampler, generator=rng(seed), output_type="latent").images for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_a_sampler_that_cannot_go_on_is_not_begun_anew_on_a_picture_half_drawn() -> None:
    pipe, _ = pipeline()
    choices = [Choice(FULL, FULL), Choice(FULL, FULL, steps=(2,)), Choice(FULL, FULL)]
    assert pipe([1], sampler="euler", num_inference_steps=8, policy=Replay(tuple(choices)), generator=rng()).images
    with pytest.raises(UsageError, match="sampler sde cannot go on with other steps than it began with"):
        pipe([1], sampler="sde", num_inference_steps=8, policy=Replay(tuple(choices)), generator=rng())


def test_given_noise_takes_the_generators_place() -> None:
    pipe, _ = pipeline(lambda x, t, labels, kept: 0 * x)
    noise = rng(5).standard_normal((1, 1, 8, 8))
    np.testing.assert_array_equal(pipe([1], noise=noise, output_type="latent").images, noise)


def test_budgets_of_the_branches_and_of_the_record() -> None:
    pipe, fake = pipeline()
    result = pipe(
        [1], num_inference_steps=4, guidance_scale=3.0, budget=FULL, guidance_budget=LOW, guidance_interval=(0.3, 0.8), generator=rng()
    )
    assert kept(fake) == [16, 16, 1, 16, 1, 16]  # times 1, .75, .5, .25
    assert [step.guidance_budget for step in result.steps] == [None, LOW, LOW, None]
    assert [(step.index, step.time, step.next_time, step.budget) for step in result.steps] == [
        (0, 1.0, 0.75, FULL), (1, 0.75, 0.5, FULL), (2, 0.5, 0.25, FULL), (3, 0.25, 0.0, FULL),
    ]  # fmt: skip


def test_guidance_at_one_budget_is_one_run_of_both_branches() -> None:
    pipe, fake = pipeline()
    pipe([1, 2], num_inference_steps=3, guidance_scale=3.0, generator=rng())
    assert [call["sample"][0] for call in fake.calls] == [4, 4, 4]


def test_autoguidance_keeps_labels_and_wants_a_smaller_budget() -> None:
    seen: list[float] = []
    pipe, fake = pipeline(lambda x, t, labels, kept: seen.extend(labels.ravel()) or 0 * x)
    pipe([1], num_inference_steps=2, guidance_scale=2.0, guidance_budget=LOW, autoguidance=True, generator=rng())
    assert kept(fake) == [16, 1, 16, 1]
    assert set(seen) == {1}
    with pytest.raises(UsageError, match="autoguidance needs a guidance budget smaller than the budget"):
        pipe([1], guidance_scale=2.0, autoguidance=True)
    with pytest.raises(UsageError, match="autoguidance needs a guidance budget smaller"):  # it would lead away from the better branch
        pipe([1], guidance_scale=2.0, autoguidance=True, budget=LOW, guidance_budget=Budget(latents=64))
    falling = PerStep((Budget(latents=64), LOW), LOW)  # whose last step has nothing to be led away from
    with pytest.raises(UsageError, match="autoguidance needs a guidance budget smaller"):
        pipe([1], guidance_scale=2.0, autoguidance=True, policy=falling, num_inference_steps=2)


def test_unguided_pictures_never_see_the_null_label() -> None:
    seen: set[int] = set()
    pipe, _ = pipeline(lambda x, t, labels, kept: seen.update(labels.ravel().tolist()) or 0 * x)
    pipe([0, 9], guidance_scale=1.0, generator=rng())
    assert seen == {0, 9}
    pipe([0, 9], guidance_scale=1.5, generator=rng())
    assert seen == {0, 9, NULL}


def test_a_budget_for_each_step() -> None:
    pipe, fake = pipeline()
    schedule = tuple(Budget(latents=n) for n in (4, 8, 64))
    result = pipe([1], num_inference_steps=3, policy=PerStep(schedule), sampler="heun", generator=rng())
    assert tuple(step.budget for step in result.steps) == schedule
    assert kept(fake) == [1, 1, 2, 2, 16]
    with pytest.raises(BudgetError, match="3 budgets were given for 4 steps"):
        pipe([1], num_inference_steps=4, policy=PerStep(schedule))


def test_a_budget_and_a_policy_do_not_mix() -> None:
    pipe, fake = pipeline()
    with pytest.raises(UsageError, match="give budget or policy, not both"):
        pipe([1], budget=FULL, policy=Fixed(LOW))
    with pytest.raises(UsageError, match="give the policy its guidance_budget"):
        pipe([1], guidance_scale=2.0, guidance_budget=LOW, policy=PerStep((FULL,)))
    pipe([1], num_inference_steps=1, guidance_scale=2.0, guidance_budget=LOW, policy=Fixed(FULL), generator=rng())
    assert kept(fake) == [16, 1]


def test_a_callback_sees_every_step_and_may_replace_the_latents() -> None:
    pipe, fake = pipeline()
    seen: list[tuple[int, float]] = []

    def callback(owner: ElasticPipeline, index: int, time: float, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert owner is pipe
        assert tensors["latents"].shape == (1, 1, 8, 8)
        seen.append((index, time))
        return {"latents": np.full((1, 1, 8, 8), 0.125)} if index == 1 else {}

    image = pipe([5], num_inference_steps=2, callback_on_step_end=callback, generator=rng(), output_type="latent").images
    assert seen == [(0, 1.0), (1, 0.5)]
    np.testing.assert_array_equal(image, 0.125)  # replaced after the last step
    assert len(fake.calls) == 2


def test_latents_replaced_midway_are_what_the_next_step_starts_from() -> None:
    pipe, _ = pipeline(lambda x, t, labels, kept: 0 * x)
    replace = lambda pipe, index, time, tensors: {"latents": np.full((1, 1, 8, 8), 0.5)} if index == 0 else {}  # noqa: E731
    image = pipe([5], num_inference_steps=3, callback_on_step_end=replace, generator=rng(), output_type="latent").images
    np.testing.assert_array_equal(image, 0.5)


@pytest.mark.parametrize("sampler", ["euler", "ab2", "ab3"])
def test_a_state_that_is_changed_in_place_counts_as_replaced(sampler: str) -> None:
    drawn: dict[str, Any] = {"num_inference_steps": 5, "sampler": sampler, "seeds": 1, "output_type": "latent"}
    pipe, _ = pipeline(lambda x, t, labels, kept: np.tanh(x + t))

    def moved(pipe: Any, index: int, time: float, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"latents": tensors["latents"] + 1.5} if index == 2 else tensors

    def in_place(pipe: Any, index: int, time: float, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["latents"][...] += 1.5 if index == 2 else 0
        return tensors if index else {}

    wanted = pipe([5], callback_on_step_end=moved, **drawn).images
    np.testing.assert_array_equal(pipe([5], callback_on_step_end=in_place, **drawn).images, wanted)
    np.testing.assert_array_equal(pipe([5], callback_on_step_end=lambda *given: given[3], **drawn).images, pipe([5], **drawn).images)
    for progress in pipe.iterate(Request(class_labels=5, **drawn)):
        progress.step.sample[...] += 1.5 if progress.step.index == 2 else 0
    np.testing.assert_array_equal(progress.step.sample, wanted)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([[1.0], [2.0, 3.0]], r"are numbers, an array of shape \(1, 1, 8, 8\)"),
        (np.full((1, 1, 8, 8), "x"), r"are numbers, an array of shape \(1, 1, 8, 8\)"),
        (np.full((1, 1, 8, 8), None), r"are numbers, an array of shape \(1, 1, 8, 8\)"),
        (np.full((1, 1, 8, 8), np.nan), "after step 1 are finite, got 64 values that are not"),
    ],
)
def test_a_callback_that_returns_no_numbers_is_told(latents: Any, message: str) -> None:
    pipe, _ = pipeline()
    with pytest.raises(UsageError, match=f"latents that replace the state {message}"):
        pipe([5], num_inference_steps=3, callback_on_step_end=lambda *given: {"latents": latents} if given[1] else {}, seeds=1)


@pytest.mark.parametrize("at", [0, 2])
def test_a_callback_that_returns_another_shape_is_refused(at: int) -> None:
    pipe, _ = pipeline()
    replace = lambda pipe, index, time, tensors: {"latents": np.zeros((2, 1, 8, 8))} if index == at else {}  # noqa: E731
    with pytest.raises(UsageError, match=r"must have shape \(1, 1, 8, 8\), got \(2, 1, 8, 8\)"):
        pipe([5], num_inference_steps=3, callback_on_step_end=replace, generator=rng())


def test_a_callback_may_return_nothing() -> None:
    pipe, _ = pipeline()
    assert len(pipe([5], callback_on_step_end=lambda *_: None, generator=rng()).images) == 1  # type: ignore[arg-type, return-value]


def test_the_loop_can_be_stopped_early() -> None:
    pipe, fake = pipeline()
    for progress in pipe.iterate(Request(class_labels=5, num_inference_steps=50), generator=rng()):
        if progress.step.index == 2:
            break
    assert len(fake.calls) == 3
    assert pipe.images(progress.step.sample, "np").shape == (1, 8, 8, 1)


def test_many_pictures_are_drawn_in_runs_that_the_graph_takes() -> None:
    pipe, fake = pipeline(batch=Span(1, 4))
    assert len(pipe(list(range(9)), num_inference_steps=1, generator=rng()).images) == 9
    assert [call["sample"][0] for call in fake.calls] == [3, 3, 3]


@pytest.mark.parametrize(("labels", "named"), [([10], "10"), ([-1], "-1"), ([3, 11, 12], "11, 12"), (99, "99")])
def test_a_class_out_of_range_is_named(labels: Any, named: str) -> None:
    with pytest.raises(UsageError, match=f"this model has classes 0 to 9, got {named}$"):
        pipeline()[0](labels)


@pytest.mark.parametrize("labels", [[], [1.0], "seven", [[1, 2]], [True], None, [[1], [2, 3]]])
def test_labels_that_are_not_whole_numbers_are_refused(labels: Any) -> None:
    with pytest.raises(UsageError, match="class_labels must be one or more whole numbers"):
        pipeline()[0](labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": np.zeros((2, 1, 8, 8))}, r"noise must have shape \(1, 1, 8, 8\), one sample a picture, got \(2, 1, 8, 8\)"),
        ({"output_type": "pt"}, "output_type must be pil, np or latent, got 'pt'"),
        ({"sampler": "ddim"}, "'ddim' does not fit; tiny, whose schedule is rectified_flow, takes euler"),
        ({"temperature": 1.0}, "temperature is for masked models; euler takes none"),
        ({"sampler": "dpm"}, "no sampler 'dpm'; tiny, whose schedule is rectified_flow, takes euler, heun, sde, ab2 or ab3"),
        ({"num_inference_steps": 0}, "at least 1 step, got 0"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"guidance_scale": 0.5}, "guidance_scale must be 1"),
        ({"guidance_interval": (0.8, 0.3)}, "interval"),
        ({"guidance_interval": (0.8,)}, "interval"),
        ({"guidance_interval": 0.8}, "interval"),
        ({"budget": Budget(latents=63)}, "the nearest is 64"),
        ({"budget": Budget(tokens=63)}, "no axis 'tokens'"),
        ({"guidance_budget": Budget(latents=1), "guidance_scale": 2.0}, "the nearest is 4"),
        ({"noise": np.full((1, 1, 8, 8), np.nan)}, "noise must be finite numbers of shape"),
        ({"noise": [[1], [2, 3]]}, "noise must be finite numbers of shape"),
        ({"noise": np.zeros((1, 1, 8, 8), complex)}, "noise must be finite numbers of shape"),
        ({"budget": 64}, r"budget is a Budget, such as Budget\(latents=64\), got 64"),
        ({"policy": "auto"}, "policy is one of the policies, .* got 'auto'"),
        ({"policy": Auto}, "policy is one of the policies"),
        ({"sampler": ""}, "there is no sampler ''"),
        ({"autoguidance": True}, "autoguidance acts through guidance, which is off: give guidance_scale above 1"),
        ({"guidance_budget": LOW}, "guidance_budget acts through guidance, which is off"),
        ({"guidance_interval": (0.3, 0.8)}, "guidance_interval acts through guidance, which is off"),
        ({"policy": PerStep(())}, "budgets by step are one for each step, got none"),
        ({"generator": 7}, r"numpy\.random\.Generator"),
    ],
)
def test_a_wrong_argument_is_answered_before_any_step_is_run(arguments: dict[str, Any], message: str) -> None:
    pipe, fake = pipeline()
    with pytest.raises(UsageError, match=message):
        pipe([5], **arguments)
    assert fake.calls == []


def test_values_that_are_not_finite_stop_the_picture_and_name_the_step() -> None:
    pipe, fake = pipeline(lambda x, t, labels, kept: np.where(t < 0.6, np.nan, 0 * x))
    with pytest.raises(InferenceError, match="step 1 gave values that are not finite"):
        pipe([5], num_inference_steps=2, generator=rng())
    assert len(fake.calls) == 2


def test_what_was_measured_of_a_session_goes_with_it() -> None:
    manifest_, opened = manifest(1), []

    def open_graph(graph: str) -> FakeSession:
        opened.append(session(lambda x, t, labels, kept: 0 * x, 1))
        return opened[-1]

    pipe = ElasticPipeline(Bundle(Path("bundle"), manifest_), open_graph)
    before = pipe.gauge
    assert pipe.gauge is before
    pipe.close()
    assert pipe.gauge is not before
    assert pipe.gauge.session is opened[-1]
    assert len(opened) == 2


@pytest.mark.parametrize(("peaks", "opened", "before"), [((700, 900), 900, 0), ((700, 700), 400, 700)])
def test_a_peak_from_before_the_denoiser_was_opened_is_not_its_own(
    peaks: tuple[int, ...], opened: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter(peaks)
    monkeypatch.setattr("elastic_runtime.pipeline.peak_bytes", lambda: next(readings))
    monkeypatch.setattr("elastic_runtime.pipeline.resident_bytes", lambda: 400)
    pipe = ElasticPipeline(Bundle(Path("bundle"), manifest(1)), lambda graph: session(to_label, 1))
    assert (pipe.gauge.opened, pipe.gauge.before) == (opened, before)


def test_closing_the_pipeline_closes_its_sessions() -> None:
    pipe, fake = pipeline(channels=4, vae=True)
    with pipe:
        pass
    assert fake.closed
    with pytest.raises(InferenceError, match="closed"):
        pipe([1], output_type="latent")


def test_what_is_closed_as_a_picture_ends_stays_closed() -> None:
    opened: list[str] = []

    def opener(graph: str) -> Any:
        opened.append(graph)
        return session(to_label, 1)

    pipe = ElasticPipeline(Bundle(Path("bundle"), manifest(1)), opener)
    closing = lambda owner, index, *_: owner.close() if index == 1 else None  # noqa: E731
    result = pipe([1], num_inference_steps=2, callback_on_step_end=closing, output_type="latent", generator=rng())
    assert opened == ["denoiser"]
    assert result.facts["where"]


def test_guidance_is_a_value() -> None:
    assert Guidance(3.0) == Guidance(3.0)
    assert not Guidance().active(0.5)
