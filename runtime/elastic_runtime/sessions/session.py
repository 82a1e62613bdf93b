"""A session: one graph of a bundle, opened by a backend, ready to run at any of its budgets.

A backend is a file in this folder. It declares which targets it opens and says what is missing where it cannot run; only
that file imports its library, and only when it opens something.
"""

import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Self

import numpy as np

from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Artifact, Graph, TensorSpec
from elastic_runtime.errors import BudgetError, BundleError, InferenceError, MissingError

BACKENDS = ("trt", "ort", "openvino", "coreml")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Origin:
    """What a session was opened from: the artifact, the backend's name, and the options that were given."""

    artifact: Artifact
    backend: str
    options: Mapping[str, object]


class Session(ABC):
    """An open artifact. Close it, or use it in a `with` block.

    A subclass implements `_run` and `close`, and says in `where` what it runs on. An artifact may offer less than its graph:
    `batch` is the span of one run, `budgets` are the points that it was compiled for (None: every budget of the axes). `origin` is
    None for a session that no artifact was opened for.
    """

    where: str
    origin: Origin | None = None

    def __init__(self, graph: Graph, batch: Span | None = None, budgets: tuple[Budget, ...] | None = None):
        self.graph = graph
        self.batch = batch or graph.batch
        self.budgets = budgets

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run the graph on named arrays and return its outputs by name.

        Raises: InferenceError if a feed is missing, unknown, or of another dtype or shape than the graph's, or if the
        backend fails.
        """
        check_feeds(self.graph, feeds)
        return self._run(feeds)

    @abstractmethod
    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]: ...

    @abstractmethod
    def close(self) -> None:
        """Release the backend's memory; running afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def batches(session: Session, size: int) -> list[slice]:
    """Rows of each run for `size` samples, as few and as equal runs as the session's batch span allows.

    Raises: BudgetError where `size` does not divide into runs of that span; nothing is padded.
    """
    span = session.batch
    edges = np.linspace(0, size, -(-size // span.max) + 1).round().astype(int)
    if np.diff(edges).min() < span.min:
        raise BudgetError(f"{session.where} takes batches of {span}; {size} samples (guidance counted) do not divide into such runs")
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def check_feeds(graph: Graph, feeds: Arrays) -> None:
    """Raise InferenceError unless `feeds` are exactly the graph's inputs, with equal open dimensions.

    An int64 vector over an open dimension of its own carries a budget by its length and is always arange: graphs read nothing else
    of it, so another selection would silently be taken for a prefix.
    """
    names = {spec.name for spec in graph.inputs}
    if names != set(feeds):
        raise InferenceError(f"the graph takes {sorted(names)}, got {sorted(feeds)}")
    open_dimensions: dict[str, int] = {}
    for spec in graph.inputs:
        array = feeds[spec.name]
        if array.dtype.name != spec.dtype:
            raise InferenceError(f"{spec.name} must be {spec.dtype}, got {array.dtype.name}")
        if len(array.shape) != len(spec.shape) or not all(
            open_dimensions.setdefault(wanted, size) == size if isinstance(wanted, str) else wanted == size
            for wanted, size in zip(spec.shape, array.shape, strict=True)
        ):
            raise InferenceError(f"{spec.name} must have shape {_shape(spec)} with equal letters equal, got {array.shape}")
        if spec.dtype == "int64" and len(spec.shape) == 1 and spec.shape != ("B",) and (array != np.arange(len(array))).any():
            raise InferenceError(f"{spec.name} must be arange({len(array)}): kept ones are always the first, got {array[:8].tolist()}")
    for name, size in open_dimensions.items():
        if size not in graph.dimensions[name]:
            raise InferenceError(f"this graph takes {name} of {graph.dimensions[name]}, got {size}")


def _shape(spec: TensorSpec) -> str:
    return f"({', '.join(map(str, spec.shape))})"


def backend(name: str) -> ModuleType:
    """The module of a backend by name; raises MissingError listing those that exist."""
    if name not in BACKENDS:
        raise MissingError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}")
    return importlib.import_module(f"elastic_runtime.sessions.{name}")


def obstacles(artifact: Artifact, name: str | None = None) -> tuple[ModuleType | None, list[str]]:
    """The first backend here that can run `artifact` (or `name` alone), and why the ones before it cannot.

    A backend's `obstacle(artifact)` names what is missing here: a package, a device, or the device it was built for.
    """
    reasons: list[str] = []
    for candidate in [name] if name else BACKENDS:
        room = backend(candidate)
        if artifact.target not in room.OPENS:
            continue
        reason = room.obstacle(artifact)
        if reason is None:
            return room, reasons
        reasons.append(f"{candidate}: {reason}")
    return None, reasons or [f"no backend{f' {name}' if name else ''} opens {artifact.target} artifacts"]


def open_artifact(bundle: Bundle, graph: str, artifact: Artifact, name: str | None = None, **options: object) -> Session:
    """Open one artifact of a graph with backend `name`, or the first one that can.

    Raises: MissingError saying why nothing here can run it; BundleError if it is damaged.
    """
    room, reasons = obstacles(artifact, name)
    if room is None:
        raise MissingError(f"nothing here can run {artifact.path}. {' '.join(reasons)}")
    session: Session = room.open_artifact(bundle, bundle.manifest.graphs[graph], artifact, **options)
    session.origin = Origin(artifact, room.__name__.rpartition(".")[2], options)
    return session


def open_session(bundle: Bundle, graph: str = "denoiser", name: str | None = None, **options: object) -> Session:
    """Open a graph of a bundle: its first artifact that backend `name`, or any backend here, can run.

    Backends are tried in the order of `BACKENDS`, and each backend's artifacts in the manifest's order.

    Raises: BundleError if the bundle has no such graph; MissingError saying what to install where nothing here can run it.
    """
    found, reasons = candidates(bundle, graph, name)
    if not found:
        raise MissingError(f"nothing here can run {graph!r} of {bundle.folder}. {' '.join(reasons)}")
    backend_name, artifact = found[0]
    return open_artifact(bundle, graph, artifact, backend_name, **options)


def candidates(bundle: Bundle, graph: str, name: str | None = None) -> tuple[list[tuple[str, Artifact]], list[str]]:
    """Every (backend, artifact) that can run `graph` here, in the order of `BACKENDS`, and why the others cannot.

    Raises: BundleError if the bundle has no such graph.
    """
    if graph not in bundle.manifest.graphs:
        raise BundleError(f"{bundle.folder} has no graph {graph!r}; it has {', '.join(bundle.manifest.graphs)}")
    artifacts = bundle.manifest.graphs[graph].artifacts
    found: list[tuple[str, Artifact]] = []
    reasons: list[str] = []
    for candidate in [name] if name else BACKENDS:
        opens = backend(candidate).OPENS
        for artifact in artifacts:
            if artifact.target in opens:
                room, why = obstacles(artifact, candidate)
                if room:
                    found.append((candidate, artifact))
                reasons += why
        if not any(artifact.target in opens for artifact in artifacts):
            reasons.append(f"{candidate}: the bundle has no artifact for it")
    return found, list(dict.fromkeys(reasons))
