"""Rows side by side: the same numbers as in one run, the faster way is taken, and a failure or a closed session is said."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Budget, Bundle, ElasticPipeline
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.reference import axis_feeds
from elastic_runtime.errors import InferenceError, UsageError
from elastic_runtime.sessions import ort
from elastic_runtime.sessions.lanes import Lanes, splits
from elastic_runtime.sessions.opening import open_session


def graph(batch: Span = Span(1, 64)) -> Graph:  # noqa: B008
    return Graph(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("B", 3)),
            TensorSpec(name="latent_ids", dtype="int64", shape=("J",)),
        ),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", 3)),),
        dimensions={"B": batch, "J": Span(1, 8)},
        artifacts=(),
    )


def feeds(rows: int) -> dict[str, np.ndarray]:
    return {"sample": np.arange(3 * rows, dtype=np.float32).reshape(rows, 3), "latent_ids": np.arange(2)}


class Clock:
    """Runs of the main thread make time pass; those in lanes wait for each other, so that each lane has one."""

    def __init__(self) -> None:
        self.now, self.runs = 0.0, 0
        self._both = threading.Barrier(2)

    def run(self, seconds: float, lane: bool = False) -> Callable[[Any], dict[str, np.ndarray]]:
        def run(arrays: Any) -> dict[str, np.ndarray]:
            if lane:
                self._both.wait(10)
            if threading.current_thread() is threading.main_thread():
                self.now += seconds
                self.runs += 1
            return {"prediction": arrays["sample"]}

        return run


class Runs:
    """A model that doubles, and the batches that it was asked for, by the thread that asked."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []

    def __call__(self, arrays: Any) -> dict[str, np.ndarray]:
        assert len(arrays["latent_ids"]) == 2
        self.rows.append((threading.current_thread().name, len(arrays["sample"])))
        return {"prediction": 2 * arrays["sample"]}


