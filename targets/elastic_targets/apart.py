"""Where a denoiser's graph is cut in two: what it computes of a sample's conditions alone, and the rest, which takes that as an input.

Time, class and pooled text are the same whatever is drawn, and in most models a quarter to a third of the weights do nothing but turn
them into shifts, scales and gates. The cut is found in the graph itself, for every family: behind the last multiplications that depend on
nothing else. What follows them (splits, sums, one row spread over tokens) costs nothing and stays where it is.

Each room cuts graphs of its own kind; the rule is the same for all.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from elastic_runtime.contract.artifacts import Apart, CoremlCall, TensorSpec
from elastic_runtime.errors import UsageError

CONDITIONS = ("timestep", "guidance", "class_labels", "pooled_projections")  # inputs of the contract that have one row a sample
MODULATION = "modulation"


@dataclass(frozen=True)
class Step:
    """One of a graph's operations: the values that it takes and gives, and which of those taken it multiplies by, None where it does not.

    A value is whatever tells it from others.
    """

    takes: tuple[Hashable, ...]
    gives: tuple[Hashable, ...]
    matrix: Hashable | None = None


def own(steps: Iterable[Step], conditions: Iterable[Hashable], constants: Iterable[Hashable]) -> list[int]:
    """Places of the steps up to the last multiplications of what depends on `conditions` and `constants` alone, in their order."""
    alone, constant = set(conditions), set(constants)
    ends: list[tuple[int, Step]] = []
    for place, step in enumerate(steps):
        variables = [value for value in step.takes if value not in constant]
        if not variables:  # weights on their way from few bits
            constant.update(step.gives)
        elif alone.issuperset(variables):
            ends.append((place, step))
            alone.update(step.gives)
    wanted = set[Hashable]()
    places = []
    for place, step in reversed(ends):
        if (step.matrix is not None and step.matrix in constant) or not wanted.isdisjoint(step.gives):
            wanted.update(step.takes)
            places.append(place)
    return places[::-1]


def require(cut: Sequence[object], given: Sequence[str]) -> None:
    """Raise UsageError for a model that multiplies nothing by its conditions alone (there is nothing to `cut`), or whose outputs are among
    what it computes of them (`given`)."""
    if not cut:
        raise UsageError("this model has no weights for its conditions alone: leave --conditions-apart out")
    if given:
        raise UsageError(f"this model gives {given[0]} of its conditions alone, which two parts cannot: leave --conditions-apart out")


def described(
    path: str, taking: Sequence[str], gone: Sequence[str], size: int, others: Collection[str], call: CoremlCall | None = None
) -> Apart:
    """The record of a cut: a row of `size` values for each sample, in one tensor whose name none of the `others` has."""
    name = MODULATION
    while name in others:
        name += "_"
    spec = TensorSpec(name=name, dtype="float32", shape=("B", size))
    return Apart(path=path, inputs=tuple(taking), outputs=(spec,), gone=tuple(gone), call=call)
