"""What need not wait for each other on a processor's cores: one run on all of them, or rows side by side, each on a core of its own.

Small models lose much of a run to threads that wait for each other; the two branches of guidance need not wait. Which way is faster for a
batch is measured when a session is opened, and for branches of different sizes while they are drawn. Rows are independent, so that both
ways give the same numbers; where activations are rounded by the largest value of a whole batch they do not, and then rows never share a
run: a picture is the same alone and in any batch.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.reference import axis_feeds
from elastic_runtime.errors import InferenceError, UsageError
from elastic_runtime.sessions.session import Arrays, joined

Run = Callable[[Arrays], dict[str, np.ndarray]]
ROUNDS = 3
LONG = 0.5  # seconds of measuring after which the round is the last: where runs are that long, one of each is telling
WORTH = 0.95  # of the time of a single run: less is a matter of the clock
TRIALS = 256  # of sizes that are remembered
SMALL = 256_000_000  # bytes of an artifact whose weights may be held twice
ROWS = 2  # of the batch that is measured: a picture's two branches


class Trial:
    """Two ways of doing the same: some times one after the other, then as often side by side, and from then on what was faster."""

    def __init__(self) -> None:
        self._taken: dict[bool, list[float]] = {False: [], True: []}

    @property
    def beside(self) -> bool:
        """The way to go now: side by side or not."""
        after, beside = self._taken[False], self._taken[True]
        if len(beside) <= ROUNDS:
            return len(after) > ROUNDS
        return min(beside[1:]) < WORTH * min(after[1:])  # at the first of each, threads of the other way may still be busy waiting

    def took(self, beside: bool, seconds: float) -> None:
        if len(self._taken[beside]) <= ROUNDS:
            self._taken[beside].append(seconds)


class Lanes:
    """Runs of a graph in up to `count` rows at a time. `whole` runs on all cores, `lane` on the core of the thread that calls it.

    `alone` keeps rows from sharing a run. Threads may run it at once.
    """

    def __init__(self, graph: Graph, whole: Run, lane: Run, count: int, alone: bool = False):
        self._whole, self._lane, self._alone = whole, lane, alone
        self._batched = graph.batched
        self._pool = ThreadPoolExecutor(max(count - 1, 1), thread_name_prefix="lane")  # threads start when they are first needed
        self._count = count
        self.beside = False  # until it is measured
        self._trials: dict[Hashable, Trial] = {}

    def several(self, runs: Sequence[Arrays], clock: Callable[[], float] = time.perf_counter) -> list[dict[str, np.ndarray]]:
        """The outputs of runs of any sizes, one after the other or side by side: what was faster for these sizes when both were tried."""
        if len(runs) < 2 or self._count < 2:
            return [self.run(feeds) for feeds in runs]
        sizes = tuple(tuple(array.shape for array in feeds.values()) for feeds in runs)
        if len(self._trials) >= TRIALS:
            self._trials.clear()
        trial = self._trials.setdefault(sizes, Trial())
        beside, begun = trial.beside, clock()
        outputs = self._beside(runs) if beside else [self.run(feeds) for feeds in runs]
        trial.took(beside, clock() - begun)
        return outputs

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """The graph's outputs for feeds of any batch."""
        size = len(feeds[self._batched[0]])
        if self.beside and size > 1:
            return self._side_by_side(feeds, size)
        return joined([self._whole(part) for part in self._parts(feeds, size)]) if self._alone else self._whole(feeds)

    def measure(self, feeds: Arrays, clock: Callable[[], float] = time.perf_counter) -> None:
        """Take the way that is faster on `feeds`."""
        taken: dict[bool, list[float]] = {False: [], True: []}
        opened = clock()
        for _ in range(ROUNDS):
            for beside, seconds in taken.items():
                self.beside = beside
                self.run(feeds)  # threads of the other way may still be busy waiting
                begun = clock()
                self.run(feeds)
                seconds.append(clock() - begun)
            if clock() - opened >= LONG:
                break
        self.beside = min(taken[True]) < WORTH * min(taken[False])

    def choose(self, manifest: Manifest, graph: Graph, asked: bool) -> None:
        """Side by side where that was `asked` for, else the way that is faster on a guided step."""
        if asked:
            self.beside = self._count > 1
        elif self._count > 1:
            self.measure(example(manifest, graph))

    def close(self) -> None:
        self._pool.shutdown()

    def _side_by_side(self, feeds: Arrays, size: int) -> dict[str, np.ndarray]:
        edges = np.linspace(0, size, min(self._count, size) + 1).round().astype(int)
        return joined(self._beside([self._rows(feeds, slice(int(low), int(high))) for low, high in pairwise(edges)]))

    def _beside(self, shares: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """The outputs of each share; this thread and those of the pool take them in turn."""
        left, outputs = deque(enumerate(shares)), dict[int, dict[str, np.ndarray]]()

        def work() -> None:
            while left:
                try:
                    place, share = left.popleft()
                except IndexError:  # another thread was faster
                    return
                outputs[place] = self._share(share)

        try:
            others = [self._pool.submit(work) for _ in range(min(self._count, len(shares)) - 1)]
        except RuntimeError as error:  # the pool was shut down by another thread
            left.clear()
            raise InferenceError(f"no thread for a lane, or this session is closed: {error}") from error
        try:
            work()
        except BaseException:
            left.clear()
            raise
        finally:
            rest = [other.exception() for other in others]  # nothing is left running where one fails
        if failure := next((error for error in rest if error), None):
            raise failure
        return [outputs[place] for place in range(len(shares))]

    def _share(self, feeds: Arrays) -> dict[str, np.ndarray]:
        size = len(feeds[self._batched[0]])
        return joined([self._lane(part) for part in self._parts(feeds, size)]) if self._alone else self._lane(feeds)

    def _parts(self, feeds: Arrays, size: int) -> list[Arrays]:
        return [self._rows(feeds, slice(row, row + 1)) for row in range(size)]

    def _rows(self, feeds: Arrays, rows: slice) -> Arrays:
        return {name: array[rows] if name in self._batched else array for name, array in feeds.items()}


def wanted(bundle: Bundle, graph: Graph, artifact: Artifact, cores: int, asked: int | None) -> int:
    """How many rows of a denoiser may run side by side on so many cores: what was `asked` for, else one a core of a small one, whose ways
    are to be measured.

    Raises: UsageError for lanes that are no whole number from 1.
    """
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise UsageError(f"lanes is a whole number from 1, got {asked!r}")
    if cores < 2 or graph is not bundle.manifest.graphs.get("denoiser") or not splits(graph):
        return 1
    if asked is not None:
        return min(asked, graph.batch.max)
    return cores if sum(file.bytes for file in artifact.files) < SMALL else 1


def splits(graph: Graph) -> bool:
    """Whether a graph's rows are independent samples that a run may hold one of."""
    return graph.batch.min == 1 and graph.batch.max >= ROWS and all(spec.shape[:1] == ("B",) for spec in graph.outputs)


def example(manifest: Manifest, graph: Graph) -> dict[str, np.ndarray]:
    """Feeds of two rows at the default budget and the largest other dimensions: what a guided step asks for."""
    sizes = {name: span.max for name, span in graph.dimensions.items()} | {"B": ROWS}
    source = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for spec in graph.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        values = source.standard_normal(shape) if spec.dtype == "float32" else np.zeros(shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds | {name: array for name, array in axis_feeds(manifest.axes, Budget().on(manifest.axes)).items() if name in feeds}
