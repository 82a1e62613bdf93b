"""Which sampler a model gets, what a picture begins from, and token models in the pipeline."""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import manifest, model

from elastic_runtime import Axis, Budget, ElasticPipeline, FakeSession, Span, UsageError
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.schedule import CosineMask, RectifiedFlow, ShiftedCosine
from elastic_runtime.sampling.fitting import OFFERED, sampler, start

LOOPS = Axis(name="loops", min=1, max=8, step=1, default=6, input="loops", carrier="value")
V = model(1, prediction="v", schedule=ShiftedCosine.at(8))
MASKED = model(1, prediction="logits", schedule=CosineMask(vocabulary=5), tokens="grey", sample_shape=(1, 4, 4))


@pytest.mark.parametrize(("described", "name"), [(model(), "euler"), (V, "ddpm"), (MASKED, "maskgit")])
def test_the_schedule_suggests_a_sampler(described: Any, name: str) -> None:
    assert sampler(described)[0] == name
    for other in OFFERED[type(described.schedule)]:
        assert sampler(described, other)[0] == other
    for unfit in {each for names in OFFERED.values() for each in names} - set(OFFERED[type(described.schedule)]):
        with pytest.raises(UsageError, match=re.escape(f"sampler {unfit!r} does not fit; tiny, whose schedule is")):
            sampler(described, unfit)


def test_what_pictures_begin_from() -> None:
    source = np.random.default_rng(0)
    assert start(V, 2, source).shape == (2, 1, 8, 8)
    assert (start(MASKED, 2, source) == 5).all()
    with pytest.raises(UsageError, match="begins from no noise"):
        start(MASKED, 1, source, np.zeros((1, 1, 4, 4)))
    with pytest.raises(UsageError, match=r"noise must have shape \(2, 1, 8, 8\)"):
        start(V, 2, source, np.zeros((1, 1, 8, 8)))
    with pytest.raises(UsageError, match="temperature must be 0 or more, got -1"):
        sampler(MASKED, None, -1)


def graph(described: Any) -> Graph:
    label, loops = TensorSpec(name="class_labels", dtype="int64", shape=("B",)), TensorSpec(name="loops", dtype="int64", shape=())
    if described.tokens:
        inputs: tuple[TensorSpec, ...] = (TensorSpec(name="tokens", dtype="int64", shape=("B", 16)),)
        outputs = (TensorSpec(name="logits", dtype="float32", shape=("B", 16, 5)),)
    else:
        inputs = (
            TensorSpec(name="sample", dtype="float32", shape=("B", 1, 8, 8)),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
        )
        outputs = (TensorSpec(name="prediction", dtype="float32", shape=("B", 1, 8, 8)),)
    return Graph(inputs=(*inputs, label, loops), outputs=outputs, dimensions={"B": Span(1, 4)}, artifacts=())


def pipeline(described: Any, function: Any) -> tuple[ElasticPipeline, list[tuple[int, list[int]]]]:
    """A pipeline on `function(feeds)`, and the (loops, labels) of each of its runs."""
    seen: list[tuple[int, list[int]]] = []

    def run(feeds: Any) -> dict[str, np.ndarray]:
        seen.append((int(feeds["loops"]), feeds["class_labels"].tolist()))
        return function(feeds)

    whole = msgspec.structs.replace(manifest(1), model=described, axes=(LOOPS,), graphs={"denoiser": graph(described)})
    return ElasticPipeline(Bundle(Path("bundle"), whole), {"denoiser": FakeSession(graph(described), run)}), seen


def test_guidance_with_fewer_loops_on_the_weak_branch() -> None:
    pipe, seen = pipeline(V, lambda feeds: {"prediction": np.zeros_like(feeds["sample"])})
    pipe([7], num_inference_steps=2, guidance_scale=3.0, budget=Budget(loops=4), guidance_budget=Budget(loops=1))
    assert seen == [(4, [7]), (1, [10])] * 2
    with pytest.raises(UsageError, match="loops 9 is not available: this model offers 1-8"):
        pipe([7], budget=Budget(loops=9))


def test_pixels_of_a_v_model_stay_within_their_range() -> None:
    pipe, _ = pipeline(V, lambda feeds: {"prediction": np.full_like(feeds["sample"], -50.0)})
    assert (np.abs(pipe([1], num_inference_steps=3, output_type="latent").images) <= 1 + 1e-9).all()


def test_tokens_become_greys() -> None:
    wanted = np.arange(16) % 5
    logits = np.where(np.arange(5) == wanted[:, None], 0.0, -1e9).astype(np.float32)
    pipe, seen = pipeline(MASKED, lambda feeds: {"logits": np.broadcast_to(logits, (len(feeds["tokens"]), 16, 5)).astype(np.float32)})
    pictures = pipe([3, 4], num_inference_steps=4, guidance_scale=2.0, output_type="np").images
    assert seen[0] == (6, [3, 4, 10, 10])
    np.testing.assert_allclose(pictures, np.broadcast_to((wanted / 4).reshape(4, 4, 1), (2, 4, 4, 1)), atol=1e-6)
    assert (pipe.images(np.full((1, 1, 4, 4), 5), "np") == 0.5).all()


def test_codes_need_a_decoder_that_is_not_here() -> None:
    described = msgspec.structs.replace(MASKED, tokens="code")
    pipe, _ = pipeline(described, lambda feeds: {"logits": np.zeros((len(feeds["tokens"]), 16, 5), np.float32)})
    with pytest.raises(UsageError, match="their decoder is not part of it"):
        pipe([1], num_inference_steps=2)
    assert pipe([1], num_inference_steps=2, output_type="latent").images.dtype == np.int64


@pytest.mark.parametrize("schedule", [RectifiedFlow(), ShiftedCosine(shift=1.5), CosineMask(vocabulary=16)])
def test_schedules_survive_the_manifest(schedule: Any) -> None:
    described = msgspec.structs.replace(V, schedule=schedule)
    assert msgspec.json.decode(msgspec.json.encode(described), type=type(described)) == described
