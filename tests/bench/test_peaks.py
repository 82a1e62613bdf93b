"""Peaks of a processor against a clock of the test's own."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from elastic_export.bench import peaks as room
from elastic_export.bench.peaks import LONGEST, SIDES, THREADS, highest
from elastic_runtime.errors import InferenceError


@pytest.mark.parametrize(("rate", "sides"), [(1e12, SIDES), (1e10, (256, 1024, 2048)), (5e8, (256,))])
def test_a_rate_that_has_no_instructions_is_not_measured_for_minutes(rate: float, sides: tuple[int, ...]) -> None:
    now, tried = 0.0, []

    def product(side: int) -> Callable[[], object]:
        tried.append(side)

        def run() -> None:
            nonlocal now
            now += 2 * side**3 / rate

        return run

    assert highest(product, lambda: now) == pytest.approx(rate)
    assert tuple(tried) == sides
    assert 2 * sides[-1] ** 3 / rate <= LONGEST


def test_a_process_that_dies_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(room.ProcessPoolExecutor):
        def submit(self, *arguments: Any, **words: Any) -> Any:
            future: Any = Future()
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
            return future

    monkeypatch.setattr(room, "ProcessPoolExecutor", Pool)
    with pytest.raises(InferenceError, match="the process that measures the processor's peaks died, as systems end one"):
        room.peaks(1)


def test_numpy_is_measured_in_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str | None] = {}

    class Pool(room.ProcessPoolExecutor):
        def submit(self, *arguments: Any, **words: Any) -> Any:
            seen.update({name: os.environ.get(name) for name in (room.MISLEADING, *THREADS)})
            raise MemoryError

    monkeypatch.setattr(room, "ProcessPoolExecutor", Pool)
    monkeypatch.setenv(room.MISLEADING, "Prescott")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with pytest.raises(MemoryError):
        room.peaks(3)
    assert seen == {room.MISLEADING: None, **dict.fromkeys(THREADS, "3")}
    assert (os.environ[room.MISLEADING], os.environ["OMP_NUM_THREADS"], os.environ.get("MKL_NUM_THREADS")) == ("Prescott", "1", None)
