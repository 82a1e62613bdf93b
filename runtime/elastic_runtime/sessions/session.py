"""A session: one graph of a bundle, opened by a backend, ready to run at any of its budgets."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.precision import EXACT, PRECISIONS, rank
from elastic_runtime.device import Processor
from elastic_runtime.errors import BudgetError
from elastic_runtime.sessions.interface import Interface

if TYPE_CHECKING:
    from typing import Self  # since Python 3.11


Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Origin:
    """What a session is opened from: the artifact, the backend's name, and the options that are given."""

    artifact: Artifact
    backend: str
    options: Mapping[str, object]

    @property
    def precisions(self) -> tuple[str, ...]:
        """What is given up: the precision of the weights, and the one that the rest is computed in where the option of that name asks for
        it; float32 where nothing is."""
        names = (self.artifact.precision, str(self.options.get("precision", EXACT)))
        return tuple(dict.fromkeys(name for name in names if name in PRECISIONS and name != EXACT)) or (EXACT,)

    def within(self, precisions: Iterable[str]) -> bool:
        """Whether it gives up no more than `precisions`."""
        return {*self.precisions} <= {*precisions}

    @property
    def precision(self) -> str:
        """The least exact of `precisions`."""
        return max(self.precisions, key=rank)

    @property
    def rank(self) -> tuple[int, int]:
        """How exact it is: less is more exact."""
        return self.artifact.rank if self.precision == self.artifact.precision else rank(self.precision)


class Session(ABC):
    """An open artifact. Close it, or use it in a `with` block.

    Any thread may run it: each gets its own answer, whether the backend runs them at once or one after the other (its
    session says which).

    A subclass implements `_run` and `close`, and says in `where` what it runs on and in `processor` of which kind that
    is. An artifact may offer less than its graph: `batch` is the span of one run, `budgets` are the points that it was
    compiled for (None: every budget of the axes), `spans` those of open dimensions of which it takes fewer sizes.
    `origin` is None for a session that no artifact was opened for. `gathers` is whether runs that are handed over
    together (`several`) take much less than one after the other, `fell_back` whether it runs on another processor than
    its backend would have taken.
    """

    where: str
    processor: Processor = "cpu"
    origin: Origin | None = None
    gathers: bool = False
    fell_back: bool = False

    def __init__(
        self,
        graph: Graph,
        batch: Span | None = None,
        budgets: tuple[Budget, ...] | None = None,
        spans: Mapping[str, Span] = MappingProxyType({}),
    ):
        self.graph = graph
        self.interface = Interface(graph)
        self.batch = batch or graph.batch
        self.budgets = budgets
        self.spans = spans

    def axes(self, axes: Iterable[Axis]) -> tuple[Axis, ...]:
        """A bundle's axes, narrowed to the sizes that it takes."""
        return tuple(
            axis.narrow(Span(span.min * axis.unit, span.max * axis.unit)) if (span := self.spans.get(axis.dimension or "")) else axis
            for axis in axes
        )

    def offers(self, budget: Budget, axes: Iterable[Axis]) -> bool:
        """Whether it takes a budget, which names values of axes and sizes of open dimensions."""
        if self.budgets is not None:
            return budget in self.budgets
        sizes = dict(budget) | {axis.dimension: axis.length(budget[axis.name]) for axis in axes if axis.name in budget and axis.dimension}
        return all(sizes.get(name, span.min) in span for name, span in self.spans.items())

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run the graph on named arrays and return its outputs by name.

        Raises: InferenceError if a feed is missing, unknown, or of another dtype or shape than the graph's, if the
        backend fails, or if it answers in another shape than the feeds ask for.
        """
        return self.several([feeds])[0]

    def several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """The outputs of several runs that do not wait for each other, of any sizes; raises as `run`.

        They come one after the other, unless the backend is faster with them side by side.
        """
        sizes = [self.interface.check(feeds) for feeds in runs]
        answers = self._several(runs)
        for outputs, known in zip(answers, sizes, strict=True):
            self.interface.check_answer(outputs, known, self.where)
        return answers

    def foresee(self, times: Sequence[float] | np.ndarray) -> None:  # noqa: B027  most have nothing to prepare
        """Told that runs at these times (values of `timestep`) will follow, as far as anybody knows."""

    @abstractmethod
    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]: ...

    def _several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        return [self._run(feeds) for feeds in runs]

    @abstractmethod
    def close(self) -> None:
        """Release the backend's memory; running afterwards is an error."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def batches(session: Session, size: int) -> list[slice]:
    """Rows of each run for `size` samples, as few and as equal runs as the session's batch span allows.

    Raises: BudgetError where `size` does not divide into runs of that span; nothing is padded.
    """
    span = session.batch
    if span.min <= size <= span.max:
        return [slice(0, size)]
    edges = np.linspace(0, size, -(-size // span.max) + 1).round().astype(int)
    if np.diff(edges).min() < span.min:
        raise BudgetError(f"{session.where} takes batches of {span}; {size} samples (guidance counted) do not divide into such runs")
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def joined(outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Outputs of the runs of `batches`, row after row."""
    return outputs[0] if len(outputs) == 1 else {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
