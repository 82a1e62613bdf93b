"""A manifest whose numbers cannot be, or whose parts contradict each other, is refused where it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_flux
import fakes
import msgspec
import numpy as np
import pytest

from elastic_runtime import Bundle, BundleError, Span
from elastic_runtime.contract import reference
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.bundle import MANIFEST, entry
from elastic_runtime.contract.manifest import Cost, Quality

COST = Cost(budget={"latents": 64}, flops=10, weight_bytes=10, activation_bytes=10)
GRADE = Quality(budget={"latents": 64}, accuracy=0.9, frechet_distance=1.0)
PLAN = Quality(budget={}, accuracy=0.9, frechet_distance=1.0, plan="4x", steps=(5, 6, 7))


def budgets() -> dict[str, Any]:
    """JSON of a manifest that is drawn at budgets, with a decoder."""
    whole = msgspec.structs.replace(fakes.manifest(), cost=(COST,), quality=(GRADE,))
    graphs = whole.graphs | {"decoder": fakes.decoder_graph()}
    return json.loads(msgspec.json.encode(msgspec.structs.replace(whole, graphs=graphs)))  # type: ignore[no-any-return]


def plans() -> dict[str, Any]:
    """JSON of one that is drawn along plans."""
    whole = msgspec.structs.replace(fake_flux.manifest(classes=5), axes=(fake_flux.TOKENS,), quality=(PLAN,))
    return json.loads(msgspec.json.encode(whole))  # type: ignore[no-any-return]


def test_both_are_read_as_they_are() -> None:
    for content in (budgets(), plans()):
        assert decode(json.dumps(content).encode(), MANIFEST)


def axis(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["axes"][0].update(values)


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *before, last = path
        for key in before:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (budgets, axis(max=10**12), "offer more than 1048576 budgets"),
        (budgets, axis(min=4 * 10**9, max=4 * 10**9, default=4 * 10**9), "or one above 2147483647"),
        (plans, at("axes", 0, "max", value=2**63 - 1), "or one above 2147483647"),
        (plans, at("axes", 0, "max", value=2**63), "max|or one above 2147483647"),
        (budgets, axis(max=128), "axis latents makes J 1-32, and it says 1-16"),
        (budgets, lambda content: content["axes"].append(content["axes"][0]), "two `axes` have one name"),
        (budgets, at("model", "sample_shape", value=[4, 10**9, 10**9]), "at most 268435456 values"),
        (budgets, at("model", "sample_shape", value=[4, 0, 8]), "sizes of 1 or more"),
        (budgets, at("model", "sample_shape", value=[3, 8, 8]), r"its sample has shape \(B, 4, 8, 8\), the model's is \[3, 8, 8\]"),
        (budgets, at("model", "num_classes", value=-1), "`num_classes` is 0 or more"),
        (budgets, at("model", "null_label", value=10**6), "`null_label` one of them or the next"),
        (budgets, at("cost", 0, "budget", value={}), "`cost` has a budget of no axis where the axes are latents"),
        (budgets, at("cost", 0, "budget", "latents", value=5), "`cost` has latents 5, which its axis does not offer"),
        (budgets, at("cost", 0, "flops", value=10**30), "flops"),
        (budgets, at("cost", 0, "flops", value=-1), "flops"),
        (budgets, at("quality", 0, "budget", value={"loops": 1}), "`quality` has a budget of loops"),
        (budgets, at("quality", 0, "accuracy", value=1.5), "accuracy"),
        (budgets, at("quality", 0, "frechet_distance", value=-1.0), "`frechet_distance` is 0 or more"),
        (budgets, at("quality", 0, "plan", value="4x"), "has a plan, '4x', and tiny is drawn at budgets"),
        (budgets, at("graphs", "denoiser", "dimensions", "B", value={"min": 0, "max": 4}), "dimension B spans 1 to"),
        (budgets, at("graphs", "denoiser", "dimensions", "B", value={"min": 4, "max": 1}), "dimension B spans 1 to"),
        (budgets, at("graphs", "denoiser", "inputs", 0, "shape", 1, value=-4), "a dimension of sample is 1 to"),
        (budgets, at("graphs", "denoiser", "inputs", 0, "shape", 1, value=10**18), "a dimension of sample is 1 to"),
        (budgets, at("graphs", "denoiser", "inputs", 0, "shape", 0, value="0*B"), "a number or a letter, perhaps times a number"),
        (budgets, at("graphs", "denoiser", "inputs", 0, "name", value="timestep"), "have names of their own"),
        (budgets, at("graphs", "denoiser", "outputs", 0, "name", value="guess"), "it lacks the output prediction"),
        (budgets, at("graphs", "decoder", "inputs", 0, "name", value="z"), "it takes a latent"),
        (budgets, at("graphs", "decoder", "inputs", 0, "shape", 1, value=16), "it takes 16 channels, and a sample has 4"),
        (plans, at("model", "patches", "size", value=0), "a patch has a `size` of 1 to"),
        (plans, at("model", "patches", "size", value=3), "does not divide into patches of 3"),
        (plans, at("model", "vae", "scaling_factor", value=0.0), "`scaling_factor` is not 0"),
        (plans, at("model", "vae", "upscale", value=10**9), "`upscale` is 1 to"),
        (plans, at("axes", value=[]), "no axis is their number, S"),
        (plans, at("quality", 0, "steps", value=[5, 7]), "`quality` has 2 stages of plan '4x', which has 3"),
        (plans, at("quality", 0, "steps", value=[]), "`steps` are some"),
        (plans, at("quality", 0, "steps", value=[0, 6, 7]), "steps"),
        (plans, at("quality", 0, "plan", value="full"), "`quality` has 3 stages of plan 'full', which has 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Callable[[], dict[str, Any]], change: Any, message: str) -> None:
    content = make()
    change(content)
    with pytest.raises(BundleError, match=rf"{MANIFEST} is not a valid manifest: .*{message}"):
        decode(json.dumps(content).encode(), MANIFEST)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_number_that_is_none_is_refused(number: str) -> None:
    text = json.dumps(budgets()).replace('"frechet_distance": 1.0', f'"frechet_distance": {number}')
    assert number in text
    with pytest.raises(BundleError, match="is not a"):
        decode(text.encode(), MANIFEST)


FEED, ANSWER = np.ones((2, 4, 8, 8), dtype=np.float32), np.ones((2, 4, 8, 8), dtype=np.float32)
TOY = Graph(
    inputs=(TensorSpec(name="sample", dtype="float32", shape=("B", 4, 8, 8)),),
    outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", 4, 8, 8)),),
    dimensions={"B": Span(1, 4), "J": Span(1, 16)},
    artifacts=(),
)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"denoiser/feed/sample": FEED, "denoiser/latents=64/prediction": ANSWER * np.inf}, "has values that are not finite"),
        ({"denoiser/feed/sample": FEED * np.nan, "denoiser/latents=64/prediction": ANSWER}, "has values that are not finite"),
        ({"denoiser/feed/sample": FEED, "denoiser/latents=65/prediction": ANSWER}, "denoiser takes no latents of 65"),
        ({"denoiser/feed/sample": FEED, "denoiser/loops=1/prediction": ANSWER}, "denoiser takes no loops of 1"),
        ({"denoiser/feed/sample": FEED, "denoiser/J=99/prediction": ANSWER}, "denoiser takes no J of 99"),
        ({"denoiser/feed/sample": FEED, "denoiser/latents=x/prediction": ANSWER}, "is damaged"),
        ({"denoiser/feed/sample": FEED, "denoiser/latents=64/other": ANSWER}, "holds 'denoiser/latents=64/other', which no graph has"),
        ({"other/feed/sample": FEED}, "holds 'other/feed/sample', which no graph has"),
        ({"nothing": FEED}, "holds 'nothing', which no graph has"),
        ({"denoiser/latents=64/prediction": ANSWER}, "not what it was fed: sample"),
        ({"denoiser/feed/sample": FEED.astype(np.float16)}, "is float16 of shape"),
        ({"denoiser/feed/sample": FEED[:, :3]}, r"of shape \(2, 3, 8, 8\), not float32"),
        ({"denoiser/feed/sample": FEED[0]}, "is float32 of shape"),
        ({"denoiser/feed/sample": FEED[:0]}, "is float32 of shape"),
    ],
)
def test_a_reference_that_is_none_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    fakes.write_bundle(tmp_path / "b")
    path = tmp_path / "b" / "reference.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    whole = Bundle.open(tmp_path / "b").manifest
    graphs = {"denoiser": msgspec.structs.replace(TOY, artifacts=whole.graphs["denoiser"].artifacts)}
    bundle = Bundle(tmp_path / "b", msgspec.structs.replace(whole, graphs=graphs, reference=entry(tmp_path / "b", path)))
    with pytest.raises(BundleError, match=rf"reference.npz is damaged: .*({message}|{message.replace('is damaged', '')})"):
        bundle.reference()


def test_nothing_is_proven_by_a_reference_that_is_not_finite() -> None:
    row = reference.compare(ANSWER, ANSWER * np.inf, reference.parse_key("latents=64"), 1e9, "here")
    assert not row.passed
    assert not row.finite
