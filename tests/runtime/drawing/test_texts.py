"""Texts of several lengths in one drawing."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import simulated
from fake_flux import EMBEDS, SCHNELL, manifest, pipeline, to_zero
from fake_prompts import flux

from elastic_runtime import BudgetError, ElasticPipeline, Request, Span, UsageError


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


@pytest.mark.parametrize(
    ("given", "message"),
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
    ],
)
def test_texts_and_masks_that_do_not_go_together_are_named(given: dict[str, Any], message: str) -> None:
    pipe, _ = pipeline()
    with pytest.raises(UsageError, match=re.escape(message)):
        pipe(**given)


def test_prompts_may_be_read_before_they_are_drawn(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    request = Request(prompt="a cat", negative_prompt="blue", true_cfg_scale=2.0, plan="full", num_inference_steps=1, seeds=0)
    with ElasticPipeline(opener.bundle, opener) as pipe:
        texts = pipe.read(request)
        assert [name for name, _ in opener.opened] == ["text_encoder", "text_encoder_2"]
        drawn = pipe.draw(request, texts=texts)
        assert [name for name, _ in opener.opened][2:] == ["denoiser", "decoder"]
        assert np.array_equal(np.asarray(drawn.images[0]), np.asarray(pipe.draw(request).images[0]))
        unguided = Request(prompt=("a cat", "a dog"), plan="full", num_inference_steps=1)
        with pytest.raises(
            UsageError, match="texts are of 1 prompts with negative ones, and the request is of 2 without: give what `read`"
        ):
            pipe.draw(unguided, texts=texts)
        with pytest.raises(UsageError, match="texts are what `read` gives of a request, got 'a cat'"):
            pipe.draw(request, texts="a cat")  # type: ignore[arg-type]


def test_a_request_without_words_has_nothing_to_read() -> None:
    pipes = pipeline(manifest(SCHNELL, classes=5))[0], simulated.pipeline(simulated.Machine())
    for pipe in pipes:
        request = Request(class_labels=(1,), seeds=3, output_type="latent")
        texts = pipe.read(request)
        assert texts is None
        np.testing.assert_array_equal(pipe.draw(request, texts=texts).images, pipe.draw(request).images)
        with pytest.raises(UsageError, match="classes"):
            pipe.read(Request(class_labels=(99,)))


def test_texts_of_a_request_that_draws_classes_are_refused(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    with ElasticPipeline(opener.bundle, opener) as reader, simulated.pipeline(simulated.Machine()) as pipe:
        texts = reader.read(Request(prompt="a cat"))
        with pytest.raises(UsageError, match="this request has none: leave texts out"):
            pipe.draw(Request(class_labels=(1,)), texts=texts)
