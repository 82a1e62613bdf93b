"""A denoiser in two files: what depends on a sample's conditions alone is run once for all steps of a picture, the rest at each."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from elastic_runtime.contract.artifacts import Apart, Graph, OnnxArtifact
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import InferenceError
from elastic_runtime.sessions.session import Arrays, Session

TIME = "timestep"
# Rows of every run, the last ones repeated: kernels add in an order that the number of rows decides, and a picture is to be the same
# whoever else is drawn beside it, and whether its times were foreseen or not.
ROWS = 8
KEPT = 256_000_000  # bytes of rows, beyond what one run needs
LARGE = 256_000_000  # bytes of a file that is closed again when a picture's rows are there


def rest(graph: Graph, apart: Apart) -> Graph:
    """What an artifact's own file takes and gives."""
    left = tuple(spec for spec in graph.inputs if spec.name not in apart.gone)
    return msgspec.structs.replace(graph, inputs=(*left, *apart.outputs), artifacts=())


def conditions(graph: Graph, apart: Apart) -> Graph:
    """What the file of its own takes and gives; any number of rows, unless the graph has only one batch."""
    inputs = tuple(spec for spec in graph.inputs if spec.name in apart.inputs)
    batch = graph.batch if graph.batch.min == graph.batch.max else Span(1, ROWS)
    return Graph(inputs=inputs, outputs=apart.outputs, dimensions={"B": batch}, artifacts=())


def halves(artifact: OnnxArtifact, apart: Apart) -> tuple[OnnxArtifact, OnnxArtifact]:
    """The artifact without the file of its own, and that alone, each with the files that hold its weights."""
    own = tuple(file for file in artifact.files if file.path.startswith(apart.path))
    others = tuple(file for file in artifact.files if file not in own)
    return tuple(msgspec.structs.replace(artifact, files=files, conditions=None) for files in (others, own))  # type: ignore[return-value]


class ApartSession(Session):
    """Two sessions as one. Any thread may run it.

    Rows of conditions are kept, as many as `KEPT` bytes hold, so that steps at times that were foreseen, and pictures of the same class at
    the same times, compute none. `open_conditions` opens the file of its own when rows are missing; where it is `large`, it is closed
    again when those of a picture are there.
    """

    def __init__(self, graph: Graph, apart: Apart, rest: Session, open_conditions: Callable[[], Session], large: bool = False):
        super().__init__(graph, rest.batch, rest.budgets)
        self._apart, self._rest, self._open, self._large = apart, rest, open_conditions, large
        self.where, self.processor = rest.where, rest.processor
        self._conditions: Session | None = None
        self._kept: OrderedDict[bytes, dict[str, np.ndarray]] = OrderedDict()
        self._times: np.ndarray = np.empty(0, np.float32)
        self._lock = threading.Lock()
        self._closed = False

    def foresee(self, times: Sequence[float] | np.ndarray) -> None:
        self._times = np.unique(np.asarray(times, np.float32))

    def several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        for feeds in runs:
            self.interface.check(feeds)
        return self._rest.several([self._left(feeds) for feeds in runs])

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._rest._run(self._left(feeds))  # whose feeds were checked as the whole graph's

    def _left(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """What the artifact's own file takes."""
        rows = self._rows({name: feeds[name] for name in self._apart.inputs})
        return {name: array for name, array in feeds.items() if name not in self._apart.gone} | rows

    def _rows(self, given: Arrays) -> dict[str, np.ndarray]:
        """A row for each sample, of what is kept or computed now."""
        keys = _keys(given)
        with self._lock:
            if self._closed:
                raise InferenceError("this session is closed")
            if missing := [row for row, key in enumerate(keys) if key not in self._kept]:
                self._compute({name: array[missing] for name, array in given.items()})
            rows = [self._kept[key] for key in keys]
            for key in keys:
                self._kept.move_to_end(key)
            most = max(KEPT // sum(array.nbytes for array in rows[0].values()), len(keys), len(self._times))
            while len(self._kept) > most:
                self._kept.popitem(last=False)
        return {spec.name: np.stack([row[spec.name] for row in rows]) for spec in self._apart.outputs}

    def _compute(self, given: dict[str, np.ndarray]) -> None:
        """Keep the rows of `given` conditions, and of the same ones at the other times that were foreseen."""
        wanted = self._spread(given)
        distinct = {key: row for row, key in enumerate(_keys(wanted)) if key not in self._kept}
        places = list(distinct.values())
        if self._conditions is None:
            self._conditions = self._open()
        size = min(self._conditions.batch.max, ROWS)
        for first in range(0, len(places), size):
            part = places[first : first + size]
            filled = part + part[-1:] * (size - len(part))
            outputs = self._conditions.run({name: array[filled] for name, array in wanted.items()})
            for row, place in enumerate(part):
                key = _keys({name: array[[place]] for name, array in wanted.items()})[0]
                self._kept[key] = {name: array[row].copy() for name, array in outputs.items()}
        if self._large and len(places) > len(given[next(iter(given))]):  # more than this run's were foreseen: none is missing soon
            self._conditions.close()
            self._conditions = None

    def _spread(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows `given` and, where they are at times that were foreseen, each of them at all of those."""
        if TIME not in given or not np.isin(given[TIME], self._times).all():
            return given
        count, times = len(given[TIME]), len(self._times)
        wide = {name: np.repeat(array, times, axis=0) for name, array in given.items()}
        return {name: np.concatenate([given[name], array]) for name, array in (wide | {TIME: np.tile(self._times, count)}).items()}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._kept.clear()
            if self._conditions:
                self._conditions.close()
        self._rest.close()


def opened(
    bundle: Bundle, graph: Graph, artifact: OnnxArtifact, open_half: Callable[..., Session], options: Mapping[str, object]
) -> ApartSession:
    """An artifact in two files, each opened by `open_half(bundle, graph, artifact, **options)`."""
    apart = artifact.conditions
    assert apart is not None
    mine, own = halves(artifact, apart)
    part = copy.copy(bundle)  # to a backend the rest is the denoiser
    inner = rest(graph, apart)
    part.manifest = msgspec.structs.replace(bundle.manifest, graphs=bundle.manifest.graphs | {"denoiser": inner})

    def open_conditions() -> Session:
        return open_half(bundle, conditions(graph, apart), own, **options)

    return ApartSession(
        graph, apart, open_half(part, inner, mine, **options), open_conditions, sum(file.bytes for file in own.files) >= LARGE
    )


def _keys(given: Arrays) -> list[bytes]:
    """What tells rows of conditions apart."""
    arrays = list(given.values())
    return [b"".join(array[row].tobytes() for array in arrays) for row in range(len(arrays[0]))]
