"""Samples to figures: percentiles, spread between rounds, and the noise of a ratio. Pure functions."""

import math
from collections.abc import Sequence

import numpy as np

from elastic_bench.records import Summary

Rounds = Sequence[Sequence[float]]


def summarize(rounds: Rounds) -> Summary:
    """Figures of all samples of all rounds; at least one sample is needed."""
    every = np.concatenate([np.asarray(samples, dtype=float) for samples in rounds])
    p50, p90, p95, p99 = np.percentile(every, [50, 90, 95, 99])
    low, middle, high = np.percentile(medians(rounds), [25, 50, 75])
    return Summary(
        count=every.size,
        mean=float(every.mean()),
        min=float(every.min()),
        p50=float(p50),
        p90=float(p90),
        p95=float(p95),
        p99=float(p99),
        max=float(every.max()),
        spread=float((high - low) / middle) if middle > 0 else 0.0,
    )


def medians(rounds: Rounds) -> np.ndarray:
    """The median of each round."""
    return np.array([np.median(samples) for samples in rounds if len(samples)])


def ratio(rounds: Rounds, base: Rounds) -> float:
    """How many times longer `rounds` took than `base`, measured in the same turns: the median over rounds of the ratio of medians.

    What slows the machine for a while falls on both of a round, so the ratio holds where the times do not.
    """
    return float(np.median(medians(rounds) / medians(base)))


def noise(rounds: Rounds) -> float:
    """Half the 95 % interval of the median over rounds, relative to it; infinite for fewer than two rounds.

    The standard error of a median is 1.2533 sigma / sqrt(n) for normal samples; sigma is taken from the median absolute
    deviation (times 1.4826), so that single rounds that were disturbed do not widen it.
    """
    middles = medians(rounds)
    if len(middles) < 2:
        return math.inf
    middle = float(np.median(middles))
    sigma = 1.4826 * float(np.median(np.abs(middles - middle)))
    return 1.96 * 1.2533 * sigma / math.sqrt(len(middles)) / middle if middle > 0 else math.inf
