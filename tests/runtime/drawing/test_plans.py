import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import EMBEDS, NEGATIVE, SCHNELL, SD3, Opener, decode, manifest, pipeline, to_zero
from fake_prompts import flux as with_text

from elastic_runtime import (
    Budget,
    BudgetError,
    Bundle,
    BundleError,
    Caching,
    ElasticPipeline,
    InferenceError,
    MissingError,
    Plan,
    Span,
    UsageError,
)
from elastic_runtime.contract.artifacts import FileEntry, Graph, OnnxArtifact
from elastic_runtime.ralu.plan import PRESETS

TWO = {"negative_prompt_embeds": np.ones((2, 2, 6)), "negative_pooled_prompt_embeds": np.ones((2, 5))}
TINY = Plan((1, 1, 2), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)


def seeded(*seeds: int) -> Any:
    made = [np.random.default_rng(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize("plan", ["4x", "7x", "full", TINY, Plan.full(3, 2.0)])
def test_a_picture_is_drawn_along_any_plan(plan: Any) -> None:
    pipe, opener = pipeline()
    with pipe:
        result = pipe(**EMBEDS, plan=plan, generator=seeded(0))
        assert pipe.where == "fake"
    assert [picture.size for picture in result.images] == [(64, 64)]
    assert np.unique(np.asarray(result.images[0])).tolist() == [191], "latent 0, plus the shift of 0.5, is three quarters grey"
    assert [record.budget["tokens"] for record in result.steps] == list(result.plan.step_tokens(8, 8))
    assert [record.index for record in result.steps] == list(range(result.plan.total))
    assert all(session.closed for _, session in opener.opened)
    decoded = [call["latent"][2:] for call in opener.calls("decoder")]
    assert decoded == ([] if result.plan.plain else [(8, 8)]) + [(16, 16)]


def test_full_follows_the_bundle_s_scheduler_and_its_number_of_steps() -> None:
    pipe, _ = pipeline()
    assert pipe(**EMBEDS, plan="full", num_inference_steps=7, output_type="latent").plan == Plan.full(7, 3.0)
    with pytest.raises(UsageError, match="num_inference_steps is for plans full, speed, mrflow; plan '4x' has steps of its own"):
        pipe(**EMBEDS, num_inference_steps=7)


@pytest.mark.parametrize(("height", "width"), [(32, 96), (64, 48), (None, 32)])
def test_pictures_need_not_be_square(height: int | None, width: int) -> None:
    pipe, opener = pipeline()
    (picture,) = pipe(**EMBEDS, plan=TINY, height=height, width=width).images
    assert picture.size == (width, height or 64)
    assert opener.calls("denoiser")[-1]["hidden_states"] == (1, (height or 64) * width // 64, 16)


def test_the_output_can_be_arrays_or_latents() -> None:
    pipe, _ = pipeline()
    arrays = pipe(**EMBEDS, plan=TINY, output_type="np").images
    assert (arrays.shape, arrays.dtype) == ((1, 64, 64, 3), np.float32)
    latents = pipe(**EMBEDS, plan=TINY, output_type="latent").images
    assert latents.shape == (1, 4, 16, 16)
    with pytest.raises(UsageError, match="output_type must be pil, np or latent, got 'torch'"):
        pipe(**EMBEDS, output_type="torch")  # type: ignore[arg-type]


def curl(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """A velocity that depends on places, so that choices of patches matter."""
    return np.sin(3 * feeds["hidden_states"] + feeds["img_ids"].sum(axis=1)[None, :, None])


def test_a_seed_gives_its_picture_alone_and_in_any_batch() -> None:
    pipe, opener = pipeline(field=curl)
    alone = [pipe(**EMBEDS, plan=TINY, generator=seeded(seed), output_type="latent").images for seed in (5, 6)]
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    np.testing.assert_array_equal(pipe(**EMBEDS, plan=TINY, generator=seeded(5), output_type="latent").images, alone[0])
    before = len(opener.calls("denoiser"))
    both = pipe(**EMBEDS, num_images_per_prompt=2, plan=TINY, generator=seeded(5, 6), output_type="latent").images
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-6)
    # the mixed stage has other tokens in each picture, so each runs by itself
    assert [call["hidden_states"][0] for call in opener.calls("denoiser")[before:]] == [2, 1, 1, 2, 2]
    with pytest.raises(UsageError, match="or 2 of them"):
        pipe(**EMBEDS, num_images_per_prompt=2, plan=TINY, generator=seeded(5, 6, 7))
    with pytest.raises(UsageError, match="generator is a numpy"):
        pipe(**EMBEDS, plan=TINY, generator=5)  # type: ignore[arg-type]


def test_noise_may_be_given() -> None:
    pipe, _ = pipeline()
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16))
    seen: list[np.ndarray] = []
    pipe(**EMBEDS, plan=Plan.full(2), noise=noise, callback_on_step_end=lambda p, i, s, kept: seen.append(kept["latents"]) or {})
    np.testing.assert_allclose(np.sort(seen[0].ravel()), np.sort(noise.ravel()) / 2, rtol=1e-6)
    with pytest.raises(UsageError, match=re.escape("noise must have shape (1, 4, 16, 16), one sample a picture, got (1, 4, 8, 8)")):
        pipe(**EMBEDS, noise=noise[:, :, ::2, ::2])


def test_a_callback_sees_tokens_and_may_replace_them() -> None:
    pipe, _ = pipeline(field=lambda feeds: np.zeros_like(feeds["hidden_states"]))
    steps: list[tuple[int, tuple[int, ...]]] = []

    def callback(given: ElasticPipeline, index: int, sigma: float, kept: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        steps.append((index, kept["latents"].shape))
        return {"latents": np.full_like(kept["latents"], 0.25)} if index == 3 else {}

    result = pipe(**EMBEDS, plan=TINY, callback_on_step_end=callback, output_type="latent")
    assert steps == [(0, (1, 16, 16)), (1, (1, 28, 16)), (2, (1, 64, 16)), (3, (1, 64, 16))]
    np.testing.assert_array_equal(result.images, 0.25)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((1, 16, 16)), "callback_on_step_end returns a dict that may hold other latents, got ndarray"),
        ([1], "got list"),
        ({"latents": np.zeros(3)}, r"must have shape \(1, 16, 16\), got \(3,\)"),
    ],
)
def test_a_wrong_answer_of_a_callback_ends_the_first_step(answer: Any, message: str) -> None:
    pipe, opener = pipeline()
    with pytest.raises(UsageError, match=message):
        pipe(**EMBEDS, plan=TINY, callback_on_step_end=lambda *_: answer)
    assert len(opener.calls("denoiser")) == 1
    assert pipe(**EMBEDS, plan=TINY, callback_on_step_end=lambda *_: {"latents": None}).images


