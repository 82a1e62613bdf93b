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
from elastic_runtime.denoising.references import References
from elastic_runtime.errors import UsageError
from elastic_runtime.sessions.session import Session, batches

NAMES = ("encoder_hidden_states", "pooled_projections", "class_labels")  # of inputs that say what to draw


@dataclass(frozen=True, eq=False)  # each is itself: arrays have no hash
class Conditions:
    """What pictures are drawn after: `encoder_hidden_states` (B, T, D) and, where the model takes them,
    `pooled_projections` (B, P), float32; or `class_labels` (B,), int64.

    Where texts differ in length, `lengths` (B,) int64 says how many of the T tokens each has; what follows them is no
    text and never reaches a model.
    """

    hidden: np.ndarray | None = None
    pooled: np.ndarray | None = None
    labels: np.ndarray | None = None
    lengths: np.ndarray | None = None

    @classmethod
    def of(cls, texts: Sequence[np.ndarray], pooled: np.ndarray | None = None) -> "Conditions":
        """Texts (T, D), each of a length of its own."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        if len(set(lengths.tolist())) == 1:
            return cls(np.stack(texts), pooled)
        ends = [[(0, int(lengths.max()) - len(text))] + [(0, 0)] * (text.ndim - 1) for text in texts]
        return cls(np.stack([np.pad(text, end) for text, end in zip(texts, ends, strict=True)]), pooled, lengths=lengths)

    @classmethod
    def blank(cls, graph: Graph, batch: int) -> "Conditions":
        """Zeros of what a denoiser takes, the text as long as can be."""
        sizes = {name: span.max for name, span in graph.dimensions.items()} | {"B": batch}
        shapes = {spec.name: [sizes[size] if isinstance(size, str) else size for size in spec.shape] for spec in graph.inputs}
        hidden, pooled = (np.zeros(shapes[name], np.float32) if name in shapes else None for name in NAMES[:2])
        return cls(hidden, pooled, np.zeros(batch, np.int64) if hidden is None else None)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """The denoiser's inputs, of rows whose texts have one length: see `alike`."""
        return {name: array for name, array in zip(NAMES, self._arrays, strict=True) if array is not None}

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

    def alike(self, filled: Callable[[int], int] = int) -> list[np.ndarray]:
        """Rows whose texts have one length, once those of a length are `filled` up to another, as indices."""
        if self.lengths is None:  # which is asked at every step
            return [np.arange(len(self))]
        lengths = np.array([filled(int(count)) for count in self.counts])
        return [np.flatnonzero(lengths == length) for length in dict.fromkeys(lengths.tolist())]

    def rows(self, index: slice | np.ndarray) -> "Conditions":
        """Some of them, their texts as long as the longest of these."""
        return self._each(lambda array: array[index])._cut()

    def repeated(self, times: int) -> "Conditions":
        """Each of them `times` in a row."""
        return self._each(lambda array: np.repeat(array, times, axis=0))

    def beside(self, other: "Conditions") -> bool:
        """Whether all of these and of `other` may share a run: texts of another length may not."""
        return self.lengths is None and other.lengths is None and self.length == other.length

    def joined(self, *others: "Conditions") -> "Conditions":
        """These, then those of `others`, as rows of one."""
        every = (self, *others)
        columns = zip(*(each._arrays[1:] for each in every), strict=True)
        pooled, labels = (None if column[0] is None else np.concatenate(column) for column in columns)
        if self.hidden is None:
            return Conditions(None, pooled, labels)
        return replace(Conditions.of([text for each in every for text in each._texts()], pooled), labels=labels)

    def lengthened(self, length: int) -> "Conditions":
        """The same with texts that all have `length` tokens, as many as the longest or more: the new ones are zeros."""
        if self.hidden is None or (self.lengths is None and length == self.length):
            return self
        ends = [(0, 0), (0, length - self.length)] + [(0, 0)] * (self.hidden.ndim - 2)
        return replace(self, hidden=np.pad(self.hidden, ends), lengths=None)

    def _texts(self) -> list[np.ndarray]:
        """Each row's text (T, D), of its own length."""
        assert self.hidden is not None
        return [text[:count] for text, count in zip(self.hidden, self.counts.tolist(), strict=True)]

    def _cut(self) -> "Conditions":
        if self.lengths is None or self.hidden is None or not len(self):
            return self
        most = int(self.lengths.max())
        return replace(self, hidden=self.hidden[:, :most], lengths=None if (self.lengths == most).all() else self.lengths)

    @property
    def _arrays(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        return self.hidden, self.pooled, self.labels

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> "Conditions":
        return Conditions(*(None if array is None else change(array) for array in (*self._arrays, self.lengths)))


class TokenDenoiser:
    """A session over tokens (B, S, C).

    `embedded` is the scale that goes in as `guidance` where the model was distilled with one. `references` stand after
    the tokens of each sample.
    """

    def __init__(self, session: Session, patches: Patches, embedded: float | None = None, references: References | None = None):
        self._session = session
        self._patches = patches
        self._embedded = embedded
        self._references = references

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
        both of its branches together. Texts of another length run apart, unless pad tokens make them as long.
        """
        alike = bool((positions == positions[:1]).all())
        parts = [slice(0, len(x))] if alike else [slice(i, i + 1) for i in range(len(x))]
        predicted = []
        for part in parts:
            where, own = (positions[part.start], size, sigma), strong.rows(part)
            if weak is None or not guidance.active(sigma):
                predicted.append(self._predict(x[part], *where, own))
                continue
            halves = np.split(self._predict(np.concatenate([x[part]] * 2), *where, own.joined(weak.rows(part))), 2)
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
        """It takes as few runs as the texts' lengths and the session's batch span allow."""
        groups = conditions.alike(self._patches.filled)
        if len(groups) == 1:
            return self._run(x, positions, size, sigma, conditions).astype(np.float64)
        predicted = np.empty(x.shape, dtype=np.float64)
        for alike in groups:
            predicted[alike] = self._run(x[alike], positions, size, sigma, conditions.rows(alike))
        return predicted

    def _run(self, x: np.ndarray, positions: np.ndarray, size: tuple[int, int], sigma: float, conditions: Conditions) -> np.ndarray:
        """The same for texts that have, or fill up to, one length."""
        drawn, counts, text = x.shape[1], conditions.counts, self._patches.filled(conditions.length)
        ids = place(positions, size, text, self._patches)
        if self._references:
            beside = np.broadcast_to(self._references.tokens, (len(x), *self._references.tokens.shape))
            x, ids = np.concatenate([x, beside], axis=1), np.concatenate([ids, self._references.ids])
        tokens, image = x.shape[1], self._patches.filled(x.shape[1])
        conditions, x = conditions.lengthened(text), np.pad(x, ((0, 0), (0, image - tokens), (0, 0)))
        shared: dict[str, np.ndarray] = {self._patches.positions: np.pad(ids, ((0, image - tokens), (0, 0)))}
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
        return np.concatenate(parts)[:, :drawn]


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
