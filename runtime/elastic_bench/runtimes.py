"""What can be measured: a backend with its options on one artifact of a bundle. Whoever owns another way to run a model
adds its own.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from elastic_runtime.contract.artifacts import Artifact
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.errors import ElasticError, MissingError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.opening import backends, obstacles, open_artifact, open_session
from elastic_runtime.sessions.session import Origin, Session

GRAPH = "denoiser"


class Opened(NamedTuple):
    """A runtime's open sessions, and the bound that its outputs are held to (as in `reference.compare`)."""

    denoiser: Session
    decoder: Session | None
    tolerance: float


class Runtime(Protocol):
    """One way to run a bundle. It is pickled: a process of its own opens it."""

    @property
    def name(self) -> str: ...

    @property
    def artifact(self) -> str | None: ...

    @property
    def precision(self) -> str: ...

    def obstacle(self, bundle: Bundle) -> str | None:
        """Why it cannot run this bundle here, or None."""

    def open(self, bundle: Bundle, threads: int) -> Opened:
        """Open it; raise ElasticError where that fails."""


def ways() -> dict[str, tuple[Backend, Way]]:
    """Every way in which a backend can run, by the name that reports know it by.

    Backends that run everywhere come first: the others are compared with the first that was right.
    """
    ordered = sorted(backends(), key=lambda backend: all(way.processor != "cpu" for way in backend.ways.values()))
    return {name: (backend, way) for backend in ordered for name, way in backend.ways.items()}


@dataclass(frozen=True)
class SessionRuntime:
    """The backend's way called `way` on the artifact at path `artifact` of a bundle, or on none where the bundle has
    none for it.
    """

    name: str
    way: str
    artifact: str | None
    precision: str

    def obstacle(self, bundle: Bundle) -> str | None:
        backend, way = ways()[self.way]
        if self.artifact is None:
            opens = " or ".join(backend.opens)
            held = f" in {EXACT}, of which {way.precision} is computed" if way.precision else ""
            return f"the bundle has no {opens} artifact{held}: elastic-export {opens} makes one"
        able, reasons = obstacles(_artifact(bundle, self.artifact), backend.name)
        return None if able else " ".join(reasons)

    def open(self, bundle: Bundle, threads: int) -> Opened:
        assert self.artifact is not None
        (backend, way), artifact = ways()[self.way], _artifact(bundle, self.artifact)
        options = dict(way.options) | ({"threads": threads} if backend.threads else {})
        denoiser = open_artifact(bundle, GRAPH, artifact, backend.name, **options)
        decoder = None
        if "decoder" in bundle.manifest.graphs:
            try:
                decoder = open_session(bundle, "decoder", backend.name, **options)
            except MissingError:  # its pictures are then not timed
                decoder = None
        return Opened(denoiser, decoder, max(bundle.manifest.graphs[GRAPH].tolerance(artifact), way.tolerance))


def runtimes(name: str, bundle: Bundle) -> list[SessionRuntime]:
    """Runtime `name` on each artifact of the bundle that it opens; with none, one that says so."""
    backend, way = ways()[name]
    artifacts = [
        artifact for artifact in bundle.manifest.graphs[GRAPH].artifacts if artifact.target in backend.opens and way.takes(artifact)
    ]
    if not artifacts:
        return [SessionRuntime(name, name, None, way.precision or EXACT)]
    several = len(artifacts) > 1
    return [
        SessionRuntime(
            f"{name} {PurePosixPath(artifact.path).name}" if several else name,
            name,
            artifact.path,
            Origin(artifact, backend.name, way.options).precision,
        )
        for artifact in artifacts
    ]


def _artifact(bundle: Bundle, path: str) -> Artifact:
    return next(artifact for artifact in bundle.manifest.graphs[GRAPH].artifacts if artifact.path == path)


def sentence(error: BaseException) -> str:
    """An error as one line for a report."""
    text = str(error) if isinstance(error, ElasticError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:600]
