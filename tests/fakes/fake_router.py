"""A DC-DiT made without torch: a router whose counts a test decides, and a prediction that tells which tokens were kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fakes import manifest, model

from elastic_runtime import Axis, ElasticPipeline, FakeSession, Span
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.schedule import LinearBeta

SIDE, LENGTH = 8, 64
TOKENS = Axis(name="tokens", min=4, max=LENGTH, step=1, default=LENGTH, input="slots", carrier="length", dimension="K")
# (timestep, label) -> how many tokens the router keeps naturally, 2 to LENGTH
Counts = Callable[[float, int], int]


def graph(channels: int = 1, batch: Span = Span(1, 8)) -> Graph:  # noqa: B008  frozen
    return Graph(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("B", channels, SIDE, SIDE)),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
            TensorSpec(name="drop_fraction", dtype="float32", shape=("B",)),
            TensorSpec(name="slots", dtype="int64", shape=("K",)),
        ),
        outputs=(
            TensorSpec(name="prediction", dtype="float32", shape=("B", 2 * channels, SIDE, SIDE)),
            TensorSpec(name="kept", dtype="float32", shape=("B",)),
            TensorSpec(name="probability", dtype="float32", shape=("B", LENGTH)),
        ),
        dimensions={"B": batch, "K": TOKENS.span},
        artifacts=(),
    )


def probabilities(count: int, seed: int) -> np.ndarray:
    """Keep probabilities (L,) of which `count` lie above one half, the first and the last of them at 1."""
    order = np.random.default_rng(seed).permutation(np.arange(1, LENGTH - 1))
    values = np.empty(LENGTH, np.float32)
    values[[0, -1]] = 1.0
    values[order[: count - 2]] = np.linspace(0.95, 0.55, max(count - 2, 0))
    values[order[count - 2 :]] = np.linspace(0.45, 0.05, LENGTH - count)
    return values


def kept_by_hand(values: np.ndarray, drop: float, slots: int) -> tuple[list[int], int]:
    """The kept tokens of one picture, and how many there were before the cap: the rule of the paper, said in another way."""
    natural = sorted((i for i, p in enumerate(values) if p > np.float32(1) - p), key=lambda i: -values[i])
    left = len(natural) - math.floor(np.float32(len(natural)) * np.float32(drop))
    return natural[: min(left, slots)], left


def answer(counts: Counts, channels: int) -> Callable[[Any], dict[str, np.ndarray]]:
    """The graph as a function: what is predicted depends on the tokens kept, not on the number of slots."""

    def run(feeds: Any) -> dict[str, np.ndarray]:
        predicted, kept, chances = [], [], []
        for x, t, label, drop in zip(*(feeds[name] for name in ("sample", "timestep", "class_labels", "drop_fraction")), strict=True):
            values = probabilities(counts(float(t), int(label)), int(t) * 100 + int(label))
            chosen, count = kept_by_hand(values, float(drop), len(feeds["slots"]))
            mask = np.zeros(LENGTH, np.float32)
            mask[chosen] = 1
            eps = 0.3 * x + mask.reshape(SIDE, SIDE) - 0.01 * label
            predicted.append(np.concatenate([eps, np.tanh(x + label)]))
            kept.append(count)
            chances.append(values)
        return {"prediction": np.array(predicted, np.float32), "kept": np.array(kept, np.float32), "probability": np.array(chances)}

    return run


def described(channels: int = 1, batch: Span = Span(1, 8), **changes: Any) -> Manifest:  # noqa: B008
    facts = {
        "family": "dc-dit", "prediction": "epsilon", "schedule": LinearBeta(), "sample_shape": (channels, SIDE, SIDE),
        "learned_variance": True, "guided_channels": min(channels, 3),
    }  # fmt: skip
    whole = msgspec.structs.replace(manifest(channels, batch), axes=(TOKENS,), cost=(), graphs={"denoiser": graph(channels, batch)})
    return msgspec.structs.replace(whole, model=model(channels, **(facts | changes)))


def pipeline(
    counts: Counts,
    channels: int = 1,
    batch: Span = Span(1, 8),  # noqa: B008
    budgets: Any = None,
    **changes: Any,
) -> tuple[ElasticPipeline, FakeSession]:
    """A pipeline on the fake, which may have been compiled for some `budgets` only."""
    fake = FakeSession(graph(channels, batch), answer(counts, channels))
    fake.budgets = budgets
    return ElasticPipeline(Bundle(Path("bundle"), described(channels, batch, **changes)), {"denoiser": fake}), fake


def runs(fake: FakeSession) -> list[tuple[int, int]]:
    """(rows, slots) of every run so far."""
    return [(call["sample"][0], call["slots"][0]) for call in fake.calls]
