"""Matrices of few bits that keep their floats after all: those whose rounding moves the graph's answers most.

How far the products of a matrix are off by themselves does not tell (docs/real-size.md): a small error in a layer beside the core may move
a picture more than a large one within it. So each matrix is rounded alone, and the whole graph is run with it.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.errors import UsageError
from elastic_targets.capture import GraphCapture
from elastic_targets.onnx.evaluate import PartSession
from elastic_targets.onnx.fitting import feeds
from elastic_targets.onnx.matrices import Matrix, chosen
from elastic_targets.onnx.quantize import quantize
from elastic_targets.target import OnProgress

ROWS = 6  # samples that the graph is run on for each matrix


def costliest(graph: GraphCapture, model: ir.Model, precision: str, count: int, on_progress: OnProgress | None = None) -> list[Matrix]:
    """The `count` matrices of `model` (in float32) whose rounding to `precision` costs most, the costliest first.

    The cost of one is the square of what the answers are off by, as a share of their own, over runs of noise at the least, a middling and
    the largest budget. `on_progress` is told of the matrices that were tried.

    Raises: UsageError where the model has no more matrices than that.
    """
    matrices = {matrix.name: matrix for matrix in chosen(model)}
    if count >= len(matrices):
        raise UsageError(
            f"--keep {count} leaves nothing in {precision} of this {graph.name}, which has {len(matrices)} matrices: keep fewer"
        )
    described = Graph(inputs=graph.inputs, outputs=graph.outputs, dimensions=graph.dimensions, artifacts=())
    runs = feeds(graph, ROWS)

    def answers(kept: Collection[str]) -> list[np.ndarray]:
        made = model.clone()
        quantize(made, precision, kept=kept)
        with PartSession(described, made) as session:
            return [output for outputs in session.several(runs) for output in outputs.values()]

    exact, costs = answers(matrices), {}
    for done, name in enumerate(matrices, start=1):
        pairs = zip(answers(matrices.keys() - {name}), exact, strict=True)
        costs[name] = sum(float(np.square(answer - right).sum() / max(np.square(right).sum(), 1e-30)) for answer, right in pairs)
        if on_progress:
            on_progress("weighing matrices", done, len(matrices))
    return [matrices[name] for name in sorted(matrices, key=lambda name: -costs[name])[:count]]
