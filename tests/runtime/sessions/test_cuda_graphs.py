"""CUDA graphs of ONNX Runtime sessions, against a stand-in with the library's rules; samples/gpu_check.py runs them on a GPU."""

import threading
from pathlib import Path

import fake_ort
import numpy as np
import pytest
from fakes import answers_stay_with_their_thread, write_bundle

from elastic_runtime import Bundle, Session, open_session
from elastic_runtime.sessions import cuda_graphs


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "b")


def feeds(time: float = 0.5, batch: int = 1, latents: int = 4) -> dict[str, np.ndarray]:
    return {
        "sample": np.full((batch, 4, 8, 8), time, np.float32),
        "timestep": np.full(batch, time, np.float32),
        "class_labels": np.arange(batch),
        "latent_ids": np.arange(latents),
    }


def right(session: Session, **sizes: float) -> bool:
    given = feeds(**sizes)
    expected = given["sample"] + sum(array.sum() for name, array in given.items() if name != "sample")
    return np.allclose(session.run(given)["prediction"], expected)


def test_a_shape_is_captured_at_its_second_run_and_replayed_with_new_numbers(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_ort.install(monkeypatch)
    with open_session(bundle, device="cuda") as session:
        assert all(right(session, time=time) for time in (0.1, 0.2, 0.3, 0.4))
        assert library.runs == ["plain", "capture", "replay", "replay"]
        assert all(right(session, latents=8, time=time) for time in (0.1, 0.2, 0.3)), "another budget has a graph of its own"
        assert right(session, time=0.7), "and the first one's still holds"
        assert library.runs[4:] == ["plain", "capture", "replay", "replay"]


def test_answers_are_not_overwritten_by_the_next_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ort.install(monkeypatch)
    with open_session(bundle, device="cuda") as session:
        answers = [session.run(feeds(time))["prediction"] for time in (0.1, 0.2, 0.3, 0.4)]
    assert len({float(answer.flat[0]) for answer in answers}) == 4


@pytest.mark.parametrize("when", ["opened", "captured"])
def test_a_model_that_cannot_be_captured_runs_without(
    when: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library, left = fake_ort.install(monkeypatch, uncapturable=when), list[int]()
    library.opening = lambda: left.append(sum(session() is not None for session in library.opened))
    with caplog.at_level("INFO"), open_session(bundle, device="cuda") as session:
        assert all(right(session, time=time) for time in (0.1, 0.2, 0.3))
        assert session.processor == "gpu"
    assert set(library.runs) == {"plain"}
    assert left == [0, 0], "the GPU may hold the model once"
    assert "enable_cuda_graph" not in library.providers[0][1], "the session that is left was opened without"
    assert "runs without CUDA graphs" in caplog.text


def test_graphs_are_kept_for_so_many_shapes_and_the_rest_run_plainly(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_ort.install(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    with open_session(bundle, device="cuda") as session:
        assert all(right(session, latents=latents) for latents in (4, 8, 12) for _ in range(3))
    assert library.runs == ["plain", "capture", "replay"] * 2 + ["plain"] * 3


def test_a_shape_is_captured_while_no_other_thread_opens_a_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server does, which opens text encoders beside the steps."""
    library = fake_ort.install(monkeypatch)
    opening, done = threading.Event(), threading.Event()

    def slowly() -> None:
        opening.set()
        assert done.wait(30)

    with open_session(bundle, device="cuda") as session:
        assert right(session)
        library.opening = slowly
        beside = threading.Thread(target=lambda: open_session(bundle, device="cuda").close())
        beside.start()
        assert opening.wait(30)
        assert right(session, time=0.1)
        assert library.runs == ["plain", "plain"], "it waits for nobody"
        done.set()
        beside.join()
        assert right(session, time=0.2)
        assert right(session, time=0.3)
        assert library.runs[2:] == ["capture", "replay"]


def test_a_session_that_is_opened_waits_for_the_end_of_a_capture() -> None:
    gpu, worked = cuda_graphs.Gpu(), threading.Event()

    def work() -> None:
        with gpu.work():
            worked.set()

    other = threading.Thread(target=work)
    with gpu.capture() as alone:
        assert alone
        other.start()
        assert not worked.wait(0.05)
        with gpu.capture() as second:
            assert not second
    other.join()
    assert worked.is_set()


def test_threads_get_their_own_answers(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ort.install(monkeypatch)
    with open_session(bundle, device="cuda") as session:
        answers_stay_with_their_thread(
            lambda k: session.run(feeds(k / 8))["prediction"], lambda k: feeds(k / 8)["sample"] + k / 8 + np.arange(4).sum()
        )
