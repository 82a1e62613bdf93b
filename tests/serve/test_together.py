"""Drawings that share runs: each picture is what it is alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_runtime import Budget, ElasticPipeline, InferenceError, Request
from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.sessions.fake import FakeSession
from elastic_runtime.sessions.session import Arrays
from elastic_serve.together import Drawing, Ran, Shared, pause, step

CLOSE = 1e-5  # of float32: what the artifact is held to


@pytest.fixture(scope="module")
def pipe(digits: Path) -> Iterator[ElasticPipeline]:
    with ElasticPipeline.from_pretrained(digits, "ort", lanes=1) as opened:
        yield opened


def shared(pipe: ElasticPipeline) -> ElasticPipeline:
    session = Shared(pipe.session("denoiser"))
    return ElasticPipeline(pipe.bundle, {"denoiser": session})


def drawing(pipe: ElasticPipeline, request: Request) -> Drawing:
    def between(*_: Any) -> dict[str, np.ndarray]:
        pause()
        return {}

    return Drawing(lambda: pipe.draw(request, callback_on_step_end=between))


def request(seed: int, **words: Any) -> Request:
    return Request(class_labels=seed % 10, seeds=(seed,), num_inference_steps=4, output_type="latent", **words)


def drawn(drawings: list[Drawing], pipe: ElasticPipeline) -> list[Ran]:
    """Take all of them to their ends, a step of all at a time."""
    ran = []
    while left := [each for each in drawings if not each.done]:
        ran.append(step(left, pipe.session("denoiser")))
    return ran


DIFFERENT = {
    "steps, seeds and classes": [{}, {}, {}],
    "guidance": [{"guidance_scale": 2.0}, {"guidance_scale": 7.0}],
    "some with guidance": [{"guidance_scale": 2.0}, {}],
    "samplers": [{"sampler": "heun"}, {"sampler": "ab2"}, {"sampler": "sde"}],
    "budgets": [{"budget": Budget(latents=16)}, {"budget": Budget(latents=64)}],
    "a cheaper weak branch": [{"guidance_scale": 2.0, "guidance_budget": Budget(latents=16)}, {"guidance_scale": 3.0}],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_picture_is_the_same_alone_and_in_shared_runs(pipe: ElasticPipeline, name: str) -> None:
    requests = [request(seed, **words) for seed, words in enumerate(DIFFERENT[name], start=3)]
    alone = [pipe.draw(each).images for each in requests]
    through = shared(pipe)
    drawings = [drawing(through, each) for each in requests]
    drawn(drawings, pipe)
    assert [each.error for each in drawings] == [None] * len(drawings)
    for own, together in zip(alone, drawings, strict=True):
        assert np.abs(together.result.images - own).max() <= CLOSE


def test_what_is_alike_shares_one_run_a_step(pipe: ElasticPipeline) -> None:
    through = shared(pipe)
    ran = drawn([drawing(through, request(seed)) for seed in range(3)], pipe)
    assert ran[:4] == [Ran(1, 3)] * 4


def test_one_joins_while_another_is_under_way(pipe: ElasticPipeline) -> None:
    through, session = shared(pipe), pipe.session("denoiser")
    first, second = drawing(through, request(1)), drawing(through, request(2))
    assert step([first], session) == Ran(1, 1)
    assert step([first, second], session) == Ran(1, 2)
    drawn([first, second], pipe)
    for each, seed in ((first, 1), (second, 2)):
        assert np.abs(each.result.images - pipe.draw(request(seed)).images).max() <= CLOSE


def test_more_rows_than_a_run_takes_are_several_runs(pipe: ElasticPipeline) -> None:
    through, most = shared(pipe), pipe.session("denoiser").batch.max
    ran = drawn([drawing(through, request(seed)) for seed in range(most + 1)], pipe)
    assert ran[0].runs == 2
    assert ran[0].rows <= most


def test_one_that_is_cancelled_leaves_the_others_as_they_are(pipe: ElasticPipeline) -> None:
    through = shared(pipe)
    one, other = drawing(through, request(1)), drawing(through, request(2))
    step([one, other], pipe.session("denoiser"))
    one.cancel()
    assert one.done
    assert one.result is None
    drawn([other], pipe)
    assert np.abs(other.result.images - pipe.draw(request(2)).images).max() <= CLOSE


def test_an_error_before_the_first_step_is_that_drawings_own(pipe: ElasticPipeline) -> None:
    through = shared(pipe)
    wrong, right = drawing(through, request(1, sampler="none")), drawing(through, request(2))
    drawn([wrong, right], pipe)
    assert "there is no sampler" in str(wrong.error)
    assert right.error is None


def test_where_a_shared_run_fails_each_is_tried_alone(pipe: ElasticPipeline) -> None:
    graph = pipe.bundle.manifest.graphs["denoiser"]

    def answer(feeds: Arrays) -> dict[str, np.ndarray]:
        if (feeds["class_labels"] == 3).any():
            raise InferenceError("three is too much")
        return {"prediction": feeds["sample"]}

    session = FakeSession(graph, answer)
    through = ElasticPipeline(pipe.bundle, {"denoiser": Shared(session)})
    drawings = [drawing(through, request(seed)) for seed in (2, 3)]
    while left := [each for each in drawings if not each.done]:
        step(left, session)
    assert drawings[0].error is None
    assert str(drawings[1].error) == "three is too much"


def test_outside_of_a_drawing_a_shared_session_runs_as_ever(pipe: ElasticPipeline) -> None:
    graph: Graph = pipe.bundle.manifest.graphs["denoiser"]
    session = FakeSession(graph, lambda feeds: {"prediction": feeds["sample"]})
    through = ElasticPipeline(pipe.bundle, {"denoiser": Shared(session)})
    assert through.draw(request(1)).images.shape == (1, 1, 16, 16)
    through.close()
    assert session.closed
