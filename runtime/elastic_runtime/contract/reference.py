"""Recorded reference outputs: what the original model answers at a few budgets, so that any device can check itself.

The arrays of a reference file are named `<graph>/feed/<input>` for the feeds that all budgets share and
`<graph>/<budget>/<output>` for the outputs, with the budget written as in `budget.key`. Where a graph has open
dimensions that no axis explains, a budget names their sizes too (`T=8,tokens=64`). Of them, and of axes that the data's
shape carries, it is fed the first rows of the feeds.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from elastic_runtime.contract.artifacts import Graph, TensorSpec, Verification, sized
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget, key, parse_key


def pack(graph: str, feeds: Mapping[str, np.ndarray], outputs: Mapping[Budget, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of one graph's reference run under their names in the file."""
    arrays = {f"{graph}/feed/{name}": array for name, array in feeds.items()}
    for budget, named in outputs.items():
        arrays |= {f"{graph}/{key(budget)}/{name}": array for name, array in named.items()}
    return arrays


def unpack(graph: str, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[Budget, dict[str, np.ndarray]]]:
    """Inverse of `pack` for one graph: (feeds, outputs by budget)."""
    feeds: dict[str, np.ndarray] = {}
    outputs: dict[Budget, dict[str, np.ndarray]] = {}
    for full, array in arrays.items():
        owner, group, name = full.split("/", 2)
        if owner == graph and group == "feed":
            feeds[name] = array
        elif owner == graph:
            outputs.setdefault(parse_key(group), {})[name] = array
    return feeds, outputs


def check(arrays: Mapping[str, np.ndarray], graphs: Mapping[str, Graph], axes: Iterable[Axis]) -> None:
    """Raise ValueError unless the arrays are those of runs of these graphs, and finite."""
    carried = {axis.name: axis for axis in axes}
    for full, array in arrays.items():
        owner, _, rest = full.partition("/")
        group, _, name = rest.partition("/")
        graph = graphs.get(owner)
        specs = {spec.name: spec for spec in (graph.inputs if group == "feed" else graph.outputs)} if graph else {}
        if graph is None or name not in specs:
            raise ValueError(f"it holds {full!r}, which no graph has")
        fixed = [size if isinstance(size, int) else own for size, own in zip(specs[name].shape, array.shape, strict=False)]
        if array.dtype.name != specs[name].dtype or array.ndim != len(specs[name].shape) or fixed != list(array.shape) or not array.size:
            raise ValueError(f"{full!r} is {array.dtype} of shape {array.shape}, not {specs[name].dtype} of {specs[name].shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{full!r} has values that are not finite")
        for axis, value in {} if group == "feed" else parse_key(group).items():
            offered = axis in carried and value in carried[axis].values
            if not offered and (axis in carried or axis not in graph.dimensions or value not in graph.dimensions[axis]):
                raise ValueError(f"it holds {full!r}, and {owner} takes no {axis} of {value}")
    for owner, graph in graphs.items():
        feeds, outputs = unpack(owner, arrays)
        wanted = {spec.name for spec in graph.inputs} - {axis.input for axis in carried.values() if axis.carrier != "shape"}
        if outputs and (lacking := sorted(wanted - feeds.keys())):
            raise ValueError(f"it holds outputs of {owner} and not what it was fed: {', '.join(lacking)}")


def axis_feeds(axes: tuple[Axis, ...], budget: Budget) -> dict[str, np.ndarray]:
    """The inputs that carry a budget; those whose shape does are data."""
    return {axis.input: axis.feed(budget[axis.name]) for axis in axes if axis.carrier != "shape"}


def cut(specs: Iterable[TensorSpec], feeds: Mapping[str, np.ndarray], budget: Budget, axes: Iterable[Axis] = ()) -> dict[str, np.ndarray]:
    """The first rows of `feeds`, as many along each open dimension as `budget` names, itself or by the axis that it
    carries."""
    shapes = {spec.name: spec.shape for spec in specs}
    carried = {axis.dimension: budget[axis.name] for axis in axes if axis.dimension and axis.carrier == "shape" and axis.name in budget}
    sizes = dict(budget) | carried

    def rows(size: int | str) -> slice:
        return slice(sized(size, sizes) if isinstance(size, str) else None)

    return {name: array[tuple(rows(size) for size in shapes[name])] for name, array in feeds.items()}


def compare(output: np.ndarray, wanted: np.ndarray, budget: Budget, tolerance: float, where: str) -> Verification:
    """Figures of `output` against `wanted` (same shape). PSNR's peak is the reference's range. Nothing is proven by a reference that is
    not finite."""
    finite = bool(np.isfinite(output).all() and np.isfinite(wanted).all())
    # JSON has no infinity: a result that is not finite is reported by `finite` and the largest float.
    largest = float(np.finfo(np.float32).max)
    difference, cosine, psnr, bound = largest, 0.0, -999.0, None
    if finite:
        a, b = output.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        difference = np.abs(a - b).max()
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = float(a @ b / norms) if norms > 0 else float(not a.any() and not b.any())
        error, span = np.mean((a - b) ** 2), max(float(b.max() - b.min()), 1e-12)
        psnr = 10 * np.log10(span**2 / error) if error > 0 else 999.0
        bound = float(tolerance * max(1.0, np.abs(b).max()))
    return Verification(
        budget=dict(budget),
        max_abs=float(min(difference, largest)),
        cosine=cosine,
        psnr_db=float(max(psnr, -999.0)),
        finite=finite,
        tolerance=tolerance,
        passed=bound is not None and bool(difference <= bound),
        where=where,
        bound=bound,
    )
