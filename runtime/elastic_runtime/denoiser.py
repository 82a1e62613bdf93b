"""From a session to a guided prediction: the feeds of a budget, batches, and the branches of guidance."""

from dataclasses import dataclass

import numpy as np

from elastic_runtime.budget import Budget
from elastic_runtime.errors import UsageError
from elastic_runtime.manifest import Manifest
from elastic_runtime.policy import Choice
from elastic_runtime.reference import axis_feeds
from elastic_runtime.session import Session, batches


@dataclass(frozen=True)
class Guidance:
    """`v_weak + scale * (v_cond - v_weak)` for times in [low, high]; elsewhere the conditional prediction alone.

    The weak branch has no label (classifier-free guidance) or, with `auto`, the same label (autoguidance: the weak branch
    differs by its smaller budget only). With a smaller budget and no label it is CCFG (arXiv 2603.12245, section 3.4).
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    auto: bool = False

    def __post_init__(self) -> None:
        if not self.scale >= 1.0 or self.scale == float("inf"):
            raise UsageError(f"guidance_scale must be 1 (off) or more, got {self.scale}")
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise UsageError(f"the guidance interval must lie in 0 to 1 and rise, got {self.low} to {self.high}")

    def active(self, time: float) -> bool:
        return self.scale > 1.0 and self.low <= time <= self.high


class Denoiser:
    """A session with the manifest's meaning of its inputs."""

    def __init__(self, session: Session, manifest: Manifest):
        self._session = session
        self._manifest = manifest
        self._output = "logits" if manifest.model.tokens else "prediction"

    def guided(self, x: np.ndarray, time: float, labels: np.ndarray, guidance: Guidance, choice: Choice) -> np.ndarray:
        """Prediction for `x` (B, C, H, W) at `time`, guided. One run serves both branches where their budgets agree."""
        if not guidance.active(time):
            return self.predict(x, time, labels, choice.budget)
        weak_labels = labels if guidance.auto else np.full_like(labels, self._manifest.model.null_label)
        if choice.guidance_budget == choice.budget:
            if guidance.auto:
                return self.predict(x, time, labels, choice.budget)  # both branches are the same prediction
            both = self.predict(np.concatenate([x, x]), time, np.concatenate([labels, weak_labels]), choice.budget)
            strong, weak = np.split(both, 2)
        else:
            strong = self.predict(x, time, labels, choice.budget)
            weak = self.predict(x, time, weak_labels, choice.guidance_budget)
        return weak + guidance.scale * (strong - weak)

    def predict(self, x: np.ndarray, time: float, labels: np.ndarray, budget: Budget) -> np.ndarray:
        """Prediction for `x` (B, C, H, W), or logits (B, T, V) for tokens, at one time and budget.

        It takes as few runs as the session's batch span allows.
        """
        parts = []
        for rows in batches(self._session, len(x)):
            feeds = self._feeds(x[rows], time) | {"class_labels": labels[rows]} | axis_feeds(self._manifest.axes, budget)
            parts.append(self._session.run(feeds)[self._output])
        return np.concatenate(parts).astype(np.float64)

    def _feeds(self, x: np.ndarray, time: float) -> dict[str, np.ndarray]:
        if self._manifest.model.tokens:
            return {"tokens": x.reshape(len(x), -1)}
        return {"sample": x.astype(np.float32), "timestep": np.full(len(x), time, dtype=np.float32)}
