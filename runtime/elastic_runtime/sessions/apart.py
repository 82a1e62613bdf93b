"""A denoiser in two files: what depends on a sample's conditions alone is run once for all steps of a picture, the rest at each."""

import copy
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from elastic_runtime.contract.artifacts import Apart, Artifact, CoremlArtifact, Graph, Profile, Range, TrtArtifact
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import BundleError, InferenceError
from elastic_runtime.sessions.session import Arrays, Session

TIME = "timestep"
# Rows of every run, the last ones repeated: kernels add in an order that the number of rows decides, and a picture is to be the same
# whoever else is drawn beside it, and whether its times were foreseen or not.
ROWS = 8
KEPT = 256_000_000  # bytes of rows, beyond what one run needs
LARGE = 256_000_000  # bytes of a file that is closed again when a picture's rows are there
COURSES = 16  # of pictures under way, whose times are remembered


def rest(graph: Graph, apart: Apart) -> Graph:
    """What an artifact's own file takes and gives."""
    return msgspec.structs.replace(graph, inputs=apart.rest(graph.inputs))


def conditions(graph: Graph, apart: Apart) -> Graph:
    """What the file of its own takes and gives; any number of rows, unless the graph has only one batch, or a function its own."""
    if apart.call:
        batch = Span(apart.call.sizes["B"], apart.call.sizes["B"])
    else:
        batch = graph.batch if graph.batch.min == graph.batch.max else Span(1, ROWS)
    return Graph(inputs=apart.own(graph.inputs), outputs=apart.outputs, dimensions={"B": batch}, artifacts=())


def profile(conditions: Graph) -> Profile:
    """What an engine of the file of its own serves: as many rows as every run has."""
    batch = conditions.batch
    return Profile(dimensions={"B": Range(batch.min, batch.max, batch.max)})


