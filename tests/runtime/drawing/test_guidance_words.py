"""Scales of guidance as the model's own pipeline counts them."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import EMBEDS, NEGATIVE, SCHNELL, manifest, pipeline

from elastic_runtime import Plan, UsageError
from elastic_runtime.denoising.conditions import USUAL


@pytest.mark.parametrize(("scale", "factor"), [(0, 1), (0.5, 1.5), (None, 5.0)])
def test_guidance_that_is_off_at_0_leads_from_the_strong_prediction(scale: float | None, factor: float, monkeypatch: Any) -> None:
    """`strong + g (strong - weak)`, as Z-Image's and Krea 2's pipelines have it."""
    whole = manifest(SCHNELL)
    off = msgspec.structs.replace(whole, model=msgspec.structs.replace(whole.model, guidance_off=0, distilled=False, family="imagen"))
    monkeypatch.setitem(USUAL, "imagen", 4.0)
    rows: list[int] = []

    def field(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        rows.append(len(feeds["hidden_states"]))
        return np.ones_like(feeds["hidden_states"]) * feeds["pooled_projections"][:, :1, None]

    pipe, _ = pipeline(off, field)
    negative = NEGATIVE if factor > 1 else {}
    result = pipe(**EMBEDS, **negative, plan="full", num_inference_steps=1, guidance_scale=scale, noise=np.zeros((1, 4, 16, 16)),
        output_type="latent")  # fmt: skip
    np.testing.assert_allclose(result.images, -factor, rtol=1e-6)  # one step from 1 to 0 of the velocity (1 + g) 1
    assert (rows, result.facts["guidance"]) == ([1 if factor == 1 else 2], factor - 1)
    if factor == 1:
        with pytest.raises(UsageError, match="classifier-free guidance, which is off: give guidance_scale above 0"):
            pipe(**EMBEDS, **NEGATIVE, plan=Plan.full(2), guidance_scale=scale)


def test_an_interval_may_be_a_list() -> None:
    for pair in ([0.0, 1.0], (0.0, 1.0)):
        assert pipeline()[0](**EMBEDS, plan="full", num_inference_steps=1, guidance_interval=pair).images
        with pytest.raises(UsageError, match="guidance_interval acts through guidance, which is off"):
            pipeline()[0](**EMBEDS, plan="full", guidance_interval=[0.1, pair[1]])


def test_normalization_caps_the_guided_prediction() -> None:
    def field(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.ones_like(feeds["hidden_states"]) * feeds["pooled_projections"][:, :1, None]

    pipe, _ = pipeline(field=field)
    drawn = EMBEDS | NEGATIVE | {"true_cfg_scale": 4.0, "noise": np.zeros((1, 4, 16, 16)), "output_type": "latent", "plan": "full"}
    for normalization, factor in ((False, 4), (True, 1), (2.5, 2.5), (9, 4)):
        images = pipe(**drawn, num_inference_steps=1, cfg_normalization=normalization).images
        np.testing.assert_allclose(images, -factor, rtol=1e-6)
