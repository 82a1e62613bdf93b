"""int8 activations (w8a8): what an int8 matrix multiplies passes `quantize` and `dequantize` (iOS 17) with one scale a tensor.

Core ML's compiler makes one product of bytes of the two on the neural engines that have it (A17 Pro, M4 and newer); others compute the
same in float16. Scales are symmetric and static: the largest magnitude that a tensor reached in the float16 program, over feeds without
data. A scale belongs to the matrix, so that the functions that share one share its scale, whatever each of them reached.

Floats stay: conditions (one row a sample: nothing is gained, and an error moves every token), the first and the last layers, what the
program keeps in float32, products of two activations, and convolutions.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.models.utils import _apply_graph_pass
from coremltools.optimize import coreml as optimize
from coremltools.optimize.coreml._quantization_passes import insert_prefix_quantize_dequantize_pair

from elastic_runtime.errors import ModelError
from elastic_targets.coreml.compress import LEAST_WEIGHTS, digest
from elastic_targets.coreml.evaluate import Evaluator

# What stands between a matrix and the function's end, or its beginning, without changing which layer it is.
_CHAIN = {
    "add", "cast", "expand_dims", "identity", "mul", "reshape", "slice_by_index", "slice_by_size", "split", "squeeze", "tile", "transpose",
}  # fmt: skip


class Activations:
    """The scales of converted models that hold the same matrices: all are observed, then the pairs are inserted into each.

    `batch` is the number of samples of one run.
    """

    def __init__(self, batch: int):
        self._batch = batch
        self._largest: dict[bytes, float] = {}  # by the matrix
        self._keys: dict[int, bytes] = {}  # of the operations of the function that is observed

    def observe(self, package: Path, runs: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Run the function `main` of a package in floats, and take the largest magnitude that each matrix multiplies.

        Raises: ModelError where there is none, or that is not finite.
        """
        evaluator = Evaluator(package, self._watched)
        self._keys = {id(each): digest(each.weight.val) for each in matrices(evaluator.program("main"), self._batch)}
        if not self._keys:
            raise ModelError(
                f"--compress w8a8 finds no matrix of more than {LEAST_WEIGHTS} weights that tokens pass, besides the first and the last: "
                "use --compress int8"
            )
        for feeds in runs:
            evaluator.run("main", feeds)
        evaluator.close()
        if not np.isfinite(list(self._largest.values())).all():
            raise ModelError(
                "what a matrix multiplies is not finite in float16, so that no scale of int8 fits it: leave --compress w8a8 out, and see "
                "what the model gives in float16"
            )

    def insert(self, package: Path) -> Any:
        """The model of a package with a pair before each of the matrices; one that no run reached keeps its floats."""
        pairs = _Pairs(self._largest, self._batch)
        return _apply_graph_pass(ct.models.MLModel(str(package), skip_model_load=True), pairs, skip_model_load=True)

    def _watched(self, operation: Any, inputs: Mapping[str, Any]) -> None:
        if key := self._keys.get(id(operation)):
            largest = float(inputs["x"].abs().max())
            self._largest[key] = float(np.maximum(self._largest.get(key, 0.0), largest))  # NaN where either is


class _Pairs(AbstractGraphPass):
    """coremltools' own pass, told which operations and how large: it would find that out on a Mac."""

    def __init__(self, largest: Mapping[bytes, float], batch: int):
        self._largest, self._batch = largest, batch

    def apply(self, prog: Any) -> None:
        reached: dict[str, float] = {}
        names = []
        for function in prog.functions.values():
            for operation in matrices(function, self._batch):
                if (largest := self._largest.get(digest(operation.weight.val))) is not None:
                    names.append(operation.name)
                    reached[operation.x.name] = max(largest, reached.get(operation.x.name, 0.0))  # q, k and v take one value
        config = optimize.OptimizationConfig(
            op_name_configs=dict.fromkeys(names, optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8"))
        )
        pairs = insert_prefix_quantize_dequantize_pair(config)
        pairs.activation_stats = {name: {"rmin": -largest, "rmax": largest} for name, largest in reached.items()}
        pairs.apply(prog)


def matrices(function: Any, batch: int) -> list[Any]:
    """The `linear` operations of a MIL function whose activations become int8, those in the bodies of its loops among them."""
    edges = {id(operation) for operation in (*_first(function, batch), *_last(function))}
    return [
        operation
        for operation in _linears(function)
        if id(operation) not in edges
        and operation.x.dtype == types.fp16
        and operation.weight.val is not None
        and operation.weight.val.size > LEAST_WEIGHTS  # the others stay in floats themselves
        and _rows(operation.x.shape) > batch
    ]


def _rows(shape: tuple[Any, ...]) -> float:
    """How many rows a tensor has; those of an open length are many."""
    rows = [int(size) for size in shape[:-1] if isinstance(size, int | np.integer)]
    return math.prod(rows) if len(rows) == len(shape) - 1 else math.inf


def _linears(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        if operation.op_type == "linear":
            yield operation
        for inner in operation.blocks:
            yield from _linears(inner)


def _first(function: Any, batch: int) -> Iterator[Any]:
    """Products of the tokens that the function was given; of what it was given of conditions, shifts and scales reach every matrix."""
    open_values, seen = [value for value in function.inputs.values() if value.rank > 1 and _rows(value.shape) > batch], set[int]()
    while open_values:
        value = open_values.pop()
        for operation in value.child_ops:
            if operation.op_type == "linear" and operation.x is value:
                yield operation
            elif operation.op_type in _CHAIN and id(operation) not in seen:
                seen.add(id(operation))
                open_values += operation.outputs


def _last(function: Any) -> Iterator[Any]:
    """Products that the function gives."""
    open_values, seen = list(function.outputs), set[int]()
    while open_values:
        operation = open_values.pop().op
        if operation is None or id(operation) in seen:
            continue
        seen.add(id(operation))
        if operation.op_type == "linear":
            yield operation
        elif operation.op_type in _CHAIN - {"mul"} and not _residual(operation):
            open_values += [each for given in operation.inputs.values() if given is not None for each in _each(given)]


def _each(given: Any) -> Iterable[Any]:
    return given if isinstance(given, list | tuple) else (given,)


def _residual(operation: Any) -> bool:
    """Whether an operation adds two things that were computed, as at the end of a block."""
    return operation.op_type == "add" and operation.x.val is None and operation.y.val is None
