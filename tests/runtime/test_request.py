"""Requests as records: their JSON, what draws a picture again, and a seed a picture in every family."""

import base64
import io
import json
import re
import struct
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import SCHNELL, Opener
from fake_flux import manifest as flux_manifest
from fake_router import pipeline as routed
from fakes import manifest, model, session
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from simulated import Machine, pipeline, run_seconds
from simulated_plans import pipeline as planned

from elastic_runtime import (
    Auto,
    Axis,
    Budget,
    Bundle,
    Caching,
    Choice,
    Deadline,
    ElasticPipeline,
    FakeSession,
    FitLatency,
    FitMemory,
    Fixed,
    InferenceError,
    PerStep,
    Plan,
    Quality,
    Replay,
    Request,
    Span,
    UsageError,
)
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.schedule import CosineMask, ShiftedCosine
from elastic_runtime.ralu.plan import PRESETS

BUDGETS = st.builds(lambda n: Budget(latents=n), st.integers(1, 512))
SECONDS = st.floats(1e-3, 1e6)
POLICIES = st.one_of(
    st.builds(Fixed, BUDGETS, st.none() | BUDGETS),
    st.builds(PerStep, st.lists(BUDGETS, max_size=4).map(tuple)),
    st.builds(Deadline, SECONDS, st.none() | BUDGETS, st.floats(0, 0.9), st.integers(1, 9)),
    st.builds(FitLatency, SECONDS),
    st.builds(FitMemory, SECONDS),
    st.builds(Quality, st.floats(0.01, 1)),
    st.builds(Auto, st.floats(0.01, 1)),
    st.builds(Replay, st.lists(st.builds(Choice, BUDGETS, BUDGETS, st.none() | st.tuples(st.integers(1, 9)))).map(tuple)),
)
LABELS = st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=4).map(tuple)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@given(
    st.builds(
        Request, class_labels=st.none() | LABELS, prompt=st.none() | st.text() | st.lists(st.text()).map(tuple),
        num_inference_steps=st.none() | st.integers(1, 99), guidance_scale=st.none() | st.floats(1, 99), policy=st.none() | POLICIES,
        budget=st.none() | BUDGETS, seeds=st.none() | st.integers(0, 2**63 - 1) | st.lists(st.integers(0, 99)).map(tuple),
        plan=st.sampled_from([None, "4x", Plan.full(3, 2.0), PRESETS["7x"]]),
        caching=st.sampled_from([None, Caching(frozenset({3, 5})), Caching.every(PRESETS["4x"], 2, 0)]),
        output_type=st.sampled_from(["pil", "np", "latent"]),
    )
)  # fmt: skip
def test_a_request_survives_json(asked: Request) -> None:
    assert Request.from_json(asked.to_json()) == asked


def test_arrays_travel_too() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 3))
    back = Request.from_json(Request(noise=noise, prompt_embeds=noise.astype(np.float32)).to_json())
    np.testing.assert_array_equal(back.noise, noise)
    assert back.prompt_embeds is not None
    assert back.prompt_embeds.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"class_label": 3}', "unknown field `class_label`"),
        ('{"class_labels": "seven"}', "class_labels"),
        ('{"policy": {"policy": "soon"}}', "Invalid value 'soon'"),
        ('{"policy": {"policy": "deadline"}}', "missing required field `seconds`"),
        ('{"policy": {"seconds": 3}}', "missing required field `policy`"),
        ('{"policy": {"policy": "deadline", "seconds": -1}}', "a deadline must be a number of seconds above zero"),
        ('{"budget": {"latents": "64"}}', "a budget is an object of whole numbers"),
        ('{"budget": 64}', "a budget is an object of whole numbers"),
        ('{"noise": [1, 2]}', 'an array is an object {"npy": "base64 of a .npy file"}'),
        ('{"noise": {"npy": "AAAA"}}', "an array that numpy does not read"),
        ('{"plan": {"steps": [1, 2], "end_times": [1]}}', "a plan has an end time for each of its 2 stages"),
        ('{"plan": {"step": [1]}}', "step"),
        ('{"output_type": "tensor"}', "output_type"),
        ("[]", "got `array`"),
        ("{", "is not a request"),
        ("\ud800", "is not a request"),
        ("[" * 100_000, "is not a request"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named.replace("{", r"\{").replace("(", r"\(")):
        Request.from_json(text)


def test_a_pickle_in_an_array_is_not_read() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([print]), allow_pickle=True)
    with pytest.raises(UsageError, match="it holds objects"):
        Request.from_json(json.dumps({"noise": {"npy": base64.b64encode(stream.getvalue()).decode()}}))


def test_a_policy_of_ones_own_has_no_json() -> None:
    class Own:
        pass

    with pytest.raises(UsageError, match="no JSON form: Own is not a record"):
        Request(policy=Own()).to_json()  # type: ignore[arg-type]


