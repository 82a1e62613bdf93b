"""A session: one graph of a bundle, opened by a backend, ready to run at any of its budgets."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph, TensorSpec, dimension, measure, sized
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.precision import PRECISIONS, rank
from elastic_runtime.device import Processor
from elastic_runtime.errors import BudgetError, InferenceError

if TYPE_CHECKING:
    from typing import Self  # since Python 3.11

Arrays = Mapping[str, np.ndarray]
DTYPES = {name: np.dtype(name) for name in ("float32", "int64")}  # a dtype's own name is slow to ask for


@dataclass(frozen=True)
class Origin:
    """What a session is opened from: the artifact, the backend's name, and the options that are given."""

    artifact: Artifact
    backend: str
    options: Mapping[str, object]

    @property
    def precision(self) -> str:
        """What it computes in: the artifact's precision, or one that was asked for by the option of that name."""
        asked = str(self.options.get("precision", self.artifact.precision))
        return asked if asked in PRECISIONS else self.artifact.precision

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
    compiled for (None: every budget of the axes). `origin` is None for a session that no artifact was opened for.
    """

    where: str
    processor: Processor = "cpu"
    origin: Origin | None = None

    def __init__(self, graph: Graph, batch: Span | None = None, budgets: tuple[Budget, ...] | None = None):
        self.graph = graph
        self.batch = batch or graph.batch
        self.budgets = budgets

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run the graph on named arrays and return its outputs by name.

        Raises: InferenceError if a feed is missing, unknown, or of another dtype or shape than the graph's, if the
        backend fails, or if it answers in another shape than the feeds ask for.
        """
        sizes = check_feeds(self.graph, feeds)
        outputs = self._run(feeds)
        # A backend was seen to answer with the shape of the run before, and no error.
        for spec in (spec for spec in self.graph.outputs if spec.name in outputs):
            shape = outputs[spec.name].shape
            asked = [sized(size, sizes) for size in spec.shape]
            if len(shape) != len(asked) or any(size not in (None, got) for size, got in zip(asked, shape, strict=True)):
                raise InferenceError(f"{self.where} answered {spec.name} in shape {shape}, and the graph's is {_shape(spec)} of {sizes}")
        return outputs

    @abstractmethod
    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]: ...

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


def check_feeds(graph: Graph, feeds: Arrays) -> dict[str, int]:
    """The sizes of the open dimensions; raises InferenceError unless `feeds` are exactly the graph's inputs, with equal ones.

    An int64 vector over an open dimension of its own carries a budget by its length and is always arange: graphs read
    nothing else of it, so another selection would silently be taken for a prefix.
    """
    names = {spec.name for spec in graph.inputs}
    if names != set(feeds):
        raise InferenceError(f"the graph takes {sorted(names)}, got {sorted(feeds)}")
    open_dimensions: dict[str, int] = {}
    for spec in graph.inputs:
        array = feeds[spec.name]
        if array.dtype != DTYPES[spec.dtype]:
            raise InferenceError(f"{spec.name} must be {spec.dtype}, got {array.dtype.name}")
        if len(array.shape) != len(spec.shape) or not all(
            _fits(size, length, open_dimensions) for size, length in zip(spec.shape, array.shape, strict=True)
        ):
            raise InferenceError(f"{spec.name} must have shape {_shape(spec)} with equal letters equal, got {array.shape}")
        if spec.dtype == "int64" and len(spec.shape) == 1 and spec.shape != ("B",) and (array != np.arange(len(array))).any():
            raise InferenceError(f"{spec.name} must be arange({len(array)}): kept ones are always the first, got {array[:8].tolist()}")
    for name, size in open_dimensions.items():
        if size not in graph.dimensions[name]:
            raise InferenceError(f"this graph takes {name} of {graph.dimensions[name]}, got {size}")
    return open_dimensions


def _fits(size: int | str, length: int, known: dict[str, int]) -> bool:
    """Whether a dimension has its `size`, as in `4`, `h` or `8*h`, by what is known of the open ones; a new one is known from now on."""
    if isinstance(size, int):
        return size == length
    whole, rest = divmod(length, measure(size, {dimension(size): 1}))
    return not rest and known.setdefault(dimension(size), whole) == whole


def _shape(spec: TensorSpec) -> str:
    return f"({', '.join(map(str, spec.shape))})"