class ApartSession(Session):
    """Two sessions as one. Any thread may run it.

    Rows of conditions are kept, as many as `KEPT` bytes hold, so that steps at times that were foreseen, and pictures of the same class at
    the same times, compute none. `conditions` is the session of the file of its own; without one, as where it is large, `open_conditions`
    opens it when rows are missing, and it is closed again when those of a picture are there.
    """

    def __init__(
        self, graph: Graph, apart: Apart, rest: Session, open_conditions: Callable[[], Session], conditions: Session | None = None
    ):
        super().__init__(graph, rest.batch, rest.budgets, rest.spans)
        self._apart, self._rest, self._open = apart, rest, open_conditions
        self.where, self.processor, self.gathers, self.fell_back = rest.where, rest.processor, rest.gathers, rest.fell_back
        self._conditions, self._stays = conditions, conditions is not None
        self._row = 4 * sum(int(spec.shape[1]) for spec in apart.outputs)  # bytes
        self._kept: OrderedDict[bytes, dict[str, np.ndarray]] = OrderedDict()
        self._courses: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock, self._process = threading.Lock(), os.getpid()
        self._closed = False

    def foresee(self, times: Sequence[float] | np.ndarray) -> None:
        course = np.array(list(dict.fromkeys(np.asarray(times, np.float32).tolist())), np.float32)  # in their order
        with self._lock:
            self._courses[course.tobytes()] = course
            self._courses.move_to_end(course.tobytes())
            while len(self._courses) > COURSES:
                self._courses.popitem(last=False)

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._rest._run(self._left(feeds))  # whose feeds were checked as the whole graph's

    def _several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        return self._rest._several([self._left(feeds) for feeds in runs])

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
            for key in keys:
                if key in self._kept:  # and needed now: others go first
                    self._kept.move_to_end(key)
            first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._kept}
            if first:
                self._compute({name: array[list(first.values())] for name, array in given.items()}, set(keys))
            rows = [self._kept[key] for key in keys]
            if first:  # a run that computes none has nothing to let go, and no time to look
                self._let_go(max(KEPT // self._row, len(first)), set())
        return {spec.name: np.stack([row[spec.name] for row in rows]) for spec in self._apart.outputs}

    def _compute(self, given: dict[str, np.ndarray], needed: set[bytes]) -> None:
        """Keep the rows of `given` conditions, and of the same ones at the next times that were foreseen, as many as fit beside those that
        are `needed` now."""
        count = len(next(iter(given.values())))
        wanted, whole = self._spread(given, count)
        keys = _keys(wanted)
        places = [place for place, key in enumerate(keys) if key not in self._kept]
        self._let_go(max(KEPT // self._row - len(places), 0), needed | set(keys))
        if self._conditions is None:
            self._conditions = self._opened()
        size = max(self._conditions.batch.min, min(self._conditions.batch.max, ROWS))
        for first in range(0, len(places), size):
            part = places[first : first + size]
            filled = part + part[-1:] * (size - len(part))
            outputs = self._conditions.run({name: array[filled] for name, array in wanted.items()})
            for row, place in enumerate(part):
                self._kept[keys[place]] = {name: array[row].copy() for name, array in outputs.items()}
        if not self._stays and whole:  # no row of these pictures will be missing
            self._conditions.close()
            self._conditions = None

    def _opened(self) -> Session:
        try:
            return self._open()
        except BundleError as error:  # it was whole when the session was opened
            raise InferenceError(f"the denoiser's conditions cannot be opened any more: {error}") from error

    def _let_go(self, most: int, spare: set[bytes]) -> None:
        """Of the rows that are kept let the oldest go, until there are `most` beside those to `spare`."""
        old = [key for key in self._kept if key not in spare]
        for key in old[: max(len(old) - most, 0)]:
            del self._kept[key]

    def _spread(self, given: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], bool]:
        """The rows `given` and, where all are at times of one course, each of them at those that follow, as many as are kept; and whether
        these are all that do."""
        times = given.get(TIME, np.empty(0, np.float32))
        course = next((each for each in reversed(self._courses.values()) if len(times) and np.isin(times, each).all()), None)
        if course is None:
            return given, False
        onward = course[min(int(np.flatnonzero(course == time)[0]) for time in times) :]
        fitting = onward[: max(KEPT // self._row // count, 1)]
        wide = {name: np.repeat(array, len(fitting), axis=0) for name, array in given.items()}
        wide[TIME] = np.tile(fitting, count)
        together = {name: np.concatenate([given[name], array]) for name, array in wide.items()}
        _, unique = np.unique(np.array(_keys(together), dtype=object), return_index=True)
        return {name: array[np.sort(unique)] for name, array in together.items()}, len(fitting) == len(onward)

    def close(self) -> None:
        try:
            if os.getpid() == self._process:  # in a process that was forked the lock may stay held for ever
                self._lock.acquire()
            self._closed = True
            self._kept.clear()
            if self._conditions:
                self._conditions.close()
        finally:
            if os.getpid() == self._process:
                self._lock.release()
            self._rest.close()


def opened(
    bundle: Bundle, graph: Graph, artifact: Artifact, open_half: Callable[..., Session], options: Mapping[str, object]
) -> ApartSession:
    """An artifact in two files, each opened by `open_half(bundle, graph, artifact, **options)`.

    Raises: what that does, for either file.
    """
    apart = artifact.conditions
    assert apart is not None
    mine, own = halves(graph, artifact, apart)
    inner = rest(graph, apart)
    part = copy.copy(bundle)  # to a backend the rest is the denoiser
    part.manifest = msgspec.structs.replace(bundle.manifest, graphs=bundle.manifest.graphs | {"denoiser": inner})
    # Its eight rows share a run in every way of drawing.
    alone = {name: value for name, value in options.items() if name != "lanes"}

    def open_conditions() -> Session:
        return open_half(bundle, conditions(graph, apart), own, **alone)

    first = open_conditions()  # also where it is large: what is damaged is told now
    try:
        if large := sum(file.bytes for file in own.files) >= LARGE:
            first.close()
        return ApartSession(graph, apart, open_half(part, inner, mine, **options), open_conditions, None if large else first)
    except BaseException:
        first.close()
        raise


def halves(graph: Graph, artifact: Artifact, apart: Apart) -> tuple[Artifact, Artifact]:
    """The artifact without the file of its own, and that alone, each with the files that hold its weights: both, of a package."""
    if isinstance(artifact, CoremlArtifact):
        assert apart.call
        rows = conditions(graph, apart).batch
        own_part = msgspec.structs.replace(artifact, shapes="functions", batch=rows, calls=(apart.call,), conditions=None)
        return msgspec.structs.replace(artifact, conditions=None), own_part
    # Weights of more than one file have a number in the midst of its name: denoiser-00001-of-00002.conditions.onnx.data.
    own = [file for file in artifact.files if re.sub(r"-\d+-of-\d+(?=\.)", "", file.path) in (apart.path, f"{apart.path}.data")]
    own.sort(key=lambda file: file.path != apart.path)
    others = tuple(file for file in artifact.files if file not in own)
    changes: dict[str, object] = {}
    if isinstance(artifact, TrtArtifact):
        changes = {"profiles": (profile(conditions(graph, apart)),)}
        for each in graph.artifacts:  # of the very file that it was built from, whose other half is the source of this one
            if each.conditions and (each.path, each.files[0].sha256) == (artifact.source, artifact.source_sha256):
                (source,) = (file for file in each.files if file.path == each.conditions.path)
                changes |= {"source": source.path, "source_sha256": source.sha256}
    return (
        msgspec.structs.replace(artifact, files=others, conditions=None),
        msgspec.structs.replace(artifact, files=tuple(own), conditions=None, **changes),
    )


def _keys(given: Arrays) -> list[bytes]:
    """What tells rows of conditions apart."""
    arrays = list(given.values())
    return [b"".join(array[row].tobytes() for array in arrays) for row in range(len(arrays[0]))]
