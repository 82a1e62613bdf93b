"""Opening artifacts: which backends there are, which of them can run an artifact here, and a session of the first that
can.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping

from elastic_runtime.contract.artifacts import Artifact
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.device.packages import BACKENDS
from elastic_runtime.errors import BundleError, MissingError, UsageError
from elastic_runtime.sessions import apart
from elastic_runtime.sessions.backend import Backend
from elastic_runtime.sessions.session import Origin, Session


def backends() -> Iterator[Backend]:
    """Every backend, in the order of preference."""
    for name in BACKENDS:
        record: Backend = importlib.import_module(f"elastic_runtime.sessions.{name}").BACKEND
        yield record


def backend(name: str) -> Backend:
    """The backend of that name or alias; raises UsageError listing those that exist."""
    for record in backends():
        if name in (record.name, *record.aliases):
            return record
    names = (" or ".join((record.name, *record.aliases)) for record in backends())
    raise UsageError(f"there is no backend {name!r}; there are {', '.join(names)}")


def limits(versions: Mapping[str, str]) -> Iterator[str]:
    """What the installed `versions` of the backends' libraries (by name, as in `Device.backends`) cannot open, in
    sentences.
    """
    for record in backends():
        for package in record.packages:
            if package.name in versions and (limit := record.limit(versions[package.name])):
                yield f"{package.name} {versions[package.name]} {limit}"


def obstacles(artifact: Artifact, name: str | None = None) -> tuple[Backend | None, list[str]]:
    """The first backend here that can run `artifact` (or `name` alone), and why the ones before it cannot.

    Raises: UsageError for a name that no backend has.
    """
    reasons: list[str] = []
    for record in _chosen(name):
        if artifact.target not in record.opens:
            continue
        reason = record.obstacle(artifact)
        if reason is None:
            return record, reasons
        reasons.append(f"{record.name}: {reason}")
    return None, reasons or [f"no backend{f' {name}' if name else ''} opens {artifact.target} artifacts"]


def open_artifact(bundle: Bundle, graph: str, artifact: Artifact, name: str | None = None, **options: object) -> Session:
    """Open one artifact of a graph with backend `name`, or the first one that can.

    Raises: MissingError saying why nothing here can run it; BundleError if it is damaged; UsageError for a name that no
    backend has, and an option that this one has not.
    """
    record, reasons = obstacles(artifact, name)
    if record is None:
        raise MissingError(f"nothing here can run {artifact.path}. {' '.join(reasons)}")
    _known(record, options)
    described = bundle.manifest.graphs[graph]
    if artifact.conditions:
        session: Session = apart.opened(bundle, described, artifact, record.open, options)
    else:
        session = record.open(bundle, described, artifact, **options)
    session.origin = Origin(artifact, record.name, options)
    return session


def open_session(bundle: Bundle, graph: str = "denoiser", name: str | None = None, **options: object) -> Session:
    """Open a graph of a bundle: the most exact of its artifacts that backend `name`, or the first backend here that can run any, runs.

    Backends are tried in the order of preference; of artifacts that are as exact as each other the first in the manifest is taken.

    Raises: BundleError if the bundle has no such graph; MissingError saying what to install where nothing here can run
    it; UsageError for a name that no backend has.
    """
    choices, reasons = candidates(bundle, graph, name)
    if not choices:
        raise MissingError(f"nothing here can run {graph!r} of {bundle.folder}. {' '.join(reasons)}")
    best = min((each for each in choices if each.backend == choices[0].backend), key=lambda each: each.rank)
    return open_artifact(bundle, graph, best.artifact, best.backend, **options)


def open_origin(bundle: Bundle, graph: str, origin: Origin) -> Session:
    """Open one of the `candidates` of a graph; raises as `open_artifact`."""
    return open_artifact(bundle, graph, origin.artifact, origin.backend, **origin.options)


def candidates(bundle: Bundle, graph: str, name: str | None = None) -> tuple[list[Origin], list[str]]:
    """Everything from which a session of `graph` can be opened here, in the order of preference, and why not from others.

    A denoiser in float32 may be computed in less where a backend has a way for it (bfloat16 in OpenVINO), and so may what is beside weights
    of few bits; whether this processor has it, too, only opening it tells.

    Raises: BundleError if the bundle has no such graph; UsageError for a name that no backend has.
    """
    if graph not in bundle.manifest.graphs:
        raise BundleError(f"{bundle.folder} has no graph {graph!r}; it has {', '.join(bundle.manifest.graphs)}")
    artifacts = bundle.manifest.graphs[graph].artifacts
    choices: list[Origin] = []
    reasons: list[str] = []
    for record in _chosen(name):
        fitting = [artifact for artifact in artifacts if artifact.target in record.opens]
        for artifact in fitting:
            reason = record.obstacle(artifact)
            if reason is None:
                choices.append(Origin(artifact, record.name, {}))
                if graph == "denoiser":
                    narrower = [way for way in record.ways.values() if way.precision and way.takes(artifact)]
                    choices += [Origin(artifact, record.name, way.options) for way in narrower]
            else:
                reasons.append(f"{record.name}: {reason}")
        if not fitting:
            reasons.append(f"{record.name}: the bundle has no artifact for it")
    return choices, list(dict.fromkeys(reasons))


def _chosen(name: str | None) -> Iterable[Backend]:
    return [backend(name)] if name else backends()


def _known(record: Backend, options: Mapping[str, object]) -> None:
    """Raise UsageError unless the backend's sessions take these options."""
    parameters = inspect.signature(record.open).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY or each.default is not each.empty]
    if (unknown := sorted(set(options) - set(known))) and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        raise UsageError(f"sessions of {record.name} have no option {', '.join(unknown)}; they have {', '.join(known) or 'none'}")
