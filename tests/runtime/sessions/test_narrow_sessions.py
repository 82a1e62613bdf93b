"""An artifact that offers less than its graph is checked at what it offers, in runs that it takes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import manifest, session

from elastic_runtime import Budget, BundleError, InferenceError, Span
from elastic_runtime.contract.artifacts import CoremlArtifact, FileEntry, Graph, Profile, Range, TensorSpec
from elastic_runtime.contract.reference import pack
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.trt import TrtSession


def recorded(*budgets: Budget) -> tuple[Any, dict[str, np.ndarray]]:
    feeds = {
        "sample": np.arange(3 * 256, dtype=np.float32).reshape(3, 4, 8, 8),
        "timestep": np.zeros(3, np.float32),
        "class_labels": np.zeros(3, np.int64),
    }
    bundle: Any = SimpleNamespace(manifest=manifest(), folder="bundle")
    return bundle, pack("denoiser", feeds, {budget: {"prediction": feeds["sample"] * 2} for budget in budgets})


def test_recorded_budgets_that_it_does_not_offer_are_left_out() -> None:
    bundle, arrays = recorded(Budget(latents=16), Budget(latents=64))
    narrow = session(lambda x, t, labels, kept: x * 2)
    narrow.batch, narrow.budgets = Span(1, 1), (Budget(latents=64),)
    rows = list(check(bundle, "denoiser", narrow, 1e-6, arrays))
    assert [(row.budget, row.passed) for row in rows] == [({"latents": 64}, True)]
    assert [call["sample"][0] for call in narrow.calls] == [1, 1, 1]


def test_pictures_share_a_run_at_the_smallest_size_alone() -> None:
    """Activations are a decoder's memory."""
    bundle, arrays = recorded(Budget(latents=16), Budget(latents=64))
    arrays = {name.replace("denoiser", "decoder"): array for name, array in arrays.items()}
    bundle.manifest = SimpleNamespace(axes=bundle.manifest.axes, graphs={"decoder": bundle.manifest.graphs["denoiser"]})
    decoder = session(lambda x, t, labels, kept: x * 2)
    assert all(row.passed for row in check(bundle, "decoder", decoder, 1e-6, arrays))
    assert [call["sample"][0] for call in decoder.calls] == [3, 1, 1, 1]


def test_a_budget_that_was_not_recorded_is_named() -> None:
    bundle, arrays = recorded(Budget(latents=64))
    narrow = session(lambda x, t, labels, kept: x)
    narrow.budgets = (Budget(latents=64), Budget(latents=32))
    with pytest.raises(BundleError, match=r"no outputs of 'denoiser' at latents=32"):
        list(check(bundle, "denoiser", narrow, 1e-6, arrays))


@pytest.mark.parametrize(("compression", "bound"), [(None, 2e-2), ("int8", 3e-2), ("palette4", 2.5e-1)])
def test_fewer_bits_have_a_wider_bound(compression: Any, bound: float) -> None:
    artifact = CoremlArtifact(
        precision="fp16", files=(FileEntry(path="p", bytes=0, sha256=""),), toolchain={},
        package="p", deployment_target="iOS18", shapes="range", batch=Span(1, 1), calls=(),
        reductions="fp32", compression=compression,
    )  # fmt: skip
    assert artifact.tolerance == bound


def test_a_size_that_is_a_multiple_of_an_open_one_finds_its_profile() -> None:
    """A VAE's encoder takes pictures of 8h x 8w."""
    spec = TensorSpec(name="image", dtype="float32", shape=("B", 3, "8*h", "8*w"))
    session = TrtSession.__new__(TrtSession)
    session.graph = Graph(inputs=(spec,), outputs=(), dimensions={name: Span(1, 64) for name in "Bhw"}, artifacts=())
    session._profiles = tuple(
        Profile(dimensions={"B": Range(1, 1, 2)} | {name: Range(*ends) for name in "hw"}) for ends in ((8, 8, 16), (17, 32, 32))
    )
    for side, index in ((64, 0), (128, 0), (136, 1), (256, 1)):
        assert session._profile({"image": np.zeros((1, 3, side, side), np.float32)}) == index
    with pytest.raises(InferenceError, match=r"no profile of this engine takes B=1, h=33, w=8; there are B 1-2, h 8-16, w 8-16; B 1-2"):
        session._profile({"image": np.zeros((1, 3, 264, 64), np.float32)})
