"""Matrices of a graph in 8 or 4 bits for ONNX Runtime's own operators: how they are rounded, and what multiplies by them.

Where it is multiplied by tokens, a matrix is held in the bits that were asked for. Of the others (`matrices` tells which):

- matrices of conditions are held in 8 bits, also where the others have 4; they are multiplied in int8, which is fifty times faster there;
- tables of which rows are taken (a vocabulary) are held in 8 bits, a scale a row. Norms, biases and convolutions keep their floats.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from elastic_targets.onnx.matrices import LEAST, Matrix, chosen, cleared, constants, replace, sizes
from elastic_targets.onnx.rounding import Blocks, blocks, rows

DOMAIN = "com.microsoft"
BLOCKS = {4: 32, 8: 64}  # weights of a row that share a scale
# MatMulNBits' word for activations that are rounded to int8 by blocks, too: for a single row of 8 bits its float32 kernel takes 14 ms where
# this takes 0.25 (1152 x 6912, ONNX Runtime 1.31.1), and a model has such a row in every block.
ROUNDED = 4


@dataclass(frozen=True)
class Scheme:
    """How a precision holds matrices: bits of those that tokens pass, of those of conditions, and whether activations are rounded, too."""

    tokens: int
    conditions: int = 8
    dynamic: bool = False


SCHEMES = {"int8": Scheme(8, dynamic=True), "int8w": Scheme(8), "int4w": Scheme(4)}


# What rounds matrices otherwise than to the nearest step: given the model, matrices that tokens pass, and bits; what it made of
# each by name, of those that are not in it the nearest step is taken.
Rounder = Callable[[ir.Model, Sequence[Matrix], int], Mapping[str, Callable[[], Blocks]]]


def quantize(model: ir.Model, precision: str, rounder: Rounder | None = None, kept: Collection[str] = ()) -> None:
    """Hold the matrices of `model` (in float32) as `precision` says, in place; `rounder` rounds those that tokens pass in blocks. Those of
    a name in `kept` keep their floats."""
    scheme, held = SCHEMES[precision], [matrix for matrix in chosen(model) if matrix.name not in kept]
    made = rounder(model, [matrix for matrix in held if not matrix.condition], scheme.tokens) if rounder else {}
    for matrix in held:
        condition = matrix.condition
        if scheme.dynamic and not condition:
            _dynamic(model, matrix)
        else:
            own = None if condition else made.get(matrix.name)
            _blockwise(model, matrix, scheme.conditions if condition else scheme.tokens, ROUNDED if condition else 0, own)
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Gather"]:
        _table(model, node)
    model.graph.opset_imports[DOMAIN] = 1
    cleared(model)


def _blockwise(model: ir.Model, matrix: Matrix, bits: int, accuracy_level: int, fitted: Callable[[], Blocks] | None = None) -> None:
    rows, columns = matrix.shape
    block = BLOCKS[bits]
    count = -(-columns // block)
    per_byte = 8 // bits
    made = constants(
        model,
        f"{matrix.name}.int{bits}",
        fitted or (lambda: blocks(matrix.read(), bits, block)),
        (("codes", ir.DataType.UINT8, (rows, count, block // per_byte)), ("scales", ir.DataType.FLOAT, (rows * count,)),
         ("zeros", ir.DataType.UINT8, (rows * -(-count // per_byte),))),
    )  # fmt: skip
    biased = [None, matrix.bias] if matrix.bias is not None else []
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    replace(matrix.node, "MatMulNBits", [matrix.taken, *made, *biased], attributes, DOMAIN)


def _dynamic(model: ir.Model, matrix: Matrix) -> None:
    outputs, inputs = matrix.shape
    # Where a processor has no VNNI, ONNX Runtime's exact products of bytes (see `sessions.ort.session_options`) pass by the weights of a
    # loop's body: 255 x 63 twice is what 16 bits still hold.
    most = 127 if matrix.node.graph is model.graph else 63

    def round_rows() -> tuple[np.ndarray, np.ndarray]:
        codes, scales = rows(matrix.read(), most)
        return np.ascontiguousarray(codes.T), scales

    described = (("codes", ir.DataType.INT8, (inputs, outputs)), ("scales", ir.DataType.FLOAT, (outputs,)))
    made = constants(model, f"{matrix.name}.int8rows", round_rows, described)
    replace(matrix.node, "DynamicQuantizeMatMul", [matrix.taken, *made], {}, DOMAIN)


def _table(model: ir.Model, node: ir.Node) -> None:
    """Rows of a table by ids that the graph was given: taken in int8, then multiplied by their scales."""
    table, ids = node.inputs
    if table is None or ids is None or table.const_value is None or len(table.const_value.shape) != 2 or ids.const_value is not None:
        return
    (count, width), rank = sizes(table), node.attributes.get("axis")
    if width < LEAST or (rank and rank.as_int()) or table.dtype != ir.DataType.FLOAT:
        return

    def read() -> tuple[np.ndarray, np.ndarray]:
        codes, scales = rows(table.const_value.numpy())  # type: ignore[union-attr]
        return codes, scales[:, None]

    described = (("codes", ir.DataType.INT8, (count, width)), ("scales", ir.DataType.FLOAT, (count, 1)))
    codes, scales = constants(model, f"{table.name}.table", read, described)
    taken = ir.node("Gather", [codes, ids], {"axis": 0})
    scale = ir.node("Gather", [scales, ids], {"axis": 0})
    wide = ir.node("Cast", [taken.outputs[0]], {"to": ir.DataType.FLOAT})
    replace(node, "Mul", [wide.outputs[0], scale.outputs[0]], {}, before=(taken, scale, wide))
