"""Reference pictures given as pictures: how they are made to fit, whose size is meant, what they say with and without a strength."""

from typing import Any

import numpy as np
import pytest
from fake_flux import CHANNELS, EMBEDS, ENCODER, FLUX2, SCHNELL, UPSCALE, Opener, manifest, to_zero
from PIL import Image

from elastic_runtime import ElasticPipeline, Request, UsageError
from elastic_runtime.drawing.beside import fitted

ASKED: dict[str, Any] = EMBEDS | {"guidance_scale": 1.0, "seeds": 1, "plan": "full", "output_type": "latent"}


def pipeline(field: Any = to_zero, encoder: bool = True) -> tuple[ElasticPipeline, Opener]:
    opener = Opener(manifest(FLUX2, **({"encoder": ENCODER} if encoder else {})), field)
    return ElasticPipeline(opener.bundle, opener), opener


def ramp(height: int, width: int) -> np.ndarray:
    return np.linspace(0, 255, height * width * 3).astype(np.uint8).reshape(height, width, 3)


def beside(feeds: Any) -> np.ndarray:
    """A prediction that depends on all tokens."""
    return np.broadcast_to(feeds["hidden_states"].mean(axis=(1, 2), keepdims=True), feeds["hidden_states"].shape)


def test_they_stand_beside_the_picture_as_the_encoder_s_latents_and_the_encoder_is_closed_before_the_denoiser() -> None:
    pipe, opener = pipeline(beside)
    pictures = [ramp(71, 66), ramp(64, 80)]
    drawn = pipe(**ASKED, image=pictures, height=32, width=32)
    cut = [pictures[0][1:69, 1:65], pictures[1]]  # the middle, in tokens of 4 px
    latents = [(each[::UPSCALE, ::UPSCALE, 0] / 255 * 2 - 1 - 0.5) * 2 for each in cut]  # the fake's VAE, one value in all channels
    same = pipe(**ASKED, image_latents=[np.stack([each] * CHANNELS) for each in latents], height=32, width=32)
    np.testing.assert_allclose(drawn.images, same.images, atol=1e-6)
    assert (drawn.facts["references"], drawn.facts["tokens"]) == (17 * 16 + 16 * 20, (64 + 17 * 16 + 16 * 20,))
    assert np.abs(drawn.images - pipe(**ASKED, height=32, width=32).images).max() > 1e-3
    assert [names for names, (name, _) in zip(opener.beside, opener.opened, strict=True) if name == "denoiser"] == [()]
    assert [session.closed for name, session in opener.opened if name == "encoder"] == [True]


def test_what_is_drawn_has_the_first_one_s_size_unless_another_is_asked_for() -> None:
    pipe, _ = pipeline()
    assert pipe(**ASKED, image=[ramp(70, 80), ramp(64, 64)]).images.shape[2:] == (17, 20)
    assert pipe(**ASKED, image=ramp(70, 96), height=40).images.shape[2:] == (10, 24)


@pytest.mark.parametrize("form", [Image.fromarray, lambda array: array, lambda array: array / 255, lambda array: array[None]])
def test_a_reference_may_come_in_any_form_of_a_picture_and_a_request_is_json(form: Any) -> None:
    wanted = pipeline(beside)[0].draw(Request(**ASKED, image_reference=(ramp(64, 64),)))
    result = pipeline(beside)[0](**ASKED, image=form(ramp(64, 64)))
    np.testing.assert_array_equal(result.images, wanted.images)
    again = Request.from_json(result.request.to_json())
    assert again.image is None
    np.testing.assert_array_equal(pipeline(beside)[0].draw(again).images, wanted.images)


def test_with_a_strength_a_mask_or_references_of_its_own_image_is_drawn_over() -> None:
    grey, white = np.full((64, 64, 3), 128, np.uint8), np.full((64, 64), 255, np.uint8)
    for more in ({"strength": 0.5}, {"mask_image": white}, {"image_reference": ramp(64, 64)}):
        drawn = pipeline()[0](**ASKED, image=grey, num_inference_steps=4, **more)
        assert drawn.plan is not None
        assert drawn.plan.begin < 1
        assert drawn.facts["references"] == (256 if "image_reference" in more else 0)


def test_one_of_odd_tokens_is_edited_after_where_no_plan_is_asked_for() -> None:
    pipe, _ = pipeline()
    drawn = pipe(**{name: value for name, value in ASKED.items() if name != "plan"}, image=ramp(68, 76))
    assert (drawn.facts["plan"], drawn.facts["size"]) == ("full, 20 steps", (17, 19))


def test_a_large_one_is_made_smaller() -> None:
    assert fitted(ramp(1500, 1100), 16).shape == (1184, 864, 3)
    assert fitted(ramp(1024, 1024), 16).shape == (1024, 1024, 3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"image": ramp(63, 80)}, "a reference picture has sides of 64 px or more, .* got 80 x 63 px"),
        ({"image": ramp(64, 513)}, "one at most 8 times as long as the other, got 513 x 64 px"),
        ({"image": ramp(64, 300)}, "encodes widths of 4 to 256 px, and a reference picture, made to fit, has 300: give it in another size"),
        ({"image": "cat.png"}, "a reference picture is a PIL picture, or an array .* got str"),
        ({"image": []}, "image_reference is a picture or several, got none"),
        (
            {"image": ramp(64, 64), "image_latents": [np.zeros((CHANNELS, 2, 2))]},
            "image_latents and image_reference are two ways to give reference pictures: give one",
        ),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline()[0](**ASKED, **asked)


def test_a_bundle_without_an_encoder_and_a_model_without_references_say_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"holds no encoder, .*--components transformer,vae,encoder.*or give .* image_latents"):
        pipeline(encoder=False)[0](**ASKED, image=ramp(64, 64))
    opener = Opener(manifest(SCHNELL, encoder=ENCODER), to_zero)
    for name, value in (("image_reference", ramp(64, 64)), ("image_latents", np.zeros((CHANNELS, 2, 2)))):
        with pytest.raises(UsageError, match=f"tiny draws beside no reference pictures: leave {name} out"):
            ElasticPipeline(opener.bundle, opener)(**EMBEDS, **{name: value})
