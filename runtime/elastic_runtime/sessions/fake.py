"""A session without a backend, for tests of everything above it."""

from collections.abc import Callable

import numpy as np

from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.errors import InferenceError
from elastic_runtime.sessions.session import Arrays, Session

__all__ = ["FakeSession"]


class FakeSession(Session):
    """Runs `function(feeds) -> outputs` and keeps every call in `calls` (name -> shape of each feed)."""

    where = "fake"

    def __init__(self, graph: Graph, function: Callable[[Arrays], dict[str, np.ndarray]]):
        super().__init__(graph)
        self.calls: list[dict[str, tuple[int, ...]]] = []
        self.closed = False
        self._function = function

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self.closed:
            raise InferenceError("this session is closed")
        self.calls.append({name: array.shape for name, array in feeds.items()})
        return self._function(feeds)

    def close(self) -> None:
        self.closed = True
