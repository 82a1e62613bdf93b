"""One runtime while it is measured."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_bench.records import SingleStream
from elastic_bench.runtimes import Runtime, sentence
from elastic_bench.subject import Drawing, Loaded, Turn
from elastic_runtime.contract.artifacts import Verification
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import ElasticError


@dataclass
class Entry:
    """One runtime while it is measured. `subject` is None where it could not run or has failed."""

    runtime: Runtime
    subject: Any = None
    missing: str | None = None
    failure: str | None = None
    loaded: Loaded | None = None
    first: dict[Budget, tuple[float, dict[str, np.ndarray]]] = field(default_factory=dict)
    checked: tuple[Verification, ...] = ()
    agrees: dict[Budget, Verification] = field(default_factory=dict)
    turns: dict[Budget, list[Turn]] = field(default_factory=dict)
    drawn: dict[Drawing, list[float]] = field(default_factory=dict)
    streams: dict[Budget, SingleStream] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    peak: int | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the subject; None if that fails, which ends its part."""
        try:
            return getattr(self.subject, method)(*arguments)
        except ElasticError as error:
            self.fail(sentence(error))
            return None

    def fail(self, why: str) -> None:
        self.failure = why
        self.close()

    def close(self) -> None:
        if self.subject is not None:
            self.subject.close()
            self.subject = None
