"""Optimization profiles from spans: one range, or one profile a bucket of an axis. Pure functions.

An axis that travels as a value (`loops`) is an ordinary input and needs no profile; batch, the axes that travel as a length
and the other open dimensions (FLUX's S and T, a decoder's h and w) do.
"""

import itertools
from collections.abc import Iterable, Mapping

from elastic_runtime.axis import Axis, Span
from elastic_runtime.bundle import Graph, Profile, Range
from elastic_runtime.errors import BudgetError

MOST_DEFAULT_BUCKETS = 4


def default_buckets(axis: Axis) -> tuple[int, ...]:
    """The axis's end and its halvings, at most four, smallest first: 32-256 gives 32, 64, 128, 256."""
    found = [axis.max]
    while len(found) < MOST_DEFAULT_BUCKETS and (half := axis.min + (found[-1] // 2 - axis.min) // axis.step * axis.step) >= axis.min:
        if half == found[-1]:
            break
        found.append(half)
    return tuple(reversed(found))


def narrow(axes: Iterable[Axis], spans: Mapping[str, Span]) -> tuple[Axis, ...]:
    """The axes restricted to `spans`; raises BudgetError for an axis that is not there or a span outside it."""
    axes = tuple(axes)
    known = [axis.name for axis in axes]
    for name in spans:
        if name not in known:
            raise BudgetError(f"this bundle has no axis {name!r}; it has {', '.join(known) or 'none'}")
    return tuple(axis.narrow(spans[axis.name]) if axis.name in spans else axis for axis in axes)


def carried(graph: Graph, axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Those of `axes` whose input the graph has."""
    names = {spec.name for spec in graph.inputs}
    return tuple(axis for axis in axes if axis.input in names)


def profiles(
    graph: Graph, axes: Iterable[Axis], batch: Span | None = None, buckets: Mapping[str, Iterable[int]] | None = None
) -> tuple[Profile, ...]:
    """Profiles of a graph, smallest first. `axes` are already narrowed; `buckets` are budgets by axis, None for the default ones.

    A bucket's profile runs from just above the bucket before it to the bucket itself, which is its preferred size. An axis
    with no buckets gets its whole span.

    Raises: BudgetError for a batch, an axis or a bucket that the graph does not offer.
    """
    axes = carried(graph, axes)
    lengths = {axis.dimension: axis for axis in axes if axis.dimension}
    if buckets is None:
        buckets = {axis.name: default_buckets(axis) for axis in lengths.values()}
    for name in buckets:
        if name not in [axis.name for axis in lengths.values()]:
            offer = ", ".join(axis.name for axis in lengths.values()) or "none"
            raise BudgetError(f"buckets are for axes that change a shape; {name!r} is not one here, there are: {offer}")
    choices = {}
    for letter, span in graph.dimensions.items():
        if letter in lengths:
            choices[letter] = _buckets(lengths[letter], buckets.get(lengths[letter].name, ()))
        elif letter == "B":
            choices[letter] = [_batch(batch or span, span)]
        else:
            choices[letter] = [Range(span.min, span.max, span.max)]
    return tuple(Profile(dimensions=dict(zip(choices, point, strict=True))) for point in itertools.product(*choices.values()))


def _batch(asked: Span, offered: Span) -> Range:
    if asked.min not in offered or asked.max not in offered:
        raise BudgetError(f"--batch {asked} is not available: the graph takes {offered}. Export the ONNX again with a wider --batch.")
    # One picture with guidance is a batch of two.
    return Range(asked.min, min(max(2, asked.min), asked.max), asked.max)


def _buckets(axis: Axis, wanted: Iterable[int]) -> list[Range]:
    ends = sorted({axis.check(value) for value in wanted})
    if not ends:
        return [Range(axis.length(axis.min), axis.length(axis.max), axis.length(axis.max))]
    if ends[-1] != axis.max:
        raise BudgetError(
            f"the last bucket is {ends[-1]}, so {axis.name} up to {axis.max} would have none: "
            f"add {axis.max}, or ask for --{axis.name} {axis.min}-{ends[-1]}"
        )
    starts = [axis.min, *(end + axis.step for end in ends[:-1])]
    return [Range(axis.length(start), axis.length(end), axis.length(end)) for start, end in zip(starts, ends, strict=True)]
