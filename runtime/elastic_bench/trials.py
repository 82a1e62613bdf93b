"""Every way that this machine has to run a bundle, proven and timed once: what a device check sends back."""

import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Verification
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.device import Clock
from elastic_runtime.errors import ElasticError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.checking import Feeds, check, recordings
from elastic_runtime.sessions.opening import backends, open_artifact
from elastic_runtime.sessions.session import Origin, Session

RUNS = 7  # timed ones, after two that a backend may prepare or capture in
WARM = 2


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One budget of one artifact in one way, or the `reason` why it did not run. `max_abs` may be `bound`.

    `milliseconds` are the median of a run of as few samples as the artifact takes, mostly one.
    """

    graph: str
    artifact: str
    precision: str
    way: str
    where: str = ""
    budget: str = ""
    max_abs: float | None = None
    tolerance: float | None = None
    bound: float | None = None
    passed: bool | None = None
    milliseconds: float | None = None
    reason: str = ""


def trials(bundle: Bundle, clock: Clock = time.perf_counter) -> Iterator[Trial]:
    """A row for each budget that the original recorded, of each artifact, in each way of each backend that opens its kind.

    Paths are the bundle's own; a reason says what the library said, with BUNDLE for the bundle's folder, and HOME and PYTHON for the user's
    and the interpreter's.
    """
    # Of a folder that was given as `.` or `digits`, no reason would tell the path from a full stop or a word.
    bundle = Bundle(bundle.folder.resolve(), bundle.manifest, bundle.stage, bundle.text, bundle.name)
    for name, graph in bundle.manifest.graphs.items():
        for artifact in graph.artifacts:
            for record in (record for record in backends() if artifact.target in record.opens):
                for way, how in record.ways.items():
                    if how.takes(artifact):
                        yield from _tried(bundle, name, artifact, record, way, how, clock)


def _tried(bundle: Bundle, graph: str, artifact: Artifact, record: Backend, way: str, how: Way, clock: Clock) -> Iterator[Trial]:
    precision = Origin(artifact, record.name, how.options).precision
    about: dict[str, Any] = {"graph": graph, "artifact": artifact.path, "precision": precision, "way": way}
    if reason := record.obstacle(artifact):
        yield Trial(**about, reason=_nameless(bundle, reason))
        return
    limit = max(bundle.manifest.graphs[graph].tolerance(artifact), how.tolerance)
    try:
        with open_artifact(bundle, graph, artifact, record.name, **how.options) as session:
            arrays = bundle.reference()
            rows = list(check(bundle, graph, session, limit, arrays))
            times = dict(_times(bundle, arrays, graph, session, clock))
            yield from (_trial(about, row, times[key(row.budget)]) for row in rows)
    except ElasticError as error:
        yield Trial(**about, reason=_nameless(bundle, str(error)))


def _nameless(bundle: Bundle, reason: str) -> str:
    """A reason without the paths of whoever ran it."""
    home = Path(os.path.expanduser("~"))  # which stays that of somebody who has none
    for place, name in ((bundle.folder, "BUNDLE"), (Path(sys.prefix), "PYTHON"), (home, "HOME")):
        if len(place.parts) > 2:  # no root, nor /usr, which is everybody's
            reason = re.sub(rf"{re.escape(str(place))}(?![\w-])", name, reason)
    return reason


def _trial(about: dict[str, Any], row: Verification, seconds: float) -> Trial:
    facts: dict[str, Any] = {
        "where": row.where,
        "budget": key(row.budget),
        "max_abs": row.max_abs,
        "tolerance": row.tolerance,
        "bound": row.bound,
        "passed": row.passed,
    }
    return Trial(**about, **facts, milliseconds=1e3 * seconds)


def _times(bundle: Bundle, arrays: Feeds, graph: str, session: Session, clock: Clock) -> Iterator[tuple[str, float]]:
    batched = session.graph.batched
    for budget, inputs, _ in recordings(bundle, graph, session, arrays):
        rows = session.batch.min
        feeds = inputs | {name: np.ascontiguousarray(np.resize(inputs[name], (rows, *inputs[name].shape[1:]))) for name in batched}
        seconds = []
        for _ in range(WARM + RUNS):
            begun = clock()
            session.run(feeds)
            seconds.append(clock() - begun)
        yield key(budget), statistics.median(seconds[WARM:])