def test_what_a_deadline_chose_is_drawn_again_bit_by_bit() -> None:
    for make, seconds in ((pipeline, 12 * run_seconds(30)), (planned, 0.12)):
        machine = Machine()
        pipe = make(machine)
        pipe.gauge.calibrated  # noqa: B018
        begun = machine.now
        machine.slowness = lambda now, begun=begun, seconds=seconds: 2.0 if now > begun + seconds / 3 else 1.0
        first = pipe(1, policy=Deadline(seconds), guidance_scale=2.0, output_type="latent")
        again = make(Machine()).draw(Request.from_json(first.request.to_json()))
        np.testing.assert_array_equal(first.images, again.images)
        assert [step.budget for step in again.steps] == [step.budget for step in first.steps]
        assert again.steps[0].reason == "as recorded"
        assert again.request.policy == first.request.policy


def test_a_replay_that_does_not_fit_is_refused() -> None:
    pipe = pipeline(Machine())
    full = Budget(latents=64)
    for choices, message in (
        ((), "has a choice for each step, got none"),
        ((Choice(full, full),) * 3, "ends after 3, and 1 are left to take"),
        ((Choice(full, full),) * 5, "4 are taken, and it has 5"),
        ((Choice(full, full, steps=(2, 3)), *(Choice(full, full),) * 3), "a whole number from 1 for one stage still to come, got (2, 3)"),
        ((Choice(full, full, steps=()),), "a whole number from 1 for one stage"),
        ((Choice(Budget(), Budget()),) * 4, "a choice names every axis, latents, got none"),
        ((Choice(Budget(latents=3), full),), "latents 3 is not available"),
        ((Choice(full, full, plan=PRESETS["4x"]),), "draws at budgets, not along a plan"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            pipe(1, num_inference_steps=4, policy=Replay(choices), output_type="latent")
    with pytest.raises(UsageError, match="this choice names none"):
        planned(Machine())(1, policy=Replay((Choice(full, full),)))


@pytest.mark.parametrize("steps", [(0, 6, 7), (-1, 6, 7), (5, 6), (5, 6, 7, 8), (5.0, 6, 7)])
def test_a_replay_of_other_stages_is_refused(steps: Any) -> None:
    tokens = Budget(tokens=16)
    choices = (Choice(tokens, tokens, plan=PRESETS["4x"], steps=steps), *(Choice(tokens, tokens),) * 17)
    with pytest.raises(UsageError, match="a whole number from 1 for each of the 3 stages"):
        planned(Machine())(1, policy=Replay(choices))


def test_a_replay_s_plan_is_the_request_s() -> None:
    pipe = planned(Machine())
    first = pipe(1, policy=FitLatency(0.1), seeds=3, output_type="latent")
    again = pipe.draw(first.request)
    assert again.facts["plan"] == first.facts["plan"]
    np.testing.assert_array_equal(again.images, first.images)
    with pytest.raises(UsageError, match="was drawn along another plan than 'full': leave plan out"):
        pipe.draw(replace(first.request, plan="full"))


def test_logits_that_are_not_finite_stop_the_picture() -> None:
    pipe = masked()
    broken = lambda feeds: {"logits": np.full((*feeds["tokens"].shape, 5), np.nan)}  # noqa: E731
    other = ElasticPipeline(pipe.bundle, {"denoiser": FakeSession(pipe.bundle.manifest.graphs["denoiser"], broken)})
    with pytest.raises(InferenceError, match="step 0 gave values that are not finite"):
        other(1, num_inference_steps=4, output_type="latent")


@pytest.mark.parametrize("labels", [np.array([1, 2]), range(1, 3), [1, 2]])
def test_labels_of_any_kind_are_in_the_request_that_draws_them_again(labels: Any) -> None:
    result = pipeline(Machine())(labels, num_inference_steps=2, output_type="latent")
    assert Request.from_json(result.request.to_json()).class_labels == (1, 2)


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="no JSON form"):
        Request(guidance_scale=float("nan")).to_json()


@pytest.mark.parametrize("shape", ["(99999999999,)", "(3,", "(2, 2)"])
def test_an_array_whose_header_promises_more_than_it_has_is_refused(shape: str) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(24)
    with pytest.raises(UsageError, match="an array that numpy does not read"):
        Request.from_json(json.dumps({"noise": {"npy": base64.b64encode(npy).decode()}}))


def test_an_array_is_not_read_from_an_archive() -> None:
    with pytest.raises(UsageError, match="an array that numpy does not read"):
        Request.from_json(json.dumps({"noise": {"npy": base64.b64encode(b"PK\x03\x04" + bytes(40)).decode()}}))


LOOPS = Axis(name="loops", min=1, max=8, step=1, default=6, input="loops", carrier="value")


def masked() -> ElasticPipeline:
    """A masked model whose logits follow the label."""
    described = model(1, prediction="logits", schedule=CosineMask(vocabulary=5), tokens="grey", sample_shape=(1, 4, 4))
    inputs = (
        TensorSpec(name="tokens", dtype="int64", shape=("B", 16)), TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
        TensorSpec(name="loops", dtype="int64", shape=()),
    )  # fmt: skip
    outputs = (TensorSpec(name="logits", dtype="float32", shape=("B", 16, 5)),)
    graph = Graph(inputs=inputs, outputs=outputs, dimensions={"B": Span(1, 8)}, artifacts=())

    def run(feeds: Any) -> dict[str, np.ndarray]:
        weights = np.sin(feeds["tokens"][..., None] + np.arange(5) + feeds["class_labels"][:, None, None])
        return {"logits": weights.astype(np.float32)}

    whole = msgspec.structs.replace(manifest(1), model=described, axes=(LOOPS,), graphs={"denoiser": graph})
    return ElasticPipeline(Bundle(Path("bundle"), whole), {"denoiser": FakeSession(graph, run)})


def elit(**changes: Any) -> ElasticPipeline:
    """A model of latents whose prediction follows sample, time and label."""
    fake = session(lambda x, t, labels, kept: 0.3 * np.sin(3 * x) + 0.05 * labels, 1, Span(1, 8))
    whole = manifest(1)
    whole = msgspec.structs.replace(whole, model=msgspec.structs.replace(whole.model, **changes))
    return ElasticPipeline(Bundle(Path("bundle"), whole), {"denoiser": fake})


def glyphs() -> ElasticPipeline:
    opener = Opener(
        flux_manifest(SCHNELL, classes=5), lambda feeds: np.sin(3 * feeds["hidden_states"] + feeds["img_ids"].sum(1)[None, :, None])
    )
    return ElasticPipeline(opener.bundle, opener)


V = {"prediction": "v", "schedule": ShiftedCosine.at(8)}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (elit, {"sampler": "euler"}),
    "heun": (elit, {"sampler": "heun"}),
    "sde": (elit, {"sampler": "sde"}),
    "ddpm": (lambda: elit(**V), {"sampler": "ddpm"}),
    "ddim": (lambda: elit(**V), {"sampler": "ddim"}),
    "maskgit": (masked, {}),
    "a router, learned variance": (lambda: routed(lambda t, label: 20)[0], {"sampler": "ddpm"}),
    "a plan of stages": (glyphs, {"plan": "4x"}),
    "plain sampling of tokens": (glyphs, {"plan": "full"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_its_picture_alone_and_in_any_batch(family: str) -> None:
    make, options = FAMILIES[family]
    options = options | {"guidance_scale": 2.0, "output_type": "latent"} | ({} if "plan" in options else {"num_inference_steps": 4})
    alone = [make()([label], seeds=(seed,), **options).images for label, seed in ((1, 5), (2, 6), (1, 7))]
    together = make()([1, 2, 1], seeds=(5, 6, 7), **options).images
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)
    counted = make()([1, 2, 1], seeds=5, **options)
    np.testing.assert_allclose(counted.images, together, atol=1e-6)
    assert counted.request.seeds == (5, 6, 7)
    assert np.abs(alone[0] - alone[2]).max() > 0, "another seed is another picture"


def test_without_a_seed_the_picture_says_which_it_had() -> None:
    pipe = elit()
    first = pipe(3, output_type="latent")
    np.testing.assert_array_equal(pipe.draw(first.request).images, first.images)
    assert pipe(3, output_type="latent").request.seeds != first.request.seeds


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (-1, "a seed is a whole number from 0"),
        ((1, 2, 3), "2 pictures and 3 seeds"),
        (1.5, "got 1.5"),
        ("x", "got 'x'"),
        (2**64, "a seed"),
        (2**63 - 1, "end above the largest"),
    ],
)
def test_seeds_that_are_none_are_refused(seeds: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        elit()([1, 2], seeds=seeds)
    with pytest.raises(UsageError, match="give seeds or a generator, not both"):
        elit()([1], seeds=1, generator=np.random.default_rng(0))


def test_pictures_of_each_label_and_the_first_argument() -> None:
    pipe = elit()
    assert len(pipe([1, 2], num_images_per_prompt=3).images) == 6
    with pytest.raises(UsageError, match="class_labels is given twice"):
        pipe([1], class_labels=[2])
    with pytest.raises(UsageError, match="prompt does not fit tiny, which draws at budgets"):
        pipe(1, prompt="a cat")
    with pytest.raises(UsageError, match="num_images_per_prompt is a whole number from 1, got 0"):
        pipe(1, num_images_per_prompt=0)


@pytest.mark.parametrize("make", [elit, glyphs], ids=["budgets", "plans"])
def test_eight_threads_on_one_pipeline_draw_eight_right_pictures(make: Any) -> None:
    pipe = make()
    options: dict[str, Any] = {"output_type": "latent", "guidance_scale": 2.0}
    expected = [make()([seed % 5], seeds=(seed,), **options).images for seed in range(8)]
    drawn: dict[int, np.ndarray] = {}

    def draw(seed: int) -> None:
        drawn[seed] = pipe([seed % 5], seeds=(seed,), **options).images

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, images in enumerate(expected):
        np.testing.assert_array_equal(drawn[seed], images)
