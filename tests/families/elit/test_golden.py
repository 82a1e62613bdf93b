"""Recorded outputs of each backbone, in torch and through ONNX Runtime."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import narrow

pytest.importorskip("torch", reason="the zoo needs torch")

from elastic_export.capture.zoo import Model
from elastic_runtime import Budget, Bundle, open_session

RECORDED = {
    "a": (4, 8, 20, 32, 64),
    "b": (16, 32, 48, 64),
    "c": (4, 16, 64),
    "uvit-a": (4, 12, 32, 60, 64),
    "uvit-b": (16, 32, 64),
    "hdit-a": (16, 32, 48, 64),
    "hdit-b": (4, 24, 64),
    "uvit-tokens-a": (4, 28, 64),
    "hdit-levels-a": (4, 20, 64),
}
# Attention by cosines amplifies rounding.
BOUNDS = dict.fromkeys(RECORDED, 5e-6) | {"hdit-levels-a": 2e-5}
RUNS = [(name, latents) for name, every in RECORDED.items() for latents in every]
# Opset 20 is the form that TensorRT before 10.14 takes.
EXPORTED = [
    ("c", 23), ("uvit-b", 23), ("hdit-b", 23), ("uvit-tokens-a", 23), ("hdit-levels-a", 23), ("hdit-levels-a", 20),
    ("a", 23), ("b", 23), ("uvit-a", 23), ("hdit-a", 23), ("uvit-b", 20), ("hdit-b", 20), ("uvit-tokens-a", 20),
]  # fmt: skip

Arrays = dict[str, np.ndarray]


def test_every_recorded_budget_is_tested(recorded: Callable[[str], Arrays]) -> None:
    budgets = {(name, int(key.removeprefix("out_latents_"))) for name in RECORDED for key in recorded(name) if key.startswith("out_")}
    assert budgets == set(RUNS)
    assert {name for name, opset in EXPORTED if opset == 23} == {*RECORDED}


@pytest.mark.parametrize(("name", "latents"), RUNS)
def test_golden_outputs_in_torch(
    name: str, latents: int, model: Callable[[str], Model], recorded: Callable[[str], Arrays], feeds: Any, forward: Any
) -> None:
    golden = model(name)
    output = forward(golden.module, feeds(name, latents // golden.params.windows.count))
    assert np.abs(output - recorded(name)[f"out_latents_{latents}"]).max() <= BOUNDS[name]


@pytest.mark.parametrize(("name", "opset"), narrow(EXPORTED, 6))
def test_golden_outputs_and_every_other_budget_through_onnx_runtime(
    name: str,
    opset: int,
    model: Callable[[str], Model],
    recorded: Callable[[str], Arrays],
    feeds: Any,
    forward: Any,
    golden_bundle: Callable[..., Bundle],
) -> None:
    bundle = golden_bundle(name, opset)
    axis = bundle.manifest.axis("latents")
    traced = axis.values[len(axis.values) // 2 - 1]
    seen = set()
    with open_session(bundle) as session:
        for latents in axis.values:
            arrays = feeds(name, axis.length(latents))
            output = session.run(arrays)["prediction"]
            wanted = recorded(name).get(f"out_latents_{latents}")
            if wanted is not None:
                assert np.abs(output - wanted).max() <= BOUNDS[name], f"recorded, {latents} latents"
            assert np.abs(output - forward(model(name).module, arrays)).max() <= BOUNDS[name], f"against torch, {latents} latents"
            seen.add(latents)
    assert seen >= {latents for run, latents in RUNS if run == name} | {traced}


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("name", ["c", "uvit-b", "hdit-b", "uvit-tokens-a", "hdit-levels-a"])
def test_other_batches_than_the_traced_one_through_onnx_runtime(
    name: str, batch: int, model: Callable[[str], Model], forward: Any, golden_bundle: Callable[..., Bundle]
) -> None:
    golden = model(name)
    arrays = golden.family.feeds(golden.params, Budget(latents=3 * golden.params.windows.count), batch)
    with open_session(golden_bundle(name)) as session:
        output = session.run(arrays)["prediction"]
    assert np.abs(output - forward(golden.module, arrays)).max() <= BOUNDS[name]


@pytest.mark.parametrize("name", ["a", "uvit-a", "hdit-a", "uvit-tokens-a", "hdit-levels-a"])
def test_budgets_differ_from_each_other(name: str, model: Callable[[str], Model], feeds: Any, forward: Any) -> None:
    few, many = (forward(model(name).module, feeds(name, kept)) for kept in (1, 4))
    assert np.abs(few - many).max() > 1e-3


@pytest.mark.parametrize("name", ["c", "uvit-b", "hdit-b", "uvit-tokens-a", "hdit-levels-a"])
def test_only_the_length_of_latent_ids_is_read(name: str, model: Callable[[str], Model], feeds: Any, forward: Any) -> None:
    arrays = feeds(name, 3)
    shuffled = arrays | {"latent_ids": np.array([9, 9, 0])}
    np.testing.assert_array_equal(forward(model(name).module, arrays), forward(model(name).module, shuffled))
