"""A denoiser in two files: rows of conditions are computed once, ahead where times were foreseen, and the same whoever asks beside."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime.contract.artifacts import Apart, FileEntry, Graph, OnnxArtifact, TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.errors import BundleError, InferenceError
from elastic_runtime.sessions import apart
from elastic_runtime.sessions.apart import ROWS, ApartSession, conditions, halves, rest
from elastic_runtime.sessions.fake import FakeSession

APART = Apart(
    path="onnx/denoiser.conditions.onnx",
    inputs=("timestep", "class_labels"),
    outputs=(TensorSpec(name="modulation", dtype="float32", shape=("B", 2)),),
    gone=("timestep", "class_labels"),
)


def graph(batch: Span = Span(1, 64)) -> Graph:  # noqa: B008
    return Graph(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("B", 3)),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
        ),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", 3)),),
        dimensions={"B": batch},
        artifacts=(),
    )


def feeds(times: Sequence[float], labels: Sequence[int]) -> dict[str, np.ndarray]:
    sample = np.arange(3 * len(times), dtype=np.float32).reshape(-1, 3)
    return {"sample": sample, "timestep": np.asarray(times, np.float32), "class_labels": np.asarray(labels)}


def wanted(given: Any) -> np.ndarray:
    return np.asarray(given["sample"] * given["timestep"][:, None] + given["class_labels"][:, None], np.float32)


def test_each_half_has_the_files_that_hold_its_weights() -> None:
    """As they are named where those above 4 GB lie in several."""
    numbered = [f"onnx/denoiser-0000{each}-of-00002" for each in (1, 2)]
    mine = ["onnx/denoiser.rest.onnx", *(f"{each}.rest.onnx.data" for each in numbered)]
    own = [*(f"{each}.conditions.onnx.data" for each in numbered), "onnx/denoiser.conditions.onnx"]
    files = tuple(FileEntry(path=path, bytes=1, sha256="") for path in (*mine, *own))
    whole = OnnxArtifact(precision="fp32", files=files, toolchain={}, opset=23, conditions=APART)
    first, second = halves(graph(), whole, APART)
    assert [file.path for file in first.files] == mine
    assert (second.path, {file.path for file in second.files}) == (APART.path, set(own))


class Two:
    """A session of two fakes, and every opening of the second."""

    def __init__(self, batch: Span = Span(1, 64), large: bool = False):  # noqa: B008
        whole = graph(batch)
        self.opened: list[FakeSession] = []
        self.whole = whole
        self.rest = FakeSession(rest(whole, APART), self._rest)
        self.session = ApartSession(whole, APART, self.rest, self._open, None if large else self._open())

    @property
    def runs(self) -> int:
        return sum(len(each.calls) for each in self.opened)

    def _rest(self, given: Any) -> dict[str, np.ndarray]:
        return {"prediction": given["sample"] * given["modulation"][:, :1] + given["modulation"][:, 1:]}

    def _open(self) -> FakeSession:
        def rows(given: Any) -> dict[str, np.ndarray]:
            return {"modulation": np.stack([given["timestep"], given["class_labels"].astype(np.float32)], axis=1)}

        self.opened.append(FakeSession(conditions(self.whole, APART), rows))
        return self.opened[-1]

    def ask(self, times: Sequence[float], labels: Sequence[int]) -> None:
        given = feeds(times, labels)
        np.testing.assert_array_equal(self.session.run(given)["prediction"], wanted(given))


TIMES = [0.0, 0.25, 0.5, 1.0]
rows = st.lists(st.tuples(st.sampled_from(TIMES), st.integers(0, 3)), min_size=1, max_size=5)


@given(runs=st.lists(rows, max_size=8), times=st.lists(st.sampled_from(TIMES)), large=st.booleans(), kept=st.sampled_from([0, 24, 10**6]))
def test_answers_are_the_whole_graph_s_whatever_was_foreseen_or_kept(
    runs: list[list[tuple[float, int]]], times: list[float], large: bool, kept: int
) -> None:
    before, apart.KEPT = apart.KEPT, kept
    try:
        two = Two(large=large)
        two.session.foresee(times)
        for run in runs:
            two.ask([time for time, _ in run], [label for _, label in run])
    finally:
        apart.KEPT = before


def test_a_picture_s_conditions_are_computed_at_its_first_step() -> None:
    two, times = Two(), [1.0, 0.75, 0.5, 0.25]
    two.session.foresee(times)
    for time in times:
        two.ask([time, time], [3, 9])
    assert [call["timestep"] for call in two.opened[0].calls] == [(ROWS,)]  # four times, two rows each
    assert [call["modulation"] for call in two.rest.calls] == [(2, 2)] * 4
    assert "timestep" not in two.rest.calls[0]


def test_a_run_always_has_as_many_rows() -> None:
    """A kernel adds in an order that the number of rows decides: a picture would not be the same alone and beside others."""
    two = Two()
    for count in (1, 2, 5, ROWS, ROWS + 3):
        two.ask([0.1 * count] * count, range(count))
    assert {call["timestep"] for call in two.opened[0].calls} == {(ROWS,)}
    fixed = Two(batch=Span(1, 1))
    fixed.session.foresee([0.5, 0.25])
    fixed.ask([0.5], [1])
    assert [call["timestep"] for call in fixed.opened[0].calls] == [(1,)] * 2
    many = Two(batch=Span(ROWS + 2, ROWS + 2))
    many.ask([0.5] * (ROWS + 2), range(ROWS + 2))
    assert [call["timestep"] for call in many.opened[0].calls] == [(ROWS + 2,)]


def test_a_time_that_nobody_foresaw_is_computed_when_it_comes_and_the_same_picture_again_is_not() -> None:
    two = Two()
    two.session.foresee([0.5])
    for _ in range(2):
        two.ask([0.9], [1])
        two.ask([0.4], [1])
    assert two.runs == 2


def test_a_large_file_is_closed_when_a_picture_s_rows_are_there() -> None:
    two = Two(large=True)
    two.session.foresee([1.0, 0.5])
    two.ask([1.0], [1])
    two.ask([0.5], [1])
    assert [each.closed for each in two.opened] == [True]
    two.ask([1.0], [2])
    assert [each.closed for each in two.opened] == [True, True]
    two.ask([0.3], [2])  # who draws so asks again soon
    two.ask([0.2], [2])
    assert [each.closed for each in two.opened] == [True, True, False]


@pytest.mark.parametrize("large", [False, True])
def test_a_picture_whose_rows_are_too_many_computes_each_once(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never holds more than are to be kept."""
    monkeypatch.setattr(apart, "KEPT", 8 * 100)  # a hundred rows of two values
    two, times = Two(large=large), np.linspace(1, 0.02, 50).tolist()
    two.session.foresee(times)
    most = 0
    for time in times:
        two.ask([time] * 8, range(8))
        most = max(most, len(two.session._kept))
    assert most <= 100
    assert two.runs * ROWS <= 1.1 * 8 * 50
    assert len(two.opened) <= 1
    assert [each.closed for each in two.opened] == [large]


