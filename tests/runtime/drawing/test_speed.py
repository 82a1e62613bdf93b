"""Plan `speed` through the pipeline: for every way to place tokens, alone and in a batch, under a policy, and what it needs."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import EMBEDS, FLUX, FLUX2, QWEN, SCHNELL, SD3, UPSCALE, Z_IMAGE, Opener, manifest, to_zero

from elastic_runtime import Caching, ElasticPipeline, Plan, Request, Span, UsageError
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.ralu.offers import speed

PLAN = speed(6, 64, {"shift": 3.0})


def pipeline(patches: Patches = SCHNELL, field: Any = to_zero, **changes: Any) -> tuple[ElasticPipeline, Opener]:
    opener = Opener(manifest(patches, **changes), field)
    return ElasticPipeline(opener.bundle, opener), opener


def embeds(count: int) -> dict[str, np.ndarray]:
    return {name: np.repeat(array, count, axis=0) for name, array in EMBEDS.items()}


@pytest.mark.parametrize("patches", [FLUX, SCHNELL, SD3, QWEN, FLUX2, Z_IMAGE], ids=["flux", "schnell", "sd3", "qwen", "flux2", "z-image"])
def test_the_low_stage_is_a_small_picture_at_whole_places(patches: Patches) -> None:
    seen: list[np.ndarray] = []

    def field(feeds: Any) -> np.ndarray:
        seen.append(feeds[patches.positions][:, :2] if patches.table else feeds[patches.positions][:, 1:3])
        return to_zero(feeds)

    pipe, opener = pipeline(patches, field)
    result = pipe(**EMBEDS, plan="speed", num_inference_steps=6, guidance_scale=1.0, height=64, width=96)
    assert [picture.size for picture in result.images] == [(96, 64)]
    high, wide = (side // UPSCALE // patches.size for side in (64, 96))
    assert [record.budget["tokens"] for record in result.steps] == [high * wide // 4] * 4 + [high * wide] * 2
    for places, (rows, columns) in zip(seen, [(high // 2, wide // 2)] * 4 + [(high, wide)] * 2, strict=True):
        assert (places == places.round()).all()
        np.testing.assert_array_equal(np.ptp(places, axis=0), [rows - 1, columns - 1])
    assert [call["latent"][2:] for call in opener.calls("decoder")] == [(16, 24)], "no preview is decoded"
    assert np.unique(np.asarray(result.images[0])).tolist() == [191]


def test_a_picture_is_the_same_alone_and_in_any_batch() -> None:
    field = lambda feeds: np.sin(3 * feeds["hidden_states"] + feeds["img_ids"].sum(axis=1)[None, :, None])  # noqa: E731
    together = pipeline(field=field)[0](**embeds(3), plan="speed", seeds=(4, 5, 6), output_type="latent").images
    for index, seed in enumerate((4, 5, 6)):
        alone = pipeline(field=field)[0](**EMBEDS, plan="speed", seeds=seed, output_type="latent").images
        np.testing.assert_allclose(alone[0], together[index], rtol=1e-6)


def test_a_request_with_it_draws_again() -> None:
    pipe, _ = pipeline()
    result = pipe(**EMBEDS, plan=PLAN, seeds=3, output_type="latent")
    again = Request.from_json(result.request.to_json())
    assert again.plan == PLAN
    np.testing.assert_array_equal(pipe.draw(again).images, result.images)
    assert result.facts["plan"] == "own, 4+2 steps"
    assert pipe(**EMBEDS, plan="speed", num_inference_steps=6, output_type="latent").plan == PLAN


def test_what_it_needs() -> None:
    bundle, _ = pipeline(decoder=False)
    assert bundle(**EMBEDS, plan="speed", output_type="latent").images.shape == (1, 4, 16, 16), "nothing is previewed"
    with pytest.raises(UsageError, match="height is a multiple of 16 px for this plan, got 24"):
        bundle(**EMBEDS, plan="speed", height=24, output_type="latent")
    with pytest.raises(UsageError, match="plan 'speed' takes a step at each of its two resolutions, got 1"):
        bundle(**EMBEDS, plan="speed", num_inference_steps=1, output_type="latent")
    whole = manifest()
    graph = whole.graphs["denoiser"]
    narrow = msgspec.structs.replace(graph, dimensions=graph.dimensions | {"S": Span(28, 64)})
    opener = Opener(msgspec.structs.replace(whole, graphs=whole.graphs | {"denoiser": narrow}), to_zero)
    with pytest.raises(UsageError, match=r"takes 28-64 image tokens, and .* needs 16 in a stage"):
        ElasticPipeline(opener.bundle, opener)(**EMBEDS, plan="speed")


def test_steps_may_be_extrapolated_within_each_stage() -> None:
    plan = Plan((4, 4), (0.25, 1.0), (2.0, 2.0), growth="spectrum")
    result = pipeline()[0](**EMBEDS, plan=plan, caching=Caching.every(plan, 2), output_type="latent")
    assert [step.computed for step in result.steps] == [True, True, False, True] * 2
