"""Which denoiser goes with a model, for measuring one run of it."""

from typing import Protocol

import numpy as np

from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.denoising.tokens import TokenDenoiser
from elastic_runtime.sessions.session import Session


class Evaluator(Protocol):
    """What measuring asks of a denoiser."""

    def evaluate(self, budget: Budget, batch: int, time: float, source: np.random.Generator) -> None:
        """Run once on `batch` samples of noise, as an unguided step does."""


def evaluator(session: Session, manifest: Manifest) -> Evaluator:
    """The denoiser of the manifest's model over an open session."""
    patches = manifest.model.patches
    return Denoiser(session, manifest) if patches is None else TokenDenoiser(session, patches, 1.0)
