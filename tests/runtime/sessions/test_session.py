import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import decoder_graph, denoiser_graph, session, write_bundle
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import BudgetError, BundleError, FakeSession, InferenceError, MissingError, Span, UsageError, open_session
from elastic_runtime.sessions.interface import Interface
from elastic_runtime.sessions.opening import backend, backends, obstacles
from elastic_runtime.sessions.session import batches


def feeds(batch: int = 2, kept: int = 16, **changes: Any) -> dict[str, np.ndarray]:
    return {
        "sample": np.zeros((batch, 4, 8, 8), np.float32),
        "timestep": np.zeros(batch, np.float32),
        "class_labels": np.zeros(batch, np.int64),
        "latent_ids": np.arange(kept),
    } | changes


@given(st.integers(1, 4), st.integers(1, 16))
def test_feeds_of_every_size_in_the_spans_pass(batch: int, kept: int) -> None:
    Interface(denoiser_graph()).check(feeds(batch, kept))


def test_an_answer_of_another_shape_than_was_asked_for_is_no_answer() -> None:
    """OpenVINO was seen to answer with the batch of the run before, and no error."""
    late = FakeSession(denoiser_graph(), lambda arrays: {"prediction": np.zeros((1, 4, 8, 8), np.float32)})
    assert late.run(feeds(1))["prediction"].shape == (1, 4, 8, 8)
    with pytest.raises(InferenceError, match=r"fake answered prediction in shape \(1, 4, 8, 8\)"):
        late.run(feeds(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": np.zeros((2, 4, 8, 8))}, "sample must be float32, got float64"),
        ({"class_labels": np.zeros(2, np.int32)}, "class_labels must be int64, got int32"),
        ({"sample": np.zeros((2, 3, 8, 8), np.float32)}, r"sample must have shape \(B, 4, 8, 8\).*got \(2, 3, 8, 8\)"),
        ({"sample": np.zeros((4, 8, 8), np.float32)}, r"sample must have shape \(B, 4, 8, 8\)"),
        ({"timestep": np.zeros(3, np.float32)}, r"timestep must have shape \(B\) with equal letters equal, got \(3,\)"),
        ({"loops": np.array(3)}, r"the graph takes \[.*\], got \[.*'loops'.*\]"),
    ],
)
def test_a_wrong_feed_is_named(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        Interface(denoiser_graph()).check(feeds(**changes))


def test_a_missing_feed_is_named() -> None:
    fewer = feeds()
    del fewer["latent_ids"]
    with pytest.raises(InferenceError, match="latent_ids"):
        Interface(denoiser_graph()).check(fewer)


@pytest.mark.parametrize(
    ("batch", "kept", "message"), [(5, 16, "B of 1-4, got 5"), (2, 17, "J of 1-16, got 17"), (2, 0, "J of 1-16, got 0")]
)
def test_sizes_outside_the_spans_are_named(batch: int, kept: int, message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        Interface(denoiser_graph()).check(feeds(batch, kept))


def test_a_session_checks_before_it_runs_and_closes_with_its_block() -> None:
    with session(lambda x, t, labels, kept: x) as fake:
        with pytest.raises(InferenceError, match="timestep"):
            fake.run(feeds(timestep=np.zeros(3, np.float32)))
        assert fake.calls == []
        fake.run(feeds())
        assert fake.calls[0]["latent_ids"] == (16,)
    assert fake.closed
    with pytest.raises(InferenceError, match="closed"):
        fake.run(feeds())


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 8))
def test_batches_cover_everything_once_within_the_span(size: int, low: int, more: int) -> None:
    fake = FakeSession(denoiser_graph(batch=Span(low, low + more)), lambda feeds: {})
    try:
        parts = batches(fake, size)
    except BudgetError:
        runs = -(-size // (low + more))
        assert low * runs > size, "an even split into as few runs as possible was there"
        return
    assert np.concatenate([np.arange(size)[part] for part in parts]).tolist() == list(range(size))
    assert all(low <= part.stop - part.start <= low + more for part in parts)
    assert len(parts) == -(-size // (low + more))


def test_a_backend_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(UsageError, match="no backend 'abacus'; there are trt or tensorrt, ort or onnxruntime, openvino, coreml"):
        backend("abacus")


@pytest.mark.parametrize(
    ("word", "name"),
    [("onnxruntime", "ort"), ("ort", "ort"), ("openvino", "openvino"), ("tensorrt", "trt"), ("trt", "trt"), ("coreml", "coreml")],
)
def test_a_backend_is_known_by_its_librarys_name_too(word: str, name: str) -> None:
    assert backend(word).name == name


def test_each_backend_is_whole() -> None:
    """One file, one row, one extra: what a record promises is there."""
    extras = {package.extra for record in backends() for package in record.packages}
    assert extras == {"trt", "rtx", "ort", "openvino", "coreml"}
    for record in backends():
        assert record.opens
        assert record.ways
        assert all(way.processor in ("cpu", "gpu", "npu") for way in record.ways.values())


def test_a_missing_package_is_answered_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    room, reasons = obstacles(bundle.manifest.graphs["denoiser"].artifacts[0])
    assert room is None
    assert "pip install 'elastic-export[ort]'" in " ".join(reasons)
    with pytest.raises(MissingError, match="nothing here can run 'denoiser'") as caught:
        open_session(bundle)
    assert "pip install 'elastic-export[ort]'" in str(caught.value)


def test_a_backend_that_does_not_open_what_the_bundle_holds_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="coreml: the bundle has no artifact for it"):
        open_session(write_bundle(tmp_path / "b"), name="coreml")


def test_a_graph_that_the_bundle_lacks_is_answered_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no graph 'decoder'; it has denoiser"):
        open_session(write_bundle(tmp_path / "b"), "decoder")


def test_an_artifact_that_is_no_graph_is_said_to_be_damaged(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot open .*denoiser\.onnx"):
        open_session(write_bundle(tmp_path / "b"))


def test_an_unknown_provider_is_answered_with_those_there_are(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    with pytest.raises(MissingError, match="no AbacusExecutionProvider; it has .*CPUExecutionProvider"):
        open_session(write_bundle(tmp_path / "b"), providers=["AbacusExecutionProvider"])


def test_the_fake_is_a_session_of_any_graph() -> None:
    fake = FakeSession(decoder_graph(), lambda feeds: {"image": np.ones((len(feeds["latent"]), 3, 16, 16), np.float32)})
    assert fake.run({"latent": np.zeros((2, 4, 8, 8), np.float32)})["image"].shape == (2, 3, 16, 16)
    assert fake.budgets is None
