"""What can be measured: a backend with its options on one artifact of a bundle. Whoever owns another way to run a model adds its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Artifact
from elastic_runtime.contract.reference import TOLERANCE, tolerance
from elastic_runtime.errors import ElasticError, MissingError
from elastic_runtime.sessions.session import Session, backend, obstacles, open_artifact, open_session

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


@dataclass(frozen=True)
class Way:
    """A backend with fixed options. `precision`: what it computes in where not in the artifact's; `threads`: it takes their number."""

    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    threads: bool = False


WAYS: dict[str, Way] = {
    "onnxruntime": Way("ort", {"providers": ["CPUExecutionProvider"]}, threads=True),
    "onnxruntime-cuda": Way("ort", {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}, threads=True),
    "openvino": Way("openvino", threads=True),
    "openvino-bf16": Way("openvino", {"precision": "bf16"}, precision="bf16", threads=True),
    "trt": Way("trt"),
    "coreml": Way("coreml"),
}
CPU = frozenset({"onnxruntime", "openvino", "openvino-bf16", "torch", "torch-compile"})  # those that the measured peaks bound


@dataclass(frozen=True)
class SessionRuntime:
    """A `Way` on the artifact at path `artifact` of a bundle, or on none where the bundle has none for it."""

    name: str
    way: str
    artifact: str | None
    precision: str

    def obstacle(self, bundle: Bundle) -> str | None:
        if self.artifact is None:
            opens = " or ".join(backend(WAYS[self.way].backend).OPENS)
            return f"the bundle has no {opens} artifact: elastic-export {opens} makes one"
        room, reasons = obstacles(_artifact(bundle, self.artifact), WAYS[self.way].backend)
        return None if room else " ".join(reasons)

    def open(self, bundle: Bundle, threads: int) -> Opened:
        assert self.artifact is not None
        way, artifact = WAYS[self.way], _artifact(bundle, self.artifact)
        options = dict(way.options) | ({"threads": threads} if way.threads else {})
        denoiser = open_artifact(bundle, GRAPH, artifact, way.backend, **options)
        decoder = None
        if "decoder" in bundle.manifest.graphs:
            try:
                decoder = open_session(bundle, "decoder", way.backend, **options)
            except MissingError:  # its pictures are then not timed
                decoder = None
        return Opened(denoiser, decoder, max(tolerance(artifact), TOLERANCE[way.precision] if way.precision else 0.0))


def runtimes(name: str, bundle: Bundle) -> list[SessionRuntime]:
    """Runtime `name` on each artifact of the bundle that it opens; with none, one that says so."""
    way = WAYS[name]
    found = [artifact for artifact in bundle.manifest.graphs[GRAPH].artifacts if artifact.target in backend(way.backend).OPENS]
    if not found:
        return [SessionRuntime(name, name, None, way.precision or "fp32")]
    several = len(found) > 1
    return [
        SessionRuntime(
            f"{name} {PurePosixPath(artifact.path).name}" if several else name, name, artifact.path, way.precision or artifact.precision
        )
        for artifact in found
    ]


def _artifact(bundle: Bundle, path: str) -> Artifact:
    return next(artifact for artifact in bundle.manifest.graphs[GRAPH].artifacts if artifact.path == path)


def sentence(error: BaseException) -> str:
    """An error as one line for a report."""
    text = str(error) if isinstance(error, ElasticError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:600]
