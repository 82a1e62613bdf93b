"""Matrices rounded by what they multiply: the graph is run on a few feeds, a part at a time, and each matrix is rounded when all that it
multiplies has been seen. What is held at once are a part's weights and activations; what was rounded waits on disk.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from elastic_runtime.errors import ModelError
from elastic_targets.capture import GraphCapture
from elastic_targets.feeds import budgets
from elastic_targets.onnx.evaluate import compute, inner, parts
from elastic_targets.onnx.matrices import Matrix
from elastic_targets.onnx.quantize import BLOCKS
from elastic_targets.onnx.rounding import Blocks, compensated, slabs
from elastic_targets.target import OnProgress

PART = 64_000_000  # bytes of weights that are run together, which stand in memory some times over while a session opens
ROWS = 12  # samples that matrices are fitted to, each at a time of its own


def feeds(graph: GraphCapture, rows: int = ROWS) -> list[dict[str, np.ndarray]]:
    """`rows` samples to fit to, noise at times all over the schedule, in runs of the least, a middling and the largest budget in turn; more
    where the graph takes larger batches alone."""
    points = budgets(graph)
    size = max(graph.batch.min, min(rows, max(1, rows // len(points)), graph.batch.max))
    if size == graph.batch.min:
        rows = max(rows, size * len(points))
    runs = []
    for number, first in enumerate(range(0, rows // size * size, size)):
        every = graph.feeds(points[number % len(points)], rows)
        runs.append({name: array[first : first + size] if name in graph.batched else array for name, array in every.items()})
    return runs


def fitted(
    model: ir.Model,
    matrices: Sequence[Matrix],
    bits: int,
    runs: Sequence[Mapping[str, np.ndarray]],
    folder: Path,
    on_progress: OnProgress | None = None,
) -> Mapping[str, Callable[[], Blocks]]:
    """Round `matrices` so that their products are least off over `runs` of the model; what was made of each is read from `folder`.

    Raises: ModelError where the model gives values that are not finite.
    """
    cut, states = list(parts(model, PART)), [dict(run) for run in runs]
    place = {id(each): number for number, part in enumerate(cut) for node in part.nodes for each in (node, *inner(node))}
    taken: dict[str, dict[str, None]] = {}  # what each matrix multiplies
    last: dict[str, Matrix] = {}
    given = {id(value) for value in model.graph.inputs}
    # What a loop's body is given, and multiplies as it is, cannot be watched.
    matrices = [each for each in matrices if each.taken.producer() is not None or id(each.taken) in given]
    for matrix in matrices:
        taken.setdefault(matrix.name, {})[str(matrix.taken.name)] = None
        last[matrix.name] = matrix
    needed = {name: number for number, part in enumerate(cut) for name in part.takes}
    grams: dict[tuple[str, ...], list[np.ndarray]] = {}
    made: dict[str, Callable[[], Blocks]] = {}
    for number in range(len(cut)):
        here = {str(matrix.taken.name) for matrix in matrices if place[id(matrix.node)] == number}
        wanted = dict.fromkeys(tuple(names) for names in taken.values() if here & names.keys())
        for run, answers in enumerate(compute(model, cut[number], states, here)):
            values = states[run] | answers
            for names in wanted:
                for name in here & set(names):
                    _add(grams.setdefault(names, []), values[name], BLOCKS[bits])
            states[run] = {name: array for name, array in values.items() if needed.get(name, -1) > number}
        for name in [name for name, matrix in last.items() if place[id(matrix.node)] == number]:
            if not all(np.isfinite(gram).all() for gram in grams[tuple(taken[name])]):
                raise ModelError(f"{name} multiplies values that are not finite, so that nothing can be fitted: use --rounding nearest")
            arrays = compensated(last.pop(name).read(), grams[tuple(taken[name])], bits, BLOCKS[bits])
            paths = [folder / f"{len(made)}.{position}.npy" for position in range(len(arrays))]
            for path, array in zip(paths, arrays, strict=True):
                np.save(path, array)
            made[name] = partial(_read, tuple(paths))
            if on_progress:
                on_progress("rounding", len(made), len(taken))
        grams = {names: held for names, held in grams.items() if any(tuple(taken[name]) == names for name in last)}
    return made


def _add(grams: list[np.ndarray], inputs: np.ndarray, block: int) -> None:
    """Add inputs (..., K) to the gram matrices of their slabs of columns."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    grams[:] = grams or [np.zeros((each.stop - each.start,) * 2, np.float32) for each in slabs(flat.shape[1], block)]
    for gram, columns in zip(grams, slabs(flat.shape[1], block), strict=True):
        gram += flat[:, columns].T @ flat[:, columns]


def _read(paths: tuple[Path, ...]) -> Blocks:
    codes, scales, zeros = (np.load(path) for path in paths)
    return codes, scales, zeros
