"""Optimization profiles from spans: one range, or one profile a bucket of an axis. Pure functions.

An axis that travels as a value (`loops`) is an ordinary input and needs no profile; batch, the axes that travel as a length or
a shape and the other open dimensions (FLUX's T, a decoder's h and w) do.
"""

import itertools
import re
from collections.abc import Iterable, Mapping

from elastic_runtime.contract.artifacts import Graph, Profile, Range
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.errors import BudgetError

MOST_DEFAULT_BUCKETS = 4


def default_buckets(axis: Axis) -> tuple[int, ...]:
    """The axis's end and its halvings, at most four, smallest first: 32-256 gives 32, 64, 128, 256."""
    buckets = [axis.max]
    while len(buckets) < MOST_DEFAULT_BUCKETS and (half := axis.min + (buckets[-1] // 2 - axis.min) // axis.step * axis.step) >= axis.min:
        if half == buckets[-1]:
            break
        buckets.append(half)
    return tuple(reversed(buckets))


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


def read_buckets(text: str, axes: Iterable[Axis]) -> dict[str, tuple[int, ...]] | None:
    """Read `auto` (the default ones), `none` (one range), `32,64,128` for the only axis of its kind, or `latents=32,64;T=128,512`.

    Raises: BudgetError for another spelling, or a list that does not say which of several axes it is for.
    """
    if text == "auto":
        return None
    if text == "none":
        return {}
    buckets = {}
    for part in text.split(";"):
        match = re.fullmatch(r"\s*(?:(\w+)\s*=)?\s*(\d+(?:\s*,\s*\d+)*)\s*", part)
        if not match:
            raise BudgetError(f"--buckets is written 32,64,128 or latents=32,64 or none or auto, got {text!r}")
        buckets[match[1] or _only(axes)] = tuple(int(value) for value in match[2].split(","))
    return buckets


def _only(axes: Iterable[Axis]) -> str:
    names = [axis.name for axis in axes if axis.dimension]
    if len(names) != 1:
        raise BudgetError(
            f"--buckets must name what it divides, as in NAME=32,64: axes that change a shape are {', '.join(names) or 'none'}"
        )
    return names[0]


def profiles(
    graph: Graph, axes: Iterable[Axis], batch: Span | None = None, buckets: Mapping[str, Iterable[int]] | None = None
) -> tuple[Profile, ...]:
    """Profiles of a graph, smallest first. `axes` are already narrowed; `buckets` are budgets by axis, or sizes by open
    dimension; None for the default ones of every axis.

    A bucket's profile runs from just above the bucket before it to the bucket itself, which is its preferred size. What has
    no buckets gets its whole span.

    Raises: BudgetError for a batch or a bucket that the graph does not offer.
    """
    lengths = {axis.dimension: axis for axis in carried(graph, axes) if axis.dimension}
    if buckets is None:
        buckets = {axis.name: default_buckets(axis) for axis in lengths.values()}
    choices = {}
    for letter, span in graph.dimensions.items():
        if axis := lengths.get(letter):
            ends = [axis.check(value) for value in buckets.get(axis.name, ())]
            parts = _divide(axis.name, axis.span, axis.step, ends)
            choices[letter] = [Range(*(axis.length(value) for value in (part.min, part.opt, part.max))) for part in parts]
        elif letter == "B":
            choices[letter] = [_batch(batch or span, span)]
        else:
            choices[letter] = _divide(letter, span, 1, buckets.get(letter, ()))
    return tuple(Profile(dimensions=dict(zip(choices, point, strict=True))) for point in itertools.product(*choices.values()))


def unknown_buckets(buckets: Iterable[str], graphs: Iterable[Graph], axes: Iterable[Axis]) -> list[str]:
    """Names in `buckets` that neither an axis that changes a shape nor an open dimension of any graph has."""
    carried = {axis.dimension: axis.name for axis in axes if axis.dimension}
    letters = {letter for graph in graphs for letter in graph.dimensions} - {"B", *carried}
    return sorted(set(buckets) - set(carried.values()) - letters)


def _batch(asked: Span, offered: Span) -> Range:
    if asked.min not in offered or asked.max not in offered:
        raise BudgetError(f"--batch {asked} is not available: the graph takes {offered}. Export the ONNX again with a wider --batch.")
    # One picture with guidance is a batch of two.
    return Range(asked.min, min(max(2, asked.min), asked.max), asked.max)


def _divide(name: str, span: Span, step: int, buckets: Iterable[int]) -> list[Range]:
    """Ranges of a span that end at the buckets, or the whole of it where there are none."""
    ends = sorted(set(buckets)) or [span.max]
    if outside := [end for end in ends if end not in span]:
        raise BudgetError(f"the bucket {outside[0]} lies outside {name} {span}: choose buckets within it")
    if ends[-1] != span.max:
        raise BudgetError(f"the last bucket is {ends[-1]}, so {name} up to {span.max} would have none: add {span.max}, or narrow the span")
    starts = [span.min, *(end + step for end in ends[:-1])]
    return [Range(start, end, end) for start, end in zip(starts, ends, strict=True)]