def test_cached_steps_do_not_run_and_say_so() -> None:
    pipe, opener = pipeline()
    caching = Caching.every(PRESETS["4x"], 2)
    result = pipe(**EMBEDS, caching=caching, generator=seeded(0))
    assert {record.index for record in result.steps if not record.computed} == caching.skip
    assert len(opener.calls("denoiser")) == 18 - len(caching.skip)
    with pytest.raises(UsageError, match="needs two computed steps before step 1"):
        pipe(**EMBEDS, caching=Caching(frozenset({1})))


def fed(name: str, value: list[Any]) -> Any:
    def field(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        value.append(feeds[name].tolist())
        return to_zero(feeds)

    return field


def test_distilled_guidance_goes_into_the_model_and_true_cfg_acts_on_top() -> None:
    scales: list[Any] = []
    pipe, _ = pipeline(field=fed("guidance", scales))
    pipe(**EMBEDS, plan=TINY)
    assert scales[0] == [3.5]
    pipe(**EMBEDS, **NEGATIVE, plan=TINY, guidance_scale=2.0, true_cfg_scale=4.0)
    assert scales[-1] == [2.0, 2.0]
    pipe(**EMBEDS, **NEGATIVE, plan=TINY, true_cfg_scale=4.0, guidance_interval=(0.0, 0.1))
    assert len(scales[-1]) == 1, "outside its interval guidance costs nothing"
    for wrong in ({"guidance_scale": -1}, {"true_cfg_scale": -0.5}, {"guidance_interval": (0.5,)}, {"guidance_interval": (0.5, 0.1)}):
        with pytest.raises(UsageError, match=r"must be|pair of sigmas|must lie"):
            pipe(**EMBEDS, **NEGATIVE, plan=TINY, **wrong)  # type: ignore[arg-type]


def test_without_distilled_guidance_the_scale_is_classifier_free() -> None:
    pooled: list[Any] = []
    pipe, _ = pipeline(manifest(SCHNELL, classes=5), fed("pooled_projections", pooled))
    pipe(class_labels=[2, 4], plan=TINY)
    assert pooled[0] == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    pipe(class_labels=2, plan=TINY, guidance_scale=3.0)
    assert pooled[-1] == [[0, 0, 1, 0, 0], [0] * 5]
    with pytest.raises(UsageError, match="true_cfg_scale is for models with distilled guidance"):
        pipe(class_labels=2, true_cfg_scale=3.0)


def test_guidance_is_the_usual_combination() -> None:
    def field(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.broadcast_to(feeds["pooled_projections"][:, 1:2, None] + 1, feeds["hidden_states"].shape)

    pipe, _ = pipeline(manifest(SCHNELL, classes=5), field)
    noise = np.zeros((1, 4, 16, 16))
    latents = pipe(class_labels=1, plan=Plan.full(3), guidance_scale=4.0, noise=noise, output_type="latent").images
    np.testing.assert_allclose(latents, -(1 + 4.0 * (2 - 1)))


def test_sd3_is_drawn_with_places_of_its_table() -> None:
    places: list[Any] = []
    pipe, _ = pipeline(manifest(SD3), fed("pos_ids", places))
    pipe(**EMBEDS, plan=TINY, guidance_scale=1.0)
    assert places[0][0] == [10, 10], "a small picture in the middle of 24 places"
    assert places[-1][0] == [8, 8]
    assert {round(row % 1, 1) for row, _ in places[1]} == {0.0, 0.5}
    with pytest.raises(UsageError, match="at most 192 px a side, got 224 x 64"):
        pipe(**EMBEDS, height=224)


def test_prompts_are_read_before_the_denoiser_is_opened(tmp_path: Path) -> None:
    opener = with_text(tmp_path)
    with ElasticPipeline(opener.bundle, opener) as pipe:
        result = pipe(["a cat", "a dog"], negative_prompt="blue", plan=TINY, true_cfg_scale=2.0, num_images_per_prompt=2)
    assert len(result.images) == 4
    assert [name for name, _ in opener.opened] == ["text_encoder", "text_encoder_2", "denoiser", "decoder"]
    assert opener.beside[2] == (), "what read the prompts is gone"
    assert opener.calls("text_encoder") == [{"input_ids": (3, 5)}], "the negative prompt is read with the others, once"


def test_true_guidance_leads_away_from_a_negative_prompt_that_is_given(tmp_path: Path) -> None:
    opener = with_text(tmp_path)
    pooled: list[Any] = []
    opener._functions["denoiser"] = lambda feeds: {"prediction": fed("pooled_projections", pooled)(feeds).astype(np.float32)}
    pipe = ElasticPipeline(opener.bundle, opener)
    pipe("a cat", plan=TINY, true_cfg_scale=2.0, negative_prompt="")
    assert pooled[0] == [[2, 3, 1, 1, 1], [1, 1, 1, 1, 1]]
    with pytest.raises(UsageError, match='true_cfg_scale leads away from a negative_prompt: give one, "" for the empty prompt'):
        pipe("a cat", plan=TINY, true_cfg_scale=2.0)
    pipe("a cat", plan=TINY, true_cfg_scale=0.5)  # off, as diffusers has it
    assert pooled[-1] == [[2, 3, 1, 1, 1]]


@pytest.mark.parametrize("scale", [0, 0.0, 0.7, 1])
def test_guidance_of_nothing_is_off_as_diffusers_examples_have_it(scale: float) -> None:
    pooled: list[Any] = []
    for kind in (SCHNELL, SD3):
        pipe, _ = pipeline(manifest(kind), fed("pooled_projections", pooled))
        pipe(**EMBEDS, plan=TINY, guidance_scale=scale)
        assert len(pooled[-1]) == 1


def test_a_model_that_was_distilled_without_guidance_refuses_it_and_takes_true_guidance() -> None:
    pooled: list[Any] = []
    pipe, _ = pipeline(manifest(SCHNELL), fed("pooled_projections", pooled))
    with pytest.raises(UsageError, match="distilled to draw without guidance, .* lead away from a negative_prompt with true_cfg_scale"):
        pipe(**EMBEDS, plan=TINY, guidance_scale=3.5)
    pipe(**EMBEDS, **NEGATIVE, plan=TINY, true_cfg_scale=3.5)
    assert len(pooled[-1]) == 2


@pytest.mark.parametrize("text", ["cat \udcff", "\ud800"])
def test_a_prompt_that_is_no_text_is_named(text: str) -> None:
    pipe, _ = pipeline()
    for arguments in ({"prompt": text}, {"prompt": "a cat", "negative_prompt": ["", text], "true_cfg_scale": 2.0}):
        with pytest.raises(UsageError, match="prompt is no valid Unicode text, at place"):
            pipe(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tiny draws from prompt or prompt_embeds, got neither"),
        ({"class_labels": [1]}, "tiny draws from prompt or prompt_embeds, got class_labels"),
        (EMBEDS | {"prompt": "a cat"}, "got prompt and prompt_embeds"),
        ({"prompt": "a cat"}, "has no text encoders in this bundle"),
        ({"prompt": [""] * 0}, "prompt is a text or several, got []"),
        ({"prompt": 7}, "prompt is a text or several, got 7"),
        ({"prompt_embeds": np.ones((1, 3, 6))}, "prompt_embeds and pooled_prompt_embeds go together: give both"),
        ({"prompt": "a", "pooled_prompt_embeds": np.ones((1, 5))}, "pooled_prompt_embeds does not go with prompt"),
        (EMBEDS | {"prompt_embeds": np.ones((1, 3, 7))}, "must be (B, T, 6) and (B, 5), got (1, 3, 7) and (1, 5)"),
        (EMBEDS | {"pooled_prompt_embeds": np.ones((2, 5))}, "got (1, 3, 6) and (2, 5)"),
        (EMBEDS | NEGATIVE, "negative_prompt_embeds acts through classifier-free guidance, which is off: give true_cfg_scale"),
        (EMBEDS | {"negative_prompt": "blue"}, "negative_prompt does not go with prompt_embeds: give negative_prompt_embeds"),
        (EMBEDS | {"true_cfg_scale": 2.0}, "leads away from negative_prompt_embeds and negative_pooled_prompt_embeds: give both, or turn"),
        (EMBEDS | {"true_cfg_scale": 2.0, "negative_prompt_embeds": np.ones((1, 3, 6))}, "go together: give both"),
        (
            {"prompt_embeds": np.ones((1, 65, 6)), "pooled_prompt_embeds": np.ones((1, 5))},
            "takes 1-64 text tokens, and prompt_embeds",
        ),
        (
            EMBEDS | {"height": 16, "width": 272, "plan": "full"},
            "decodes widths of 4 to 256 px, and the picture has 272",
        ),
        (EMBEDS | {"true_cfg_scale": 2.0, "caching": Caching(frozenset()), "guidance_interval": (0.2, 1.0)}, "do not go together"),
        (EMBEDS | TWO | {"true_cfg_scale": 2.0}, "there are 1 prompt_embeds and 2 neg"),
        (EMBEDS | {"guidance_interval": (0.2, 1.0)}, "guidance_interval acts through guidance, which is off: give true_cfg_scale above 1"),
        (EMBEDS | {"guidance_scale": "3"}, "guidance_scale must be a number, 0 or more, got '3'"),
        (EMBEDS | {"prompt_embeds": np.float32(1)}, "prompt_embeds must have 3 dimensions, a prompt each in the first, got shape ()"),
        (EMBEDS | {"prompt_embeds": np.ones((0, 3, 6))}, "prompt_embeds must have 3 dimensions"),
        (EMBEDS | {"prompt_embeds": [[1], [2, 3]]}, "prompt_embeds must be an array of numbers, got list"),
        (EMBEDS | {"cfg_normalization": True}, "cfg_normalization acts through guidance, which is off: give true_cfg_scale above 1"),
        (EMBEDS | NEGATIVE | {"true_cfg_scale": 2.0, "cfg_normalization": -1}, "cfg_normalization must be a number, 0 or more, got -1"),
        (EMBEDS | {"plan": ["4x"]}, "plan is 4x, 7x, full, speed, mrflow, or a Plan, got ['4x']"),
        (EMBEDS | {"num_images_per_prompt": 0}, "num_images_per_prompt is a whole number from 1, got 0"),
        (EMBEDS | {"plan": "5x"}, "there is no plan '5x'"),
        (EMBEDS | {"plan": "3,4,5/0.2,0.4,1/0.3"}, "fit_plan((5, 6, 7), (0.3, 0.45, 1), 0.3) in Python"),
        (EMBEDS | {"plan": "full", "num_inference_steps": 10**20}, "a picture takes at most 100,000 steps, got 100000000000000000000"),
        (EMBEDS | {"caching": 2}, "caching is a Caching, such as Caching.every(plan, 2), got 2"),
        (EMBEDS | NEGATIVE | {"true_cfg_scale": "2"}, "true_cfg_scale must be a number, 0 or more, got '2'"),
        (EMBEDS | {"height": 56, "plan": "4x"}, "height is a multiple of 16 px for this plan, got 56"),
        (EMBEDS | {"width": 24, "plan": "4x"}, "width is a multiple of 16 px for this plan, got 24"),
        (EMBEDS | {"width": 20, "plan": "full"}, "width is a multiple of 8 px, got 20"),
        (EMBEDS | {"height": 0}, "height is a multiple of 8 px, got 0"),
        (EMBEDS | {"height": 64.0}, "height is a multiple of 8 px, got 64.0"),
        (EMBEDS | {"height": 16, "width": 32, "plan": "4x"}, "up_ratio 0.3 of 2 patches grows 0"),
        (EMBEDS | {"height": 512, "width": 512}, "takes 1-1024 image tokens, and a picture of 512 x 512 px needs 1945 in a stage"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_opened(arguments: dict[str, Any], message: str) -> None:
    pipe, opener = pipeline()
    with pytest.raises(UsageError, match=re.escape(message)):
        pipe(**arguments)
    assert not opener.opened


def test_without_a_decoder_only_latents_of_a_plain_plan_can_be_drawn() -> None:
    pipe, _ = pipeline(manifest(decoder=False))
    assert pipe(**EMBEDS, plan="full", output_type="latent").images.shape == (1, 4, 16, 16)
    for arguments in ({"plan": "full"}, {"plan": "4x", "output_type": "latent"}):
        with pytest.raises(UsageError, match="holds no decoder, without which there is no picture and no preview"):
            pipe(**EMBEDS, **arguments)  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_an_error() -> None:
    pipe, _ = pipeline(field=lambda feeds: np.full_like(feeds["hidden_states"], np.nan))
    with pytest.raises(InferenceError, match="step 0 gave values that are not finite"):
        pipe(**EMBEDS)


def test_a_decoder_that_gives_no_picture_is_an_error_and_no_black_one() -> None:
    opener = Opener(manifest(), to_zero, decoder=lambda feeds: {"image": np.full_like(decode(feeds)["image"], np.nan)})
    with pytest.raises(InferenceError, match="the decoder on fake gave values that are not finite"):
        ElasticPipeline(opener.bundle, opener)(**EMBEDS, plan="full")
    with pytest.raises(InferenceError, match="the decoder on fake"):
        ElasticPipeline(opener.bundle, opener)(**EMBEDS, plan="4x", output_type="latent")


def test_a_preview_that_the_decoder_does_not_take_is_told_before_anything_is_opened() -> None:
    whole = manifest()
    narrow = msgspec.structs.replace(whole.graphs["decoder"], dimensions=whole.graphs["decoder"].dimensions | {"h": Span(16, 64)})
    pipe, opener = pipeline(msgspec.structs.replace(whole, graphs=whole.graphs | {"decoder": narrow}))
    with pytest.raises(UsageError, match="decodes heights of 64 to 256 px, and its preview has 32"):
        pipe(**EMBEDS, plan="4x")
    assert pipe(**EMBEDS).images, "along full"
    assert pipe(**EMBEDS, height=128).images
    assert len(opener.calls("denoiser")) == 20 + 18


def test_a_bundle_for_the_full_resolution_alone_draws_at_it_where_no_plan_is_asked_for() -> None:
    whole = manifest()
    narrow = msgspec.structs.replace(whole.graphs["denoiser"], dimensions=whole.graphs["denoiser"].dimensions | {"S": Span(64, 64)})
    pipe, opener = pipeline(msgspec.structs.replace(whole, graphs=whole.graphs | {"denoiser": narrow}))
    assert pipe(**EMBEDS).images
    assert {call["hidden_states"][1] for call in opener.calls("denoiser")} == {64}
    with pytest.raises(UsageError, match="takes 64-64 image tokens"):
        pipe(**EMBEDS, plan="4x")


def test_what_the_session_was_compiled_for_is_checked_before_the_first_step() -> None:
    pipe, opener = pipeline()
    session = opener("denoiser")
    pipe._sessions["denoiser"] = session
    session.budgets = tuple(Budget(tokens=count, T=3) for count in (16, 19, 64))
    with pytest.raises(BudgetError, match=r"for 16, 19, 64 image tokens, and a stage of the plan needs 28: .* --budgets 16,19,28,64"):
        pipe(**EMBEDS, plan="4x")
    assert not opener.calls("denoiser")
    assert pipe(**EMBEDS, plan="7x").images
    session.budgets, session.batch = None, Span(2, 2)
    with pytest.raises(BudgetError, match="takes batches of 2-2; 1 samples"):
        pipe(**EMBEDS, num_images_per_prompt=2, plan="4x")
    assert len(opener.calls("denoiser")) == 10
    assert len(pipe(**EMBEDS, num_images_per_prompt=2, plan=Plan.full(2)).images) == 2


def test_sd3_is_guided_as_in_diffusers_where_nothing_is_asked_for() -> None:
    rows: list[Any] = []
    pipe, _ = pipeline(manifest(SD3), fed("timestep", rows))
    pipe(**EMBEDS, **NEGATIVE, plan=TINY)
    assert len(rows[0]) == 2
    with pytest.raises(UsageError, match="give both, or turn it off with a scale of 1"):
        pipe(**EMBEDS, plan=TINY)


def test_a_bundle_without_a_denoiser_says_so() -> None:
    whole = manifest()
    opened = Bundle(Path("nowhere"), msgspec.structs.replace(whole, graphs={"decoder": whole.graphs["decoder"]}))
    with pytest.raises(BundleError, match="has no graph 'denoiser', it has decoder: export the model again with --components"):
        ElasticPipeline.from_pretrained(opened)


def test_a_bundle_that_nothing_here_can_run_is_refused_at_once() -> None:
    whole = manifest()
    file = FileEntry(path="onnx/denoiser.onnx", bytes=1, sha256="")
    artifact = OnnxArtifact(precision="bf16", files=(file,), toolchain={}, opset=23)
    graph: Graph = msgspec.structs.replace(whole.graphs["denoiser"], artifacts=(artifact,))
    opened = Bundle(Path("nowhere"), msgspec.structs.replace(whole, graphs=whole.graphs | {"denoiser": graph}))
    with pytest.raises(MissingError, match="nothing here can run 'denoiser' of nowhere"):
        ElasticPipeline.from_pretrained(opened, "ort")
    assert repr(ElasticPipeline(opened, lambda graph: pytest.fail(graph))) == "ElasticPipeline.from_pretrained('nowhere')"
