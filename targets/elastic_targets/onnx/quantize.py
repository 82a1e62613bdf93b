"""Matrices of a graph in 8 or 4 bits for ONNX Runtime's own operators: how they are rounded, and what multiplies by them.

Where it is multiplied by tokens, a matrix is held in the bits that were asked for. Of the others (`matrices` tells which):

- matrices of conditions are held in 8 bits, also where the others have 4; they are multiplied in int8, which is fifty times faster there;
- tables of which rows are taken (a vocabulary) are held in 8 bits, a scale a row. Norms, biases and convolutions keep their floats.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from elastic_targets.onnx.matrices import LEAST, Matrix, chosen, cleared, constants, replace, sizes

DOMAIN = "com.microsoft"
BLOCKS = {4: 32, 8: 64}  # weights of a row that share a scale
CHUNK = 1 << 22  # weights that are rounded at once
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


def quantize(model: ir.Model, precision: str) -> None:
    """Hold the matrices of `model` (in float32) as `precision` says, in place."""
    scheme = SCHEMES[precision]
    for matrix in chosen(model):
        condition = matrix.condition
        if scheme.dynamic and not condition:
            _dynamic(model, matrix)
        else:
            _blockwise(model, matrix, scheme.conditions if condition else scheme.tokens, ROUNDED if condition else 0)
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Gather"]:
        _table(model, node)
    model.graph.opset_imports[DOMAIN] = 1
    cleared(model)


def blocks(weights: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round `weights` (N, K) to the nearest of 2^bits steps between the least and the largest of each block of a row.

    Returns: (N, K / block, block * bits / 8) packed, low bits first; scales (N * K / block) float32; zero points, packed, by row.
    """
    step = max(1, CHUNK // weights.shape[1])
    parts = [_blocks(weights[first : first + step], bits, block) for first in range(0, len(weights), step)]
    codes, scales, zeros = (np.concatenate(each) for each in zip(*parts, strict=True))
    return codes, scales, zeros


def _blocks(weights: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns = weights.shape
    count = -(-columns // block)
    padded = np.pad(weights.astype(np.float32), ((0, 0), (0, count * block - columns))).reshape(rows, count, block)
    most = 2**bits - 1
    least, largest = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    scales = (largest - least) / most
    scales[scales == 0] = 1
    zeros = np.clip(np.rint(-least / scales), 0, most)
    codes = np.clip(np.rint(padded / scales[..., None]) + zeros[..., None], 0, most).astype(np.uint8)
    return _packed(codes, bits), scales.astype(np.float32).reshape(-1), _packed(zeros.astype(np.uint8), bits).reshape(-1)


def rows(weights: np.ndarray, most: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Round `weights` (N, K) to int8 of at most `most`, a scale for each row: (N, K) and (N,)."""
    scales = np.abs(weights).max(axis=1).astype(np.float32) / most
    scales[scales == 0] = 1
    return np.rint(weights / scales[:, None]).astype(np.int8), scales


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _blockwise(model: ir.Model, matrix: Matrix, bits: int, accuracy_level: int) -> None:
    rows, columns = matrix.shape
    block = BLOCKS[bits]
    count = -(-columns // block)
    per_byte = 8 // bits
    made = constants(
        model,
        f"{matrix.name}.int{bits}",
        lambda: blocks(matrix.read(), bits, block),
        (("codes", ir.DataType.UINT8, (rows, count, block // per_byte)), ("scales", ir.DataType.FLOAT, (rows * count,)),
         ("zeros", ir.DataType.UINT8, (rows * -(-count // per_byte),))),
    )  # fmt: skip
    biased = [None, matrix.bias] if matrix.bias is not None else []
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    replace(matrix.node, "MatMulNBits", [matrix.node.inputs[0], *made, *biased], attributes, DOMAIN)


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
    replace(matrix.node, "DynamicQuantizeMatMul", [matrix.node.inputs[0], *made], {}, DOMAIN)


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
