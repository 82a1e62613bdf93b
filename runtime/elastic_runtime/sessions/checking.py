"""Hold a session against what the original model answered, as the bundle recorded it."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np

from elastic_runtime.contract.artifacts import Verification
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import CONVOLVED
from elastic_runtime.contract.reference import axis_feeds, compare, cut, unpack
from elastic_runtime.errors import BundleError
from elastic_runtime.sessions.session import Session, batches

Feeds = dict[str, np.ndarray]


def recordings(
    bundle: Bundle, graph: str, session: Session, arrays: Mapping[str, np.ndarray] | None = None
) -> Iterator[tuple[Budget, Feeds, Feeds]]:
    """Every recorded budget that `session` offers, what the original was fed there, and what it answered.

    Raises: BundleError if the recording lacks a budget that the session was compiled for, and that was not left out on purpose.
    """
    feeds, outputs = unpack(graph, arrays if arrays is not None else bundle.reference())
    left = bundle.manifest.graphs[graph].unproven
    if missing := [budget for budget in session.budgets or () if budget not in outputs and dict(budget) not in left]:
        raise BundleError(f"the reference of {bundle.folder} has no outputs of {graph!r} at {missing[0]}: export the bundle again")
    for budget, recorded in outputs.items():
        if session.offers(budget, bundle.manifest.axes):
            axes = tuple(axis for axis in bundle.manifest.axes if axis.name in budget)
            yield budget, cut(session.graph.inputs, feeds, budget, axes) | axis_feeds(axes, budget), recorded


def check(
    bundle: Bundle, graph: str, session: Session, tolerance: float, arrays: Mapping[str, np.ndarray] | None = None
) -> Iterator[Verification]:
    """Run `session` at every recorded budget that it offers and yield how each compares; the worst output counts. A session that takes more
    samples than were recorded is given them over again.

    Raises: as `recordings`.
    """
    batched = session.graph.batched
    answered: list[tuple[Budget, Feeds, int, int]] = []  # where and what the original answered, to how many samples, in how many runs
    runs: list[Feeds] = []
    for number, (budget, inputs, recorded) in enumerate(recordings(bundle, graph, session, arrays)):
        count = len(inputs[batched[0]])
        size = max(count, session.batch.min)
        feeds = inputs | {name: np.resize(inputs[name], (size, *inputs[name].shape[1:])) for name in batched if size > count}
        parts = batches(session, size)
        if number and graph in CONVOLVED and session.batch.min == 1:  # pictures' activations are their memory; the smallest shared a run
            parts = [slice(row, row + 1) for row in range(size)]
        answered.append((budget, recorded, count, len(parts)))
        runs += [feeds | {name: feeds[name][rows] for name in batched} for rows in parts]
    answers = iter(session.several(runs)) if session.gathers and runs else map(session.run, runs)
    for budget, recorded, count, parted in answered:
        own = list(islice(answers, parted))
        got = {name: np.concatenate([answer[name] for answer in own])[:count] for name in recorded}
        for name, array in recorded.items():
            if got[name].shape != array.shape:
                raise BundleError(
                    f"the reference of {bundle.folder} has a {name} of shape {array.shape} at {budget}, where {got[name].shape} belongs: "
                    "export the bundle again"
                )
        rows = [compare(got[name], array, budget, tolerance, session.where) for name, array in recorded.items()]
        yield worst(rows)


def worst(rows: Iterable[Verification]) -> Verification:
    """The row that speaks for several outputs: one that did not pass before any that did, whose own bound may be wider."""
    return max(rows, key=lambda row: (not row.passed, not row.finite, row.max_abs))
