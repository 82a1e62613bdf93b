"""A denoiser at budgets over packed samples and texts: what is fed, which rows share a run, and what is refused in a manifest."""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import LATENTS, manifest

from elastic_runtime import Budget, BundleError, FakeSession, Guidance, Span
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.manifest import Manifest, Text
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.denoising.guidance import Branches
from elastic_runtime.denoising.router import Routing
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.ralu.patches import pack, unpack

X = np.random.default_rng(0).standard_normal((2, 4, 8, 4))
FULL, LOW = Budget(latents=64), Budget(latents=4)


def described(**changes: Any) -> Manifest:
    whole = manifest()
    shapes = {"hidden_states": ("B", 8, 16), "encoder_hidden_states": ("B", "T", 6), "timestep": ("B",)}
    inputs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()]  # type: ignore[arg-type]
    graph = Graph(
        inputs=(*inputs, TensorSpec(name="latent_ids", dtype="int64", shape=("J",))),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", 8, 16)),),
        dimensions={"B": Span(1, 4), "J": Span(1, 16), "T": Span(1, 9)},
        artifacts=(),
    )
    facts = {"sample_shape": (4, 8, 4), "num_classes": 0, "null_label": 0, "packed": 2, "guidance_rescale": "norm"}
    text = Text(encoders=(), length=9, width=6, pooled=0)
    model = msgspec.structs.replace(whole.model, text=text, **facts | changes)
    return msgspec.structs.replace(whole, model=model, graphs={"denoiser": graph}, axes=(LATENTS,))


def session() -> FakeSession:
    """Answers the sample, more by the kept latents, the text's length and the sum of its first row."""

    def run(feeds: Any) -> dict[str, np.ndarray]:
        hidden = feeds["encoder_hidden_states"]
        more = len(feeds["latent_ids"]) + 100 * hidden.shape[1] + hidden[:, 0].sum(axis=1)
        return {"prediction": feeds["hidden_states"] + more[:, None, None].astype(np.float32)}

    return FakeSession(described().graphs["denoiser"], run)


def texts(length: int, value: float) -> Conditions:
    return Conditions(np.full((2, length, 6), value, np.float32))


def lead(strong: float, weak: float, scale: float) -> np.ndarray:
    """Guidance by hand: two predictions of tokens, the led one as long as the strong."""
    tokens = pack(X.astype(np.float32), 2).astype(np.float64)
    led = weak + tokens + scale * (strong - weak)
    lengths = [np.linalg.norm(each, axis=-1, keepdims=True) for each in (tokens + strong, led)]
    return unpack(led * lengths[0] / lengths[1], 4, 2, 2)


@pytest.mark.parametrize(
    ("length", "weak_budget", "runs"),
    [(3, FULL, [(4, 3, 16)]), (5, FULL, [(2, 3, 16), (2, 5, 16)]), (3, LOW, [(2, 3, 16), (2, 3, 1)]), (5, LOW, [(2, 3, 16), (2, 5, 1)])],
)
def test_branches_share_a_run_where_budget_and_length_are_the_same(length: int, weak_budget: Budget, runs: list[Any]) -> None:
    fake = session()
    branches = Branches(FULL, weak_budget)
    answer = Denoiser(fake, described()).guided(
        X, 0.5, texts(3, 1.0), Guidance(3.0, rescale="norm"), branches, Routing(), texts(length, 2.0)
    )
    kept = weak_budget["latents"] // 4
    wanted = lead(16 + 300 + 6, kept + 100 * length + 12, 3.0)
    np.testing.assert_allclose(answer.prediction, wanted, rtol=1e-5)
    shapes = [(call["hidden_states"][0], call["encoder_hidden_states"][1], call["latent_ids"][0]) for call in fake.calls]
    assert shapes == runs


def test_prompts_of_other_lengths_run_apart_and_come_back_in_order() -> None:
    fake = session()
    x = np.concatenate([X, X + 1])
    prompts = Conditions.of([np.full((length, 6), i, np.float32) for i, length in enumerate((3, 1, 3, 2))])
    answer = Denoiser(fake, described()).guided(x, 0.5, prompts, Guidance(), Branches(FULL, FULL), Routing())
    more = np.array([300 + 16, 100 + 16 + 6, 300 + 16 + 12, 200 + 16 + 18])
    np.testing.assert_allclose(answer.prediction, x + more[:, None, None, None], rtol=1e-5)
    assert [(call["hidden_states"][0], call["encoder_hidden_states"][1]) for call in fake.calls] == [(2, 3), (1, 1), (1, 2)]


def test_autoguidance_keeps_the_text() -> None:
    fake = session()
    guidance = Guidance(2.0, auto=True)
    answer = Denoiser(fake, described()).guided(X, 0.5, texts(3, 1.0), guidance, Branches(FULL, LOW), Routing(), texts(1, 9.0))
    np.testing.assert_allclose(answer.prediction, X + 306 + 1 + 2 * 15, rtol=1e-5)


def test_one_run_is_measured_with_the_longest_text() -> None:
    fake = session()
    Denoiser(fake, described()).evaluate(LOW, 3, 0.5, np.random.default_rng(0))
    assert [call["encoder_hidden_states"] for call in fake.calls] == [(3, 9, 6)]


def test_conditions_are_rows_of_whatever_there_is() -> None:
    both = texts(3, 1.0).joined(texts(3, 2.0))
    assert (len(both), both.length, list(both.feeds)) == (4, 3, ["encoder_hidden_states"])
    labels = Conditions(labels=np.array([3, 5]))
    assert labels.repeated(2).labels.tolist() == [3, 3, 5, 5]  # type: ignore[union-attr]
    assert (len(labels), labels.length, labels.beside(labels.rows(slice(1, 2)))) == (2, 0, True)
    assert not texts(3, 1.0).beside(texts(2, 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"packed": 3}, r"a sample of \[4, 8, 4\] does not divide into patches of 3"),
        ({"packed": 4}, r"its hidden_states have shape \(B, 8, 16\), and a packed sample has \(B, 2, 64\)"),
        ({"sample_shape": (2, 8, 4)}, r"its hidden_states have shape \(B, 8, 16\), and a packed sample has \(B, 8, 8\)"),
        ({"packed": 0}, "`int` >= 1"),
    ],
)
def test_a_manifest_whose_packing_cannot_be_is_refused(changes: dict[str, Any], message: str | None) -> None:
    text = json.dumps(json.loads(msgspec.json.encode(described(**changes)))).encode()
    if message is None:
        assert decode(text, "elastic.json").model.packed == 2
        return
    with pytest.raises(BundleError, match=message):
        decode(text, "elastic.json")
