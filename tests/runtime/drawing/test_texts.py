"""Embeddings of several lengths in one drawing, and the cap of what guidance gives."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import Opener, manifest, to_zero

from elastic_runtime import BudgetError, ElasticPipeline, Span, UsageError

EMBEDS = {"prompt_embeds": np.ones((1, 3, 6)), "pooled_prompt_embeds": np.ones((1, 5))}
NEGATIVE = {"negative_prompt_embeds": np.zeros((1, 3, 6)), "negative_pooled_prompt_embeds": np.zeros((1, 5))}


def pipeline(whole: Any = None, field: Any = to_zero) -> tuple[ElasticPipeline, Opener]:
    opener = Opener(whole or manifest(), field)
    return ElasticPipeline(opener.bundle, opener), opener


def test_texts_of_several_lengths_are_cut_by_their_masks_and_run_apart() -> None:
    lengths: list[tuple[int, ...]] = []

    def field(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        lengths.append(feeds["encoder_hidden_states"].shape[:2])
        return to_zero(feeds) * feeds["encoder_hidden_states"].sum((1, 2))[:, None, None]

    pipe, _ = pipeline(field=field)
    embeds = {"prompt_embeds": np.ones((3, 5, 6)), "pooled_prompt_embeds": np.ones((3, 5)), "noise": np.ones((3, 4, 16, 16))}
    mask = np.arange(5) < np.array([[2], [5], [2]])
    images = pipe(**embeds, prompt_embeds_mask=mask, plan="full", num_inference_steps=1, output_type="latent").images
    assert lengths == [(2, 2), (1, 5)]
    np.testing.assert_allclose(images[:, 0, 0, 0], 1 - 6 * np.array([2, 5, 2]))
    lengths.clear()
    pipe(**embeds, plan="full", num_inference_steps=1, output_type="latent")
    assert lengths == [(3, 5)]


def test_a_batch_that_texts_of_several_lengths_part_too_far_is_refused() -> None:
    whole = manifest()
    graph = whole.graphs["denoiser"]
    pairs = msgspec.structs.replace(graph, dimensions=graph.dimensions | {"B": Span(2, 4)})
    pipe, _ = pipeline(msgspec.structs.replace(whole, graphs=whole.graphs | {"denoiser": pairs}))
    embeds = {"prompt_embeds": np.ones((2, 5, 6)), "pooled_prompt_embeds": np.ones((2, 5)), "plan": "full", "output_type": "latent"}
    assert len(pipe(**embeds).images) == 2
    with pytest.raises(BudgetError, match="takes batches of 2-4; 1 samples"):
        pipe(**embeds, prompt_embeds_mask=[[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def test_normalization_caps_the_guided_prediction() -> None:
    def field(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.ones_like(feeds["hidden_states"]) * feeds["pooled_projections"][:, :1, None]

    pipe, _ = pipeline(field=field)
    drawn = EMBEDS | NEGATIVE | {"true_cfg_scale": 4.0, "noise": np.zeros((1, 4, 16, 16)), "output_type": "latent", "plan": "full"}
    for normalization, factor in ((False, 4), (True, 1), (2.5, 2.5), (9, 4)):
        images = pipe(**drawn, num_inference_steps=1, cfg_normalization=normalization).images
        np.testing.assert_allclose(images, -factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            EMBEDS | {"prompt_embeds": [np.ones((3, 6)), np.ones((2, 6))]},
            "got list: texts of several lengths are padded to one, with a mask",
        ),
        (
            EMBEDS | {"prompt_embeds_mask": [[1, 1]]},
            "prompt_embeds_mask is 1 x 3, 1 for a text's own tokens, which come first and are some",
        ),
        (EMBEDS | {"prompt_embeds_mask": [[0, 1, 1]]}, "prompt_embeds_mask is 1 x 3, 1 for"),
        (EMBEDS | {"prompt_embeds_mask": [[0, 0, 0]]}, "prompt_embeds_mask is 1 x 3, 1 for"),
        (EMBEDS | {"prompt_embeds_mask": [[1, np.nan, 0]]}, "prompt_embeds_mask is 1 x 3, 1 for"),
        ({"prompt": "a cat", "prompt_embeds_mask": [[1]]}, "prompt_embeds_mask does not go with prompt"),
        (EMBEDS | {"negative_prompt_embeds_mask": [[1, 1, 0]]}, "negative_prompt_embeds_mask acts through classifier-free guidance, which"),
        (EMBEDS | {"cfg_normalization": True}, "cfg_normalization acts through guidance, which is off: give true_cfg_scale above 1"),
        (EMBEDS | NEGATIVE | {"true_cfg_scale": 2.0, "cfg_normalization": -1}, "cfg_normalization must be a number, 0 or more, got -1"),
    ],
)
def test_wrong_masks_and_normalizations_are_named_before_anything_is_opened(arguments: dict[str, Any], message: str) -> None:
    pipe, opener = pipeline()
    with pytest.raises(UsageError, match=re.escape(message)):
        pipe(**arguments)
    assert not opener.opened