@given(st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_rows_come_back_in_their_order_whatever_the_way(rows: int, count: int, alone: bool, beside: bool) -> None:
    whole, lane = Runs(), Runs()
    lanes = Lanes(graph(), whole, lane, count, alone)
    lanes.beside = beside and count > 1
    np.testing.assert_array_equal(lanes.run(feeds(rows))["prediction"], 2 * feeds(rows)["sample"])
    lanes.close()
    if alone:
        assert {size for _, size in whole.rows + lane.rows} == {1}
    if lanes.beside and rows > 1:
        assert not whole.rows
        assert len({name for name, _ in lane.rows}) <= min(rows, count)
        assert max(size for _, size in lane.rows) <= (1 if alone else -(-rows // min(rows, count)))


@pytest.mark.parametrize(("alone_seconds", "beside_seconds", "beside"), [(1.0, 0.5, True), (1.0, 0.99, False), (0.5, 1.0, False)])
def test_the_faster_way_is_taken(alone_seconds: float, beside_seconds: float, beside: bool) -> None:
    clock = Clock()
    lanes = Lanes(graph(), clock.run(alone_seconds), clock.run(beside_seconds, lane=True), 2)
    lanes.measure(feeds(2), lambda: clock.now)
    assert lanes.beside is beside
    lanes.close()


@pytest.mark.parametrize(("seconds", "runs"), [(0.01, 12), (0.2, 4)])
def test_measuring_keeps_nobody_waiting(seconds: float, runs: int) -> None:
    """Twice each way in each of three rounds, or, where a model is slow, in one."""
    clock = Clock()
    lanes = Lanes(graph(), clock.run(seconds), clock.run(seconds / 4, lane=True), 2)
    lanes.measure(feeds(2), lambda: clock.now)
    assert clock.runs == runs
    lanes.close()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(2, 4), st.booleans())
def test_runs_of_several_sizes_come_back_in_their_order(sizes: list[int], count: int, alone: bool) -> None:
    lanes = Lanes(graph(), Runs(), Runs(), count, alone)
    for _ in range(10):  # through both ways
        for rows, outputs in zip(sizes, lanes.several([feeds(rows) for rows in sizes]), strict=True):
            np.testing.assert_array_equal(outputs["prediction"], 2 * feeds(rows)["sample"])
    lanes.close()


@pytest.mark.parametrize(("side_by_side", "beside"), [(0.5, True), (0.99, False), (2.0, False)])
def test_branches_of_two_sizes_go_the_way_that_was_faster(side_by_side: float, beside: bool) -> None:
    clock = Clock()
    lanes, ways = Lanes(graph(), clock.run(0.5), clock.run(side_by_side, lane=True), 2), []
    for _ in range(20):
        begun = clock.now
        lanes.several([feeds(1), feeds(2)], lambda: clock.now)
        ways.append(clock.now - begun)
    assert ways[:8] == pytest.approx([1.0] * 4 + [side_by_side] * 4)
    assert ways[8:] == pytest.approx([side_by_side if beside else 1.0] * 12)
    lanes.close()


def test_one_lane_runs_nothing_side_by_side() -> None:
    """As in int8, where rows are alone: what was turned off stays off, whatever the sizes."""
    whole, lane = Runs(), Runs()
    lanes = Lanes(graph(), whole, lane, 1, alone=True)
    for _ in range(10):
        lanes.several([feeds(1), feeds(2)])
    assert not lane.rows
    assert {name for name, _ in whole.rows} == {threading.current_thread().name}
    lanes.close()


def test_a_lane_that_is_done_takes_what_is_left() -> None:
    """Eight runs in two lanes, of which one is slow."""
    slow = threading.Event()

    def run(arrays: Any) -> dict[str, np.ndarray]:
        if threading.current_thread() is not threading.main_thread():
            slow.wait(10)
        elif len(arrays["sample"]) == 8:
            slow.set()  # the last is the main thread's, as all but one are
        return {"prediction": arrays["sample"]}

    lanes = Lanes(graph(), Runs(), run, 2)
    outputs = lanes._beside([feeds(rows) for rows in range(1, 9)])
    assert [len(each["prediction"]) for each in outputs] == list(range(1, 9))
    lanes.close()


def test_a_lane_that_fails_fails_the_run() -> None:
    def fails(arrays: Any) -> dict[str, np.ndarray]:
        if arrays["sample"][0, 0] > 0:
            raise InferenceError("the backend failed")
        return {"prediction": arrays["sample"]}

    lanes = Lanes(graph(), Runs(), fails, 2)
    lanes.beside = True
    with pytest.raises(InferenceError, match="the backend failed"):
        lanes.run(feeds(2))
    lanes.close()
    with pytest.raises(InferenceError, match="closed"):
        lanes.run(feeds(2))


def test_a_graph_of_whole_batches_is_not_split() -> None:
    assert splits(graph())
    assert not splits(graph(Span(2, 4)))
    assert not splits(graph(Span(1, 1)))


def test_onnx_runtime_gives_the_same_bits_side_by_side(golden_bundle: Callable[[str], Bundle]) -> None:
    pytest.importorskip("onnxruntime", reason="runs ONNX Runtime")
    bundle = golden_bundle("a")
    with open_session(bundle, name="ort", lanes=2, threads=2) as beside, open_session(bundle, name="ort", lanes=1, threads=2) as plain:
        for budget in (Budget(latents=axis) for axis in (bundle.manifest.axes[0].min, bundle.manifest.axes[0].max)):
            source = np.random.default_rng(0)
            shape = (2, *bundle.manifest.model.sample_shape)
            arrays = {
                "sample": source.standard_normal(shape).astype(np.float32),
                "timestep": np.array([0.3, 0.7], dtype=np.float32),
                "class_labels": np.array([0, 1]),
            } | axis_feeds(bundle.manifest.axes, budget)
            np.testing.assert_array_equal(beside.run(arrays)["prediction"], plain.run(arrays)["prediction"])


def test_the_way_is_measured_when_a_denoiser_is_opened(golden_bundle: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="runs ONNX Runtime")
    bundle, measured = golden_bundle("c"), list[dict[str, np.ndarray]]()
    monkeypatch.setattr(Lanes, "measure", lambda self, feeds: measured.append(feeds))
    monkeypatch.setattr(ort, "busy_cores", lambda threads: 4)
    open_session(bundle, name="ort").close()
    (feeds,) = measured
    assert {name: len(array) for name, array in feeds.items() if name != "latent_ids"} == {"sample": 2, "timestep": 2, "class_labels": 2}
    monkeypatch.setattr(ort, "busy_cores", lambda threads: 1)
    open_session(bundle, name="ort").close()
    assert len(measured) == 1, "one core has nothing side by side"


def test_pictures_of_branches_with_budgets_of_their_own_are_the_same_in_lanes(golden_bundle: Callable[[str], Bundle]) -> None:
    pytest.importorskip("onnxruntime", reason="runs ONNX Runtime")
    words: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 2.0, "seeds": 0, "output_type": "latent"}
    (axis,) = golden_bundle("c").manifest.axes
    words |= {"budget": Budget(**{axis.name: axis.max}), "guidance_budget": Budget(**{axis.name: axis.min})}
    pictures = []
    for lanes in (1, 2):  # through both ways of the second
        with ElasticPipeline.from_pretrained(golden_bundle("c"), "ort", lanes=lanes) as pipe:
            pictures.append(pipe([1], **words).images)
    np.testing.assert_allclose(*pictures, atol=1e-5)


def test_lanes_are_a_whole_number(golden_bundle: Callable[[str], Bundle]) -> None:
    pytest.importorskip("onnxruntime", reason="runs ONNX Runtime")
    with pytest.raises(UsageError, match="lanes is a whole number from 1, got 0"):
        open_session(golden_bundle("c"), name="ort", lanes=0)
