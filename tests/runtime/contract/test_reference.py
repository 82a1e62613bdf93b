from pathlib import Path

import numpy as np
import pytest
from fakes import LATENTS, manifest, session
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as hypothesis_arrays

from elastic_runtime import Axis, Budget, Bundle
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.reference import axis_feeds, compare, cut, pack, unpack
from elastic_runtime.sessions.checking import check

AT = Budget(latents=64)
REFERENCE = np.linspace(-2, 2, 50, dtype=np.float32)


@given(hypothesis_arrays(np.float32, st.integers(1, 30), elements=st.floats(-1e6, 1e6, width=32)))
def test_equal_arrays_pass_at_any_tolerance(array: np.ndarray) -> None:
    row = compare(array, array, AT, 0.0, "here")
    assert row.passed
    assert row.max_abs == 0
    assert row.cosine == pytest.approx(1.0)
    assert row.psnr_db == 999.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_fails_at_any_tolerance(bad: float) -> None:
    output = REFERENCE.copy()
    output[7] = bad
    row = compare(output, REFERENCE, AT, 1e9, "here")
    assert not row.passed
    assert not row.finite
    assert np.isfinite([row.max_abs, row.cosine, row.psnr_db]).all(), "the manifest is JSON, which has no infinity"


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    wanted = REFERENCE.copy()
    wanted[7] = np.nan
    row = compare(REFERENCE, wanted, AT, 1e9, "here")
    assert (row.passed, row.bound) == (False, None)


def test_the_tolerance_is_of_the_largest_value_and_at_least_of_one() -> None:
    assert compare(REFERENCE + 0.0199, REFERENCE, AT, 1e-2, "here").passed
    assert not compare(REFERENCE + 0.0201, REFERENCE, AT, 1e-2, "here").passed
    small = REFERENCE * 1e-3
    assert compare(small + 0.0099, small, AT, 1e-2, "here").passed
    assert not compare(small + 0.0101, small, AT, 1e-2, "here").passed


def test_figures_by_hand() -> None:
    row = compare(np.array([1.0, 0.1]), np.array([1.0, 0.0]), AT, 0.2, "here")
    assert row.max_abs == pytest.approx(0.1)
    assert row.cosine == pytest.approx(1 / np.sqrt(1.01))
    assert row.psnr_db == pytest.approx(10 * np.log10(1 / 0.005))
    assert (row.budget, row.tolerance, row.where) == ({"latents": 64}, 0.2, "here")
    assert row.bound == pytest.approx(0.2)
    assert compare(REFERENCE, REFERENCE, AT, 0.2, "here").bound == pytest.approx(0.4)


def test_zeros_against_something_have_no_cosine() -> None:
    assert compare(np.zeros(3), np.ones(3), AT, 1.0, "here").cosine == 0.0
    assert compare(np.zeros(3), np.zeros(3), AT, 0.0, "here").cosine == 1.0


def test_packing_reads_back_and_keeps_graphs_apart() -> None:
    feeds = {"sample": np.ones((1, 2))}
    outputs = {AT: {"prediction": np.zeros(3)}, Budget(latents=4, loops=2): {"prediction": np.ones(3)}}
    arrays = pack("denoiser", feeds, outputs) | pack("decoder", {"latent": np.zeros(1)}, {Budget(): {"image": np.ones(2)}})
    unpacked_feeds, unpacked_outputs = unpack("denoiser", arrays)
    assert unpacked_feeds.keys() == feeds.keys()
    assert unpacked_outputs.keys() == outputs.keys()
    np.testing.assert_array_equal(unpacked_outputs[Budget(latents=4, loops=2)]["prediction"], 1)
    assert unpack("decoder", arrays)[1].keys() == {Budget()}


def test_axis_feeds_carry_every_axis() -> None:
    assert axis_feeds((LATENTS,), Budget(latents=8))["latent_ids"].tolist() == [0, 1]


def test_check_runs_every_recorded_budget_in_runs_that_the_session_takes(tmp_path: object) -> None:
    def field(x: np.ndarray, t: np.ndarray, labels: np.ndarray, kept: int) -> np.ndarray:
        return x * kept

    x = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    feeds = {"sample": x, "timestep": np.zeros(3, np.float32), "class_labels": np.zeros(3, np.int64)}
    right = {Budget(latents=4 * kept): {"prediction": x * kept} for kept in (1, 3)}
    wrong = {Budget(latents=64): {"prediction": x * 16 + 0.5}}
    fake = session(field)
    fake.batch = type(fake.batch)(1, 2)
    rows = list(check(Bundle(Path("b"), manifest()), "denoiser", fake, 1e-5, pack("denoiser", feeds, right | wrong)))
    assert [(row.budget["latents"], row.passed) for row in rows] == [(4, True), (12, True), (64, False)]
    assert rows[-1].max_abs == pytest.approx(0.5, rel=1e-4)
    assert {call["sample"][0] for call in fake.calls} == {1, 2}


def test_open_sizes_take_the_first_rows_of_the_feeds() -> None:
    specs = (TensorSpec(name="x", dtype="float32", shape=("B", "S", 3)), TensorSpec(name="ids", dtype="float32", shape=("S", 2)))
    feeds = {"x": np.arange(30).reshape(2, 5, 3), "ids": np.arange(10).reshape(5, 2)}
    small = cut(specs, feeds, Budget(S=2))
    assert (small["x"] == feeds["x"][:, :2]).all()
    assert (small["ids"] == feeds["ids"][:2]).all()
    assert {name: array.shape for name, array in cut(specs, feeds, Budget(latents=4)).items()} == {"x": (2, 5, 3), "ids": (5, 2)}
    tokens = Axis(name="tokens", min=1, max=5, step=1, default=5, input="x", carrier="shape", dimension="S")
    assert all((cut(specs, feeds, Budget(tokens=2), (tokens,))[name] == small[name]).all() for name in feeds)
    assert axis_feeds((tokens,), Budget(tokens=2)) == {}
