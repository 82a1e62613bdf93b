"""What a graph is fed where it is asked how large its values become: what static scales are made of.

Feeds are those of the capture, with times all along the schedule and samples from plain noise to plain levels, the same each time:
docs/tensorrt.md compares what they reach with what pictures do.
"""

from collections.abc import Iterator

import numpy as np

from elastic_runtime.contract.budget import Budget
from elastic_targets.capture import GraphCapture

FEEDS = 8  # samples at each budget
EDGE = 0.02  # how near the ends of the schedule the first and the last time are
NOISE = (1.0, 0.8, 0.4, 0.0)  # shares of noise, in turn
SAMPLES = ("sample", "hidden_states")
THOUSANDS = 1000.0  # where times are counted in those of training


def budgets(graph: GraphCapture) -> list[Budget]:
    """All axes and open dimensions at their least, near their middle, and at their most."""
    spans = {axis.name: axis.span for axis in graph.axes} | graph.open_dimensions
    least, most = (Budget(**{name: getattr(span, end) for name, span in spans.items()}) for end in ("min", "max"))
    return list(dict.fromkeys([least, graph.traced, most]))


def feeds(graph: GraphCapture, budget: Budget, size: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """`FEEDS` samples at a budget, in batches that the graph takes; of `size`, those that fill one."""
    if size is None:
        yield from _batches(graph, budget)
        return
    for batch in _batches(graph, budget):
        rows = max(1, *(len(batch[name]) for name in graph.batched))
        for first in range(0, rows - size + 1, size):
            yield {name: array[first : first + size] if name in graph.batched else array for name, array in batch.items()}


def _batches(graph: GraphCapture, budget: Budget) -> Iterator[dict[str, np.ndarray]]:
    generator, size = np.random.default_rng(0), starts(graph).step
    times, shares = np.linspace(EDGE, 1 - EDGE, FEEDS), np.resize(NOISE, FEEDS)
    for first in starts(graph):
        fed, rows = dict(graph.feeds(budget, size)), np.arange(first, first + size) % FEEDS
        if "timestep" in fed:
            counted = THOUSANDS if fed["timestep"].max() > 1 else 1.0
            fed["timestep"] = (np.floor(times[rows] * counted) if counted > 1 else times[rows]).astype(np.float32)
        for name in SAMPLES:
            if name in fed:
                fed[name] = _noised(fed[name].shape, shares[rows], generator)
        yield fed


def starts(graph: GraphCapture) -> range:
    """Of a budget's runs the first samples, as many steps apart as a run has samples: a single run where all would be the same."""
    varies = {"timestep", *SAMPLES} & {spec.name for spec in graph.inputs}
    return range(0, FEEDS if varies else 1, max(graph.batch.min, min(FEEDS, graph.batch.max)))


def _noised(shape: tuple[int, ...], shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """So large a share of noise in each sample, the rest being -1 or 1 all over each row of it."""
    noise = generator.standard_normal(shape)
    levels = np.sign(generator.standard_normal((*shape[:2], *(1 for _ in shape[2:]))))
    share = shares.reshape(-1, *(1 for _ in shape[1:]))
    return (share * noise + np.sqrt(1 - share**2) * levels).astype(np.float32)
