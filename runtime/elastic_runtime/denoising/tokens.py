"""From a session to a guided prediction over tokens with positions: FLUX, SD3 and Qwen-Image in diffusers' words."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    `pooled_projections` (B, P), float32; or `class_labels` (B,), int64. `lengths` (B,) are the rows of each text that are
    its own, from the first on; None where all are."""

    hidden: np.ndarray | None = None
    pooled: np.ndarray | None = None
    labels: np.ndarray | None = None
    lengths: np.ndarray | None = None

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
        return {name: array for name, array in zip(NAMES, self._arrays, strict=False) if array is not None}

    @property
    def length(self) -> int:
        """T, text tokens of the longest; 0 without a text."""
        return 0 if self.hidden is None else self.hidden.shape[1]

    @property
    def counts(self) -> np.ndarray:
        """Text tokens of each (B,), int64."""
        return np.full(len(self), self.length) if self.lengths is None else self.lengths

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
        """These, then those of `others`, one after the other."""
        every = (self, *others)
        if any(each.lengths is not None or each.length != self.length for each in every):
            longest = max(each.length for each in every)
            every = tuple(replace(each.fitted(longest), lengths=each.counts) for each in every)
        columns = zip(*(each._arrays for each in every), strict=True)
        return Conditions(*(None if column[0] is None else np.concatenate(column) for column in columns))

    def fitted(self, length: int) -> "Conditions":
        """The same with texts of `length` tokens: the rest cut, or zeros after them."""
        if self.hidden is None or self.length == length:
            return replace(self, lengths=None)
        hidden = self.hidden[:, :length]
        return replace(self, hidden=np.pad(hidden, ((0, 0), (0, length - hidden.shape[1]), (0, 0))), lengths=None)

    @property
    def _arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.hidden, self.pooled, self.labels, self.lengths

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
        both of its branches together. Texts that differ in length run apart, unless pad tokens make them equal.
        """
        alike = bool((positions == positions[:1]).all())
        parts = [slice(0, len(x))] if alike else [slice(i, i + 1) for i in range(len(x))]
        predicted = []
        for part in parts:
            branches = [strong.rows(part)]
            if weak is not None and guidance.active(sigma):
                branches.append(weak.rows(part))
            predictions = self._branches(x[part], positions[part.start], size, sigma, branches)
            predicted.append(guidance.lead(*predictions) if len(predictions) > 1 else predictions[0])
        return np.concatenate(predicted)

    def _branches(
        self, x: np.ndarray, positions: np.ndarray, size: tuple[int, int], sigma: float, branches: Sequence[Conditions]
    ) -> list[np.ndarray]:
        """The prediction of each branch for the same `x` (B, S, C) at one place (S, 2)."""
        conditions = branches[0].joined(*branches[1:])
        rows, lengths = np.concatenate([x] * len(branches)), self._patches.filled_all(conditions.counts)
        predicted = np.empty(rows.shape)
        for length in dict.fromkeys(lengths):
            run = np.flatnonzero(np.equal(lengths, length))
            predicted[run] = self._predict(rows[run], positions, size, sigma, conditions.rows(run))
        return np.split(predicted, len(branches))

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
        """Of texts that have, or fill up to, one length; it takes as few runs as the session's batch span allows."""
        counts, tokens = conditions.counts, x.shape[1]
        image, text = self._patches.filled(tokens), self._patches.filled(int(counts.max()))
        conditions = conditions.fitted(text)
        x = np.pad(x, ((0, 0), (0, image - tokens), (0, 0)))
        places = place(positions, size, text, self._patches)
        shared: dict[str, np.ndarray] = {self._patches.positions: np.pad(places, ((0, image - tokens), (0, 0)))}
        if self._patches.positions == "img_ids":
            shared["txt_ids"] = text_places(text, size, self._patches)
        parts = []
        for rows in batches(self._session, len(x)):
            count = len(x[rows])
            feeds = shared | conditions.rows(rows).feeds
            feeds |= {"hidden_states": x[rows].astype(np.float32), "timestep": np.full(count, sigma, dtype=np.float32)}
            if self._patches.guidance_embeds:
                feeds["guidance"] = np.full(count, self._embedded, dtype=np.float32)
            if self._patches.multiple is not None:
                feeds |= {"img_pad": pads(np.full(count, tokens), image), "txt_pad": pads(counts[rows], text)}
            parts.append(self._session.run(feeds)["prediction"])
        return np.concatenate(parts)[:, :tokens].astype(np.float64)


def samples(lengths: Sequence[Sequence[int]], guided: bool, alone: bool) -> list[int]:
    """How many samples each run of a step has, before the session's batch span parts them: texts of one length share a run.

    `lengths` are those of the texts, pad tokens among them, by branch and picture. `alone`: each picture by itself.
    """
    pictures = list(zip(*lengths[: 1 + guided], strict=True))
    parts = [[picture] for picture in pictures] if alone else [pictures]
    return [count for part in parts for count in Counter(itertools.chain.from_iterable(part)).values()]


def pads(counts: np.ndarray, length: int) -> np.ndarray:
    """1 in the rows, of `length`, that fill up what has so many of its own (B,), else 0: (B, length), float32."""
    return (np.arange(length) >= counts[:, None]).astype(np.float32)


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
