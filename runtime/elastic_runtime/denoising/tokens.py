"""From a session to a guided prediction over tokens with positions: FLUX, SD3 and Qwen-Image in diffusers' words."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.errors import UsageError
from elastic_runtime.sessions.session import Session, batches

NAMES = ("encoder_hidden_states", "pooled_projections", "class_labels")  # of inputs that say what to draw


@dataclass(frozen=True)
class Conditions:
    """What pictures are drawn after: `encoder_hidden_states` (B, T, D) and, where the model takes them,
    `pooled_projections` (B, P), float32; or `class_labels` (B,), int64."""

    hidden: np.ndarray | None = None
    pooled: np.ndarray | None = None
    labels: np.ndarray | None = None

    @classmethod
    def blank(cls, graph: Graph, batch: int) -> "Conditions":
        """Zeros of what a denoiser takes, the text as long as can be."""
        sizes = {name: span.max for name, span in graph.dimensions.items()} | {"B": batch}
        shapes = {spec.name: [sizes[size] if isinstance(size, str) else size for size in spec.shape] for spec in graph.inputs}
        hidden, pooled = (np.zeros(shapes[name], np.float32) if name in shapes else None for name in NAMES[:2])
        return cls(hidden, pooled, np.zeros(batch, np.int64) if hidden is None else None)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """The denoiser's inputs."""
        return {name: array for name, array in zip(NAMES, self._arrays, strict=True) if array is not None}

    @property
    def length(self) -> int:
        """T, text tokens; 0 without a text."""
        return 0 if self.hidden is None else self.hidden.shape[1]

    def __len__(self) -> int:
        return len(next(array for array in self._arrays if array is not None))

    def rows(self, index: slice | np.ndarray) -> "Conditions":
        return self._each(lambda array: array[index])

    def repeated(self, times: int) -> "Conditions":
        """Each of them `times` in a row."""
        return self._each(lambda array: np.repeat(array, times, axis=0))

    def beside(self, other: "Conditions") -> bool:
        """Whether `other` may share a run: texts of another length may not."""
        return self.length == other.length

    def joined(self, *others: "Conditions") -> "Conditions":
        """These, then those of `others`, as rows of one run."""
        columns = zip(self._arrays, *(other._arrays for other in others), strict=True)
        return Conditions(*(None if column[0] is None else np.concatenate(column) for column in columns))

    @property
    def _arrays(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        return self.hidden, self.pooled, self.labels

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> "Conditions":
        return Conditions(*(None if array is None else change(array) for array in self._arrays))


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
        both of its branches together. Branches whose texts differ in length run apart.
        """
        alike = bool((positions == positions[:1]).all())
        parts = [slice(0, len(x))] if alike else [slice(i, i + 1) for i in range(len(x))]
        predicted = []
        for part in parts:
            where, own = (positions[part.start], size, sigma), strong.rows(part)
            if weak is None or not guidance.active(sigma):
                predicted.append(self._predict(x[part], *where, own))
                continue
            other = weak.rows(part)
            if own.beside(other):
                halves = np.split(self._predict(np.concatenate([x[part]] * 2), *where, own.joined(other)), 2)
            else:
                halves = [self._predict(x[part], *where, each) for each in (own, other)]
            predicted.append(guidance.lead(*halves))
        return np.concatenate(predicted)

    def evaluate(self, budget: Budget, batch: int, time: float, source: np.random.Generator) -> None:
        """Run once on `batch` samples of noise with as many tokens as `budget` says and the longest text, as an
        unguided step does."""
        graph = self._session.graph
        tokens = budget["tokens"]
        values = next(int(spec.shape[-1]) for spec in graph.inputs if spec.name == "hidden_states")
        conditions = Conditions.blank(graph, batch)
        side = math.isqrt(tokens)
        x, positions = source.standard_normal((batch, tokens, values)), np.zeros((batch, tokens, 2))
        self.guided(x, positions, (side, side), time, conditions, None, Guidance())

    def _predict(self, x: np.ndarray, positions: np.ndarray, size: tuple[int, int], sigma: float, conditions: Conditions) -> np.ndarray:
        """It takes as few runs as the session's batch span allows."""
        shared: dict[str, np.ndarray] = {self._patches.positions: place(positions, size, conditions.length, self._patches)}
        if self._patches.positions == "img_ids":
            shared["txt_ids"] = text_places(conditions.length, size, self._patches)
        parts = []
        for rows in batches(self._session, len(x)):
            count = len(x[rows])
            feeds = shared | conditions.rows(rows).feeds
            feeds |= {"hidden_states": x[rows].astype(np.float32), "timestep": np.full(count, sigma, dtype=np.float32)}
            if self._patches.guidance_embeds:
                feeds["guidance"] = np.full(count, self._embedded, dtype=np.float32)
            parts.append(self._session.run(feeds)["prediction"])
        return np.concatenate(parts).astype(np.float64)


def place(positions: np.ndarray, size: tuple[int, int], length: int, patches: Patches) -> np.ndarray:
    """The graph's input that places tokens at `positions` (S, 2) of a picture of `size` (rows, columns) beside a text of
    `length` tokens, float32: (S, columns).

    `img_ids` are laid out as `Patches` says. `pos_ids` add where the picture lies in the middle of the table. In every
    stage that is a picture of the stage's own size, so that the first stage is what the model knows as a small picture,
    as it is for FLUX.

    Raises: UsageError for a picture larger than the table.
    """
    if patches.table is None:
        ids = np.zeros((len(positions), patches.columns), np.float32)
        ids[:, 0] = length + 1 if patches.layout == "after_text" else 0
        ids[:, 1:3] = positions - [-(-side // 2) if patches.layout == "centred" else 0 for side in size]
        return ids
    if max(size) > patches.table:
        raise UsageError(f"this model has {patches.table} x {patches.table} places for patches, the picture has {size[0]} x {size[1]}")
    return (positions + [(patches.table - side) // 2 for side in size]).astype(np.float32)


def text_places(length: int, size: tuple[int, int], patches: Patches) -> np.ndarray:
    """`txt_ids` (T, columns) of `length` tokens beside a picture of `size` (rows, columns), float32, laid out as `Patches`
    says."""
    ids, along = np.zeros((length, patches.columns), np.float32), np.arange(length)
    if patches.layout == "centred":
        ids += max(size) // 2 + along[:, None]
    elif patches.layout == "sequence":
        ids[:, 3] = along
    elif patches.layout == "after_text":
        ids[:, 0] = 1 + along
    return ids
