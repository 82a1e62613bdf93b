"""From a session to a guided prediction over tokens with positions: FLUX and SD3 in diffusers' words."""

import math
from dataclasses import dataclass

import numpy as np

from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.errors import UsageError
from elastic_runtime.sessions.session import Session, batches


@dataclass(frozen=True)
class Conditions:
    """What pictures are drawn after: `encoder_hidden_states` (B, T, D) and `pooled_projections` (B, P), float32."""

    hidden: np.ndarray
    pooled: np.ndarray

    def rows(self, index: slice) -> "Conditions":
        return Conditions(self.hidden[index], self.pooled[index])

    def repeated(self, times: int) -> "Conditions":
        """Each of them `times` in a row."""
        return Conditions(*(np.repeat(array, times, axis=0) for array in (self.hidden, self.pooled)))


class TokenDenoiser:
    """A session over tokens (B, S, C).

    `embedded` is the scale that goes in as `guidance` where the model was distilled with one.
    """

    def __init__(self, session: Session, patches: Patches, embedded: float | None = None):
        self._session = session
        self._patches = patches
        self._embedded = embedded

    def guided(
        self,
        x: np.ndarray,
        positions: np.ndarray,
        size: tuple[int, int],
        sigma: float,
        strong: Conditions,
        weak: Conditions | None,
        guidance: Guidance,
    ) -> np.ndarray:
        """Prediction for tokens (B, S, C) at `positions` (B, S, 2) of a picture of `size` (rows, columns), float64.

        Pictures whose tokens lie alike share runs; where each has its own, as in the mixed stage, each runs by itself,
        both of its branches together.
        """
        alike = bool((positions == positions[:1]).all())
        parts = [slice(0, len(x))] if alike else [slice(i, i + 1) for i in range(len(x))]
        branches = [strong, weak] if weak and guidance.active(sigma) else [strong]
        predicted = []
        for part in parts:
            ids = place(positions[part.start], size, self._patches)
            conditions = [branch.rows(part) for branch in branches]
            hidden, pooled = (np.concatenate([getattr(one, name) for one in conditions]) for name in ("hidden", "pooled"))
            halves = np.split(self._predict(np.concatenate([x[part]] * len(branches)), ids, sigma, hidden, pooled), len(branches))
            predicted.append(halves[-1] + guidance.scale * (halves[0] - halves[-1]) if len(halves) > 1 else halves[0])
        return np.concatenate(predicted)

    def evaluate(self, budget: Budget, batch: int, time: float, source: np.random.Generator) -> None:
        """Run once on `batch` samples of noise with as many tokens as `budget` says and the longest text, as an
        unguided step does."""
        specs = {spec.name: spec.shape for spec in self._session.graph.inputs}
        spans = self._session.graph.dimensions
        text, wide = specs["encoder_hidden_states"][1:]
        length = spans[text].max if isinstance(text, str) else text
        tokens, values = budget["tokens"], int(specs["hidden_states"][-1])
        conditions = Conditions(
            np.zeros((batch, length, int(wide)), np.float32), np.zeros((batch, int(specs["pooled_projections"][-1])), np.float32)
        )
        side = math.isqrt(tokens)
        x, positions = source.standard_normal((batch, tokens, values)), np.zeros((batch, tokens, 2))
        self.guided(x, positions, (side, side), time, conditions, None, Guidance())

    def _predict(self, x: np.ndarray, ids: np.ndarray, sigma: float, hidden: np.ndarray, pooled: np.ndarray) -> np.ndarray:
        """It takes as few runs as the session's batch span allows."""
        shared: dict[str, np.ndarray] = {self._patches.positions: ids}
        if self._patches.positions == "img_ids":
            shared["txt_ids"] = np.zeros((hidden.shape[1], 3), dtype=np.float32)
        parts = []
        for rows in batches(self._session, len(x)):
            count = len(x[rows])
            feeds = shared | {
                "hidden_states": x[rows].astype(np.float32),
                "encoder_hidden_states": hidden[rows],
                "pooled_projections": pooled[rows],
                "timestep": np.full(count, sigma, dtype=np.float32),
            }
            if self._patches.guidance_embeds:
                feeds["guidance"] = np.full(count, self._embedded, dtype=np.float32)
            parts.append(self._session.run(feeds)["prediction"])
        return np.concatenate(parts).astype(np.float64)


def place(positions: np.ndarray, size: tuple[int, int], patches: Patches) -> np.ndarray:
    """The graph's input that places tokens at `positions` (S, 2) of a picture of `size` (rows, columns), float32.

    `img_ids` are (0, row, column). `pos_ids` add where the picture lies in the middle of the table: in every stage a
    picture of the stage's own size, so that the first stage is what the model knows as a small picture, as it is for
    FLUX.

    Raises: UsageError for a picture larger than the table.
    """
    if patches.table is None:
        return np.pad(positions, ((0, 0), (1, 0))).astype(np.float32)
    if max(size) > patches.table:
        raise UsageError(f"this model has {patches.table} x {patches.table} places for patches, the picture has {size[0]} x {size[1]}")
    return (positions + [(patches.table - side) // 2 for side in size]).astype(np.float32)