def test_pictures_that_take_turns_each_have_their_times() -> None:
    """As a server's do: the one's schedule does not make the other forget its own."""
    two, courses = Two(large=True), [np.linspace(1, 0.05, steps).astype(np.float32).tolist() for steps in (20, 30)]
    for course in courses:
        two.session.foresee(course)
    for index in range(30):
        for label, course in enumerate(courses):
            if index < len(course):
                two.ask([course[index]], [label])
    assert all(each.closed for each in two.opened)
    assert two.runs <= 2 * -(-30 // ROWS) + -(-20 // ROWS), "only at the first time, which both have, may the other's be taken for its own"


def test_what_was_foreseen_meanwhile_disturbs_no_run() -> None:
    two, done = Two(), threading.Event()

    def foresees() -> None:
        while not done.is_set():
            for count in (3, 401):
                two.session.foresee(np.linspace(1, 0, count))

    other = threading.Thread(target=foresees)
    other.start()
    try:
        for index in range(200):
            two.ask([1.0], [index])
    finally:
        done.set()
        other.join()


def test_a_file_that_is_gone_meanwhile_is_an_inference_error() -> None:
    def gone() -> FakeSession:
        raise BundleError("it was replaced")

    two = Two(large=True)
    two.session._open = gone  # type: ignore[method-assign]
    with pytest.raises(InferenceError, match="the denoiser's conditions cannot be opened any more: it was replaced"):
        two.ask([0.5], [1])


def test_threads_get_their_own_answers_and_a_closed_session_says_so() -> None:
    two, failures = Two(), list[BaseException]()

    def asks(label: int) -> None:
        try:
            for index in range(50):
                two.ask([index / 50], [label])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=asks, args=(label,)) for label in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    two.session.close()
    assert two.rest.closed
    assert all(each.closed for each in two.opened)
    with pytest.raises(InferenceError, match="this session is closed"):
        two.ask([0.5], [1])


def test_feeds_are_held_to_the_whole_graph() -> None:
    with pytest.raises(InferenceError, match="class_labels must be int64"):
        Two().session.run(feeds([0.5], [1]) | {"class_labels": np.zeros(1, np.float32)})
