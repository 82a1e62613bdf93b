"""Where a picture's noise comes from: one generator for all, or one for each picture, which is then the same in any
batch."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from elastic_runtime.errors import UsageError

Generators = np.random.Generator | Sequence[np.random.Generator]
MOST_SEED = 2**63 - 1  # what JSON's readers agree on


class Source(Protocol):
    """What the loops draw: arrays whose first dimension is the pictures."""

    def standard_normal(self, size: tuple[int, ...]) -> np.ndarray: ...

    def gumbel(self, *, size: tuple[int, ...]) -> np.ndarray: ...


class Each:
    """A source with a generator of its own for each picture."""

    def __init__(self, generators: Sequence[np.random.Generator]):
        self._generators = tuple(generators)

    def standard_normal(self, size: tuple[int, ...]) -> np.ndarray:
        return np.stack([one.standard_normal(size[1:]) for one in self._generators])

    def gumbel(self, *, size: tuple[int, ...]) -> np.ndarray:
        return np.stack([one.gumbel(size=size[1:]) for one in self._generators])


def source(generator: Generators, count: int) -> Source:
    """The noise of `count` pictures.

    Raises: UsageError for something else than a generator, or one for each picture.
    """
    if isinstance(generator, np.random.Generator):
        return generator
    each = list(generator) if isinstance(generator, Sequence) else []
    if len(each) != count or not all(isinstance(one, np.random.Generator) for one in each):
        raise UsageError(f"generator is a numpy.random.Generator, np.random.default_rng(seed), or {count} of them, got {generator!r}")
    return Each(each)


def initial(noise: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A caller's noise, checked: finite real numbers of `shape`, a sample a picture."""
    try:
        array = np.asarray(noise)
    except ValueError:  # ragged
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UsageError(f"noise must be finite numbers of shape {shape}, one sample a picture")
    if array.shape != shape:
        raise UsageError(f"noise must have shape {shape}, one sample a picture, got {array.shape}")
    return array


def seeds(given: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """A seed for each of `count` pictures: those given, or from one on upwards; new ones where none is given.

    Raises: UsageError for another number of seeds, or one that is no whole number from 0.
    """
    if given is None:
        return tuple(int(seed) for seed in np.random.default_rng().integers(2**32, size=count))
    listed = [given] if isinstance(given, int | np.integer) else list(given) if isinstance(given, Sequence) else [given]
    for seed in listed:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MOST_SEED:
            raise UsageError(f"a seed is a whole number from 0 to {MOST_SEED}, got {seed!r}")
    if isinstance(given, int | np.integer):
        if given + count - 1 > MOST_SEED:
            raise UsageError(f"{count} seeds counted up from {given} end above the largest, {MOST_SEED}: give a smaller one")
        return tuple(int(given) + index for index in range(count))
    if len(listed) != count:
        raise UsageError(f"there are {count} pictures and {len(listed)} seeds: give one for each, or a single one to count from")
    return tuple(int(seed) for seed in listed)
