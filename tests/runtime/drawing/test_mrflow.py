"""Plan `mrflow` through the pipeline: a finished small picture, enlarged in its pixels, encoded, and drawn again in one step."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import CHANNELS, EMBEDS, ENCODER, SCHNELL, Opener, manifest, to_zero

from elastic_runtime import Auto, ElasticPipeline, Plan, Request, UsageError
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.ralu.offers import mrflow

ROWS = tuple(Cost(budget={"tokens": n}, flops=1000 * n, weight_bytes=4000, activation_bytes=100 * n) for n in (16, 34, 64))


def pipeline(field: Any = to_zero, few_steps: int | None = None, encoder: bool = True) -> tuple[ElasticPipeline, Opener]:
    whole = msgspec.structs.replace(manifest(SCHNELL, **({"encoder": ENCODER} if encoder else {})), cost=ROWS)
    whole = msgspec.structs.replace(whole, model=msgspec.structs.replace(whole.model, few_steps=few_steps))
    opener = Opener(whole, field)
    return ElasticPipeline(opener.bundle, opener), opener


def test_a_small_picture_is_finished_enlarged_and_drawn_again() -> None:
    pipe, opener = pipeline()
    result = pipe(**EMBEDS, plan="mrflow", num_inference_steps=4, height=64, width=96, seeds=1)
    assert [(step.stage, step.budget["tokens"]) for step in result.steps] == [(0, 24)] * 3 + [(1, 96)]
    assert [step.next_time for step in result.steps][2:] == [0.0, 0.0]
    assert result.steps[3].time == 0.4
    assert [call["latent"][2:] for call in opener.calls("decoder")] == [(8, 12), (16, 24)]
    assert [call["image"] for call in opener.calls("encoder")] == [(1, 3, 64, 96)]
    assert [session.closed for name, session in opener.opened if name == "encoder"] == [True]
    assert np.unique(np.asarray(result.images[0])).tolist() == [191]


def test_the_second_stage_begins_with_the_enlarged_picture_in_noise() -> None:
    """The small picture is what the first stage makes of nothing: grey, which enlarging leaves as it is."""
    seen: list[np.ndarray] = []

    def field(feeds: Any) -> np.ndarray:
        seen.append(feeds["hidden_states"])
        return to_zero(feeds)

    pipe, _ = pipeline(field)
    plan = mrflow(2, 64, {"shift": 3.0}, again=0.25)
    pipe(**EMBEDS, plan=plan, generator=np.random.default_rng(0), output_type="latent")
    source = np.random.default_rng(0)
    source.standard_normal((1, CHANNELS, 16, 16))  # the first stage's
    grain = source.standard_normal((1, CHANNELS, 16, 16))
    # latent 0 is decoded to 0.5, of which a pixel has 191/255; encoded, that is minus the shift 0.5, times 2
    grey = ((191 / 255 * 2 - 1) - 0.5) * 2
    assert seen[1].mean() == pytest.approx((0.25 * grain + 0.75 * grey).mean(), abs=1e-5)
    assert seen[1].std() == pytest.approx(0.25 * grain.std(), abs=1e-5)


def test_a_picture_is_the_same_alone_and_in_any_batch_and_draws_again() -> None:
    field = lambda feeds: np.sin(3 * feeds["hidden_states"])  # noqa: E731
    embeds = {name: np.repeat(array, 2, axis=0) for name, array in EMBEDS.items()}
    together = pipeline(field)[0](**embeds, plan="mrflow", seeds=(4, 5), output_type="latent")
    for index, seed in enumerate((4, 5)):
        alone = pipeline(field)[0](**EMBEDS, plan="mrflow", seeds=seed, output_type="latent").images
        np.testing.assert_allclose(alone[0], together.images[index], rtol=1e-5, atol=1e-6)
    again = pipeline(field)[0].draw(Request.from_json(together.request.to_json()))
    np.testing.assert_array_equal(again.images, together.images)


def test_auto_takes_it_in_the_steps_of_the_default() -> None:
    plain, auto = (pipeline()[0](**EMBEDS, plan="mrflow", policy=policy, output_type="latent", seeds=1) for policy in (None, Auto()))
    assert plain.plan == auto.plan
    assert plain.plan is not None
    assert plain.plan.steps == (19, 1)
    np.testing.assert_array_equal(pipeline()[0].draw(auto.request).images, plain.images)


def test_its_step_comes_on_top_of_the_few_of_a_distilled_model() -> None:
    result = pipeline(few_steps=4)[0](**EMBEDS, plan="mrflow", output_type="latent", seeds=1)
    assert result.plan is not None
    assert result.plan.steps == (4, 1)


def test_policies_weigh_it_where_there_is_an_encoder() -> None:
    options = {}
    for encoder in (True, False):
        outlook = pipeline(encoder=encoder)[0].outlook(Request(**EMBEDS, policy=Auto()))
        options[encoder] = {option.name.partition(",")[0] for option in outlook.options()}
    assert options[True] - options[False] == {"mrflow"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_inference_steps": 1}, "plan 'mrflow' takes a step at each of its two resolutions, got 1"),
        ({"height": 24}, "height is a multiple of 16 px for this plan, got 24"),
    ],
)
def test_what_it_cannot_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline()[0](**EMBEDS, plan="mrflow", **asked)


def test_without_an_encoder_it_says_how_to_get_one() -> None:
    with pytest.raises(UsageError, match=r"holds no encoder, .*--components transformer,vae,encoder"):
        pipeline(encoder=False)[0](**EMBEDS, plan="mrflow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"again": 1.0}, "again is a sigma between 0 and 1 of a plan that grows in pixels, got 1.0"),
        ({"again": None}, "again is a sigma .*, got None"),
        ({"end_times": (0.5, 1.0)}, r"what grows in pixels is a finished picture, so both end times are 1, got \(0.5, 1.0\)"),
        ({"growth": "spectrum", "end_times": (0.5, 1.0)}, "again is a sigma .*, got 0.4 of spectrum"),
    ],
)
def test_a_wrong_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {"steps": (3, 1), "end_times": (1.0, 1.0), "shifts": (2.0, 2.0), "growth": "pixels", "again": 0.4}
    assert Plan(**good) == Plan((3, 1), (1.0, 1.0), (2.0, 2.0), growth="pixels", again=0.4)
    with pytest.raises(UsageError, match=message):
        Plan(**good | changes)
