"""The evaluator as a session, so that a Core ML artifact is verified where there is no Mac."""

import platform

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, CoremlArtifact, Graph
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import InferenceError
from elastic_runtime.sessions import apart
from elastic_runtime.sessions.coreml import PackageSession
from elastic_runtime.sessions.session import Arrays, Session
from elastic_targets.coreml.evaluate import Evaluator


class EvaluatorSession(PackageSession):
    """A Core ML package computed from its saved programs, in torch, on any machine."""

    def __init__(self, bundle: Bundle, graph: Graph, artifact: Artifact):
        assert isinstance(artifact, CoremlArtifact)
        super().__init__(graph, artifact)
        self._evaluator: Evaluator | None = Evaluator(bundle.file(artifact.package))
        self.where = f"MIL evaluator, {platform.system()} {platform.machine()}"

    def _call(self, function: str, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._evaluator is None:
            raise InferenceError("this session is closed")
        return self._evaluator.run(function, feeds)

    def close(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
        self._evaluator = None


def evaluator(bundle: Bundle, graph: Graph, artifact: CoremlArtifact) -> Session:
    """A session that computes an artifact without a Mac."""
    if artifact.conditions:
        return apart.opened(bundle, graph, artifact, EvaluatorSession, {})
    return EvaluatorSession(bundle, graph, artifact)
