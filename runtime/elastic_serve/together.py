"""Drawings that share runs of a denoiser, each a coroutine that hands out what it would run and is given the answer.

A drawing is `ElasticPipeline.draw` as it is, on a greenlet of its own: where it would call the session, it is set aside with its feeds, and
whoever drives the drawings runs those of several of them at once. The numbers are those of a batch, which is how a pipeline runs several
pictures of one request.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

from elastic_runtime.errors import ElasticError, InferenceError
from elastic_runtime.sessions.session import Arrays, Session, batches, joined


class Shared(Session):
    """A session whose runs from within a `Drawing` are left to whoever drives it; from elsewhere they are as ever."""

    def __init__(self, session: Session):
        super().__init__(session.graph, session.batch, session.budgets, session.spans)
        self.session, self.where, self.processor, self.origin = session, session.where, session.processor, session.origin

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._several([feeds])[0]

    def _several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        return [_out(feeds) for feeds in runs] if isinstance(getcurrent(), _Coroutine) else self.session._several(runs)

    def foresee(self, times: Sequence[float] | np.ndarray) -> None:
        self.session.foresee(times)

    def close(self) -> None:
        self.session.close()


class _Coroutine(greenlet):
    """The greenlet of a drawing."""


class Paused:
    """What `pause` hands out: a drawing stands between two of its steps."""


def pause() -> None:
    """Called within a drawing: set it aside until it is resumed."""
    _out(Paused())


def _out(what: Any) -> Any:
    """Hand something out of the drawing that runs, and wait to be resumed."""
    driver = getcurrent().parent
    assert driver is not None  # drawings are driven from a greenlet that has none
    return driver.switch(what)


class Drawing:
    """`draw()` as a coroutine: `resume` runs it up to its next pause, or to feeds that it wants run."""

    def __init__(self, draw: Callable[[], Any]):
        self._coroutine = _Coroutine(self._run)
        self._draw: Callable[[], Any] | None = draw
        self.feeds: Arrays | None = None
        self.result: Any = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self._coroutine.dead

    def resume(self, answer: dict[str, np.ndarray] | None = None) -> None:
        """Go on, with the answer to `feeds` where some were wanted."""
        self._took(self._coroutine.switch() if answer is None else self._coroutine.switch(answer))

    def fail(self, error: Exception) -> None:
        """Go on with an error in place of the answer."""
        self._took(self._coroutine.throw(error))

    def cancel(self) -> None:
        """End it where it stands."""
        if self._coroutine and not self.done:
            self._coroutine.throw()
        self.feeds = None

    def _took(self, handed: Any) -> None:
        """Take what the coroutine handed out: feeds, a pause, or nothing at its end."""
        self.feeds = None if handed is None or isinstance(handed, Paused) else handed

    def _run(self) -> None:
        draw, self._draw = self._draw, None  # which may hold this, and a picture's texts
        assert draw is not None
        try:
            self.result = draw()
        except Exception as error:
            self.error = error


@dataclass(frozen=True)
class Ran:
    """Runs that were taken for a step of several drawings, and the largest of them, in rows."""

    runs: int = 0
    rows: int = 0


def step(drawings: Sequence[Drawing], session: Session) -> Ran:
    """Take drawings from one pause to the next or to their end; what they want run at the same time, and alike, shares a run."""
    for drawing in drawings:
        drawing.resume()
    runs, most = 0, 0
    while wanting := [drawing for drawing in drawings if drawing.feeds is not None]:
        for group in alike(session, wanting):
            answers, taken, rows = answer(session, [drawing.feeds or {} for drawing in group])
            runs, most = runs + taken, max(most, rows)
            for drawing, given in zip(group, answers, strict=True):
                if isinstance(given, Exception):
                    drawing.fail(given)
                else:
                    drawing.resume(given)
    return Ran(runs, most)


def alike(session: Session, drawings: Sequence[Drawing]) -> list[list[Drawing]]:
    """Drawings whose feeds may share a run: rows of the same shape, and everything else the same."""
    batched = session.graph.batched
    groups: dict[tuple[Any, ...], list[Drawing]] = {}
    for drawing in drawings:
        feeds = drawing.feeds or {}
        parts = ((feeds[name].shape[1:] if name in batched else (feeds[name].shape, feeds[name].tobytes())) for name in sorted(feeds))
        groups.setdefault(tuple(parts), []).append(drawing)
    return list(groups.values())


def answer(session: Session, feeds: Sequence[Arrays]) -> tuple[list[dict[str, np.ndarray] | Exception], int, int]:
    """Outputs for each of several feeds that are alike, the runs that they took, and the largest in rows."""
    sizes = [_rows(session, each) for each in feeds]
    if len(feeds) > 1 and not all(spec.shape[:1] == ("B",) for spec in session.graph.outputs):
        return [_alone(session, each) for each in feeds], len(feeds), max(sizes)
    batched, whole = session.graph.batched, sum(sizes)
    together = {name: np.concatenate([each[name] for each in feeds]) if name in batched else feeds[0][name] for name in feeds[0]}
    try:
        parts = batches(session, whole)
        outputs = joined(
            [session.run({name: array[rows] if name in batched else array for name, array in together.items()}) for rows in parts]
        )
    except ElasticError:  # a batch that the artifact does not take, or somebody's feeds that the backend does not: each on its own
        return [_alone(session, each) for each in feeds], len(feeds), max(sizes)
    edges = np.cumsum([0, *sizes])
    answers: list[dict[str, np.ndarray] | Exception] = [
        {name: array[low:high] for name, array in outputs.items()} for low, high in itertools.pairwise(edges)
    ]
    return answers, len(parts), max(part.stop - part.start for part in parts)


def _rows(session: Session, feeds: Arrays) -> int:
    return len(feeds[session.graph.batched[0]])


def _alone(session: Session, feeds: Arrays) -> dict[str, np.ndarray] | Exception:
    try:
        return session.run(feeds)
    except ElasticError as error:
        return error
    except Exception as error:
        return InferenceError(f"{session.where} failed: {error}")
