"""Drawing over a picture: what is asked for wrongly, in which words and forms a picture may come, batches and masks."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import CHANNELS, EMBEDS, ENCODER, SCHNELL, UPSCALE, Opener, encode, manifest, to_zero
from PIL import Image

from elastic_runtime import (
    Auto,
    Deadline,
    ElasticPipeline,
    FitMemory,
    Fixed,
    InferenceError,
    Plan,
    Quality,
    Request,
    UsageError,
)
from elastic_runtime.choosing.option import Choice
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.manifest import Quality as Row
from elastic_runtime.ralu.plan import full

ROWS = tuple(Cost(budget={"tokens": n}, flops=1000 * n, weight_bytes=4000, activation_bytes=100 * n) for n in (16, 34, 64))
GREY = np.full((64, 64, 3), 128, np.uint8)


def still(feeds: Any) -> np.ndarray:
    return np.zeros_like(feeds["hidden_states"])


# a card that knows pictures from pure noise alone
CARD = tuple(
    Row(budget={}, plan=plan, steps=steps, accuracy=0.9, frechet_distance=1.0) for plan, steps in (("full", (10,)), ("4x", (5, 6, 7)))
)


def pipeline(field: Any = to_zero, encoder: Any = encode, card: tuple[Row, ...] = ()) -> tuple[ElasticPipeline, Opener]:
    whole = msgspec.structs.replace(manifest(SCHNELL, encoder=ENCODER), cost=ROWS, quality=card)
    opener = Opener(whole, field, encoder=encoder)
    return ElasticPipeline(opener.bundle, opener), opener


def embeds(count: int) -> dict[str, np.ndarray]:
    return {name: np.repeat(array, count, axis=0) for name, array in EMBEDS.items()}


def ramp(height: int = 64, width: int = 64) -> np.ndarray:
    return np.repeat(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], height, 0).repeat(3, 2)


def test_it_starts_from_the_picture_in_the_noise_of_its_first_sigma_and_takes_that_share_of_the_steps() -> None:
    pipe, opener = pipeline(still)
    noise = np.random.default_rng(0).standard_normal((1, CHANNELS, 16, 16))
    result = pipe(**EMBEDS, image=ramp(), strength=0.5, num_inference_steps=8, noise=noise, output_type="latent")
    assert result.plan is not None
    sigma = Plan.full(8, 3.0).stages()[0].sigmas[4]
    assert (result.plan.steps, result.plan.begin) == ((4,), sigma)
    assert [step.time for step in result.steps] == pytest.approx(Plan.full(8, 3.0).stages()[0].sigmas[4:-1])
    # the fake's VAE: latent = (encoded - 0.5) * 2
    encoded = (ramp()[::UPSCALE, ::UPSCALE, 0] / 255 * 2 - 1 - 0.5) * 2
    np.testing.assert_allclose(result.images, sigma * noise + (1 - sigma) * encoded, atol=1e-6)
    assert [session.closed for name, session in opener.opened if name == "encoder"] == [True]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(ramp()), ramp(), ramp() / 255, (ramp() / 255).astype(np.float32), [Image.fromarray(ramp())], ramp()[None],
        ramp()[:, :, 0], ramp()[:, :, :1], Image.fromarray(ramp()).convert("RGBA"),
    ],
    ids=["pil", "uint8", "float64", "float32", "list", "batch", "grey", "one channel", "with alpha"],
)  # fmt: skip
def test_a_picture_may_come_in_any_of_its_forms(image: Any) -> None:
    wanted = pipeline()[0](**EMBEDS, image=ramp(), seeds=1, output_type="latent").images
    np.testing.assert_array_equal(pipeline()[0](**EMBEDS, image=image, seeds=1, output_type="latent").images, wanted)


def test_its_own_size_is_meant_unless_another_is_asked_for() -> None:
    assert pipeline()[0](**EMBEDS, image=ramp(32, 96), seeds=1).images[0].size == (96, 32)
    assert pipeline()[0](**EMBEDS, image=ramp(50, 30), height=64, width=48, seeds=1).images[0].size == (48, 64)
    with pytest.raises(UsageError, match="height is a multiple of 8 px, got 50"):
        pipeline()[0](**EMBEDS, image=ramp(50, 64))


def test_where_the_mask_is_dark_the_picture_comes_back() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    pipe, _ = pipeline()
    seen = []
    result = pipe(
        **EMBEDS, image=ramp(), mask_image=mask, strength=1.0, num_inference_steps=4, seeds=1, output_type="latent",
        callback_on_step_end=lambda pipe, index, time, arrays: seen.append(arrays["latents"]) or {},
    )  # fmt: skip
    encoded = (ramp()[::UPSCALE, ::UPSCALE, 0] / 255 * 2 - 1 - 0.5) * 2
    np.testing.assert_allclose(result.images[0, 0, :, :8], encoded[:, :8], atol=1e-6)
    np.testing.assert_allclose(result.images[0, 0, :, 8:], 0, atol=1e-6)
    assert len(seen) == 4


def test_each_prompt_may_have_its_own_and_a_picture_is_the_same_alone() -> None:
    field = lambda feeds: np.sin(3 * feeds["hidden_states"])  # noqa: E731
    pictures = np.stack([ramp(), GREY])
    together = pipeline(field)[0](**embeds(2), image=pictures, seeds=(3, 4), output_type="latent").images
    for index, seed in enumerate((3, 4)):
        alone = pipeline(field)[0](**EMBEDS, image=pictures[index], seeds=seed, output_type="latent").images
        np.testing.assert_allclose(alone[0], together[index], rtol=1e-6)
    twice = pipeline(field)[0](**embeds(2), image=pictures, num_images_per_prompt=2, seeds=(3, 5, 4, 6), output_type="latent").images
    np.testing.assert_allclose(twice[[0, 2]], together, rtol=1e-6)


def test_a_request_is_json_and_a_policy_spreads_its_steps() -> None:
    mask = np.full((64, 64), 255, np.uint8)
    asked = Request(**EMBEDS, image=ramp(), mask_image=mask, strength=0.4, num_inference_steps=10, seeds=2, output_type="latent")
    again = Request.from_json(asked.to_json())
    np.testing.assert_array_equal(pipeline()[0].draw(asked).images, pipeline()[0].draw(again).images)
    late = pipeline(still)[0](**EMBEDS, image=ramp(), strength=0.4, policy=Deadline(30.0), seeds=2, output_type="latent")
    assert late.plan is not None
    assert late.plan.begin < 1
    replayed = pipeline(still)[0].draw(late.request)
    np.testing.assert_array_equal(replayed.images, late.images)


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({}, 12), ({"strength": 0.1}, 2), ({"strength": 0.58}, 12), ({"strength": 0.6, "num_inference_steps": 28}, 17),
        ({"strength": 0.9, "num_inference_steps": 50}, 45), ({"strength": 1.0}, 20),
    ],
)  # fmt: skip
@pytest.mark.parametrize("card", [(), CARD])
def test_a_policy_that_keeps_to_no_time_takes_the_steps_that_are_taken_without_one(asked: dict[str, Any], steps: int, card: Any) -> None:
    wanted = pipeline(still)[0](**EMBEDS, image=ramp(), seeds=2, output_type="latent", **asked)
    assert len(wanted.steps) == steps
    for policy in (Fixed(), Auto()):
        for plan in (None, "full"):
            drawn = pipeline(still, card=card)[0](**EMBEDS, image=ramp(), plan=plan, policy=policy, seeds=2, output_type="latent", **asked)
            assert (drawn.plan, drawn.facts["plan"]) == (wanted.plan, f"full, {steps} steps")
            np.testing.assert_array_equal(drawn.images, wanted.images)
            np.testing.assert_array_equal(pipeline(still, card=card)[0].draw(drawn.request).images, wanted.images)


def test_a_card_of_pictures_from_noise_tells_nothing_of_one_that_is_drawn_over() -> None:
    pipe, _ = pipeline(card=CARD)
    assert pipe(**EMBEDS, plan="full", policy=Quality(0.9), output_type="latent").plan == Plan.full(10, 3.0)
    with pytest.raises(UsageError, match=r"no quality table \(accuracy by plan of what is drawn over a picture\), so a quality cannot"):
        pipe(**EMBEDS, image=GREY, policy=Quality(0.9))
    outlook = pipe.outlook(Request(**EMBEDS, image=GREY, num_inference_steps=10, policy=Auto()))
    assert [option.name for option in outlook.options()] == ["full, 6 steps"]
    assert {sum(option.steps) for option in outlook.frontier()} <= set(range(1, 7))
    assert pipe(**EMBEDS, image=GREY, strength=0.5, num_inference_steps=8, policy=FitMemory(1e12)).facts["plan"] == "full, 4 steps"


def test_a_replay_is_of_its_own_picture_and_strength() -> None:
    pipe, _ = pipeline()
    noise = pipe(**EMBEDS, policy=Auto(), seeds=2, output_type="latent").request
    with pytest.raises(UsageError, match=r"the replay was drawn in 3 stages, and over this picture, .* leave policy out, or image and"):
        pipe.draw(msgspec.structs.replace(noise, image=GREY))
    over = pipe(**EMBEDS, image=ramp(), strength=0.9, policy=Deadline(30.0), seeds=2, output_type="latent").request
    with pytest.raises(UsageError, match=r"the replay was drawn at sigma 0\.9\d+, and over this picture, with this strength, it begins at"):
        pipe.draw(msgspec.structs.replace(over, strength=0.1))
    with pytest.raises(UsageError, match="a plan that begins below sigma 1 draws over a picture: give image"):
        pipe.draw(msgspec.structs.replace(over, image=None, strength=None))


def test_a_policy_of_one_s_own_names_a_plan_that_fits() -> None:
    class Own:
        def __init__(self, plan: Any):
            self.plan = plan

        def init(self, outlook: Any) -> None:
            pass

        def next(self, state: None, index: int, seconds: float) -> tuple[Choice, None]:
            return Choice(Budget(), Budget(), plan=self.plan if index == 0 else None), None

    pipe, _ = pipeline()
    assert len(pipe(**EMBEDS, policy=Own(Plan.full(3)), output_type="latent").steps) == 3
    for plan, image, message in (
        (None, None, "tiny draws along a plan, and this choice names none"),
        ("full", None, "and this choice names 'full'"),
        (Plan((2,), begin=0.5), None, "a plan that begins below sigma 1 draws over a picture: give image"),
        (Plan((2, 2), (0.4, 1.0), (1.0, 1.0), growth="spectrum"), GREY, "a picture is drawn over along a plan of one stage"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe(**EMBEDS, image=image, policy=Own(plan))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"image": GREY, "strength": 0.0}, "strength is above 0 .* and at most 1 .*, got 0.0"),
        ({"image": GREY, "strength": 1.5}, "got 1.5"),
        ({"image": GREY, "strength": True}, "got True"),
        (
            {"image": GREY, "mask_image": np.zeros((32, 64), np.uint8)},
            "mask_image has the size of image, 64 x 64 px, got 64 x 32: resize one",
        ),
        ({"strength": 0.5}, "strength is of a picture that is drawn over: give image"),
        ({"mask_image": GREY[:, :, 0]}, "mask_image is of a picture that is drawn over: give image"),
        ({"image": "cat.png"}, "image is a PIL picture, or an array .* got str"),
        ({"image": GREY * 2.0}, "image has floats from 0 to 1, got 256 to 256"),
        ({"image": np.zeros((64, 64, 4), np.uint8)}, r"of uint8 or of floats from 0 to 1, got uint8 \(64, 64, 4\)"),
        ({"image": [GREY, GREY[:32]]}, "image is a picture, or several of one size, got 64 x 64, 64 x 32"),
        ({"image": []}, "several of one size, got none"),
        ({"image": np.stack([GREY] * 3)}, "image is one for all 1 pictures, or one for each, got 3"),
        ({"image": GREY, "plan": "4x"}, "a picture is drawn over along a plan of one stage from pure noise, such as 'full'"),
        ({"image": GREY, "plan": "speed"}, "a plan of one stage from pure noise"),
        ({"plan": Plan((2,), begin=0.5)}, "a plan that begins below sigma 1 draws over a picture: give image"),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline()[0](**EMBEDS, **asked)


def test_a_bundle_without_an_encoder_says_how_to_get_one() -> None:
    opener = Opener(manifest(SCHNELL), to_zero)
    with pytest.raises(UsageError, match=r"holds no encoder, .*--components transformer,vae,encoder"):
        ElasticPipeline(opener.bundle, opener)(**EMBEDS, image=GREY)


def test_an_encoder_that_gives_nonsense_is_found() -> None:
    pipe, _ = pipeline(encoder=lambda feeds: {"latent": np.full((1, CHANNELS, 16, 16), np.nan, np.float32)})
    with pytest.raises(InferenceError, match="the encoder on fake gave values that are not finite"):
        pipe(**EMBEDS, image=GREY)


def test_the_shift_of_flux_2_is_that_of_all_steps_though_some_are_taken() -> None:
    whole = full(10, 4096, {"use_dynamic_shifting": True, "mu": "empirical"})
    over = whole.over(0.4)
    assert (over.steps, over.shifts, over.empirical) == ((4,), whole.shifts, None)
    assert over.stages()[0].sigmas == pytest.approx(whole.stages()[0].sigmas[6:])
