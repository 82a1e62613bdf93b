"""A backend is a record: what opens artifacts, what hinders it here, and the ways in which it can run.

Each backend's file ends in one, `BACKEND`, and imports its library only where it opens something. A new one is a file
here, a row in `elastic_runtime.device.packages`, and an extra.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_runtime.contract.artifacts import Artifact
from elastic_runtime.contract.precision import EXACT, PRECISIONS, rank
from elastic_runtime.device import PACKAGES, Package, Processor
from elastic_runtime.sessions.session import Session


@dataclass(frozen=True)
class Way:
    """One way to run a backend: on which kind of processor, with which options of its session.

    `precision` is what it computes in where that is not the artifact's own (a row of `contract.precision`).
    """

    processor: Processor
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None

    @property
    def tolerance(self) -> float:
        """The bound of what it computes in, in units of max(1, |reference|); 0 where that is the artifact's own."""
        return PRECISIONS[self.precision].tolerance if self.precision else 0.0

    def takes(self, artifact: Artifact) -> bool:
        """Whether there is float32 in the artifact for it to compute in less: all of it, or what is beside weights of few bits."""
        row = PRECISIONS[artifact.precision]
        return self.precision is None or artifact.rank == rank(EXACT) or (row.pictured and row.base == EXACT)


@dataclass(frozen=True)
class Backend:
    """What opens the artifacts of some targets.

    `name` is what a user writes, or one of `aliases`; `opens` are the targets. `obstacle(artifact)` says in a sentence
    why it cannot run an artifact here (a package, a version, a device that is not there), or is None. `open(bundle,
    graph, artifact, **options)` is the session, and raises MissingError, BundleError, InferenceError or UsageError.
    `ways` are what a benchmark can choose from, by name. `threads`: its sessions take an option `threads`, how many
    they may start. `limit(version)` says what that version of its library cannot open, and what to do, or is None.
    """

    name: str
    opens: tuple[str, ...]
    obstacle: Callable[[Artifact], str | None]
    open: Callable[..., Session]
    ways: Mapping[str, Way]
    aliases: tuple[str, ...] = ()
    threads: bool = False
    limit: Callable[[str], str | None] = lambda version: None

    @property
    def packages(self) -> tuple[Package, ...]:
        """The libraries that it opens artifacts with, each with the extra that installs it."""
        return tuple(package for package in PACKAGES.values() if package.backend == self.name)
