"""Matrices of a graph in 8 or 4 bits: which of them, how they are rounded, and the operators that multiply by them.

Where it is multiplied by tokens, a matrix is held in the bits that were asked for. What stays finer is told by the graph's own shape:

- the first and the last layers, which speak the latent's language, keep their floats (they are small, and their errors are seen at once);
- matrices of conditions (one row a sample: timestep, pooled text, modulation) are held in 8 bits, also where the others have 4: an error
  there moves every token; they are multiplied in int8, which is fifty times faster there;
- tables of which rows are taken (a vocabulary) are held in 8 bits, a scale a row. Norms, biases and convolutions keep their floats.

Weights are read, rounded and written one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft"
BLOCKS = {4: 32, 8: 64}  # weights of a row that share a scale
CHUNK = 1 << 22  # weights that are rounded at once
# MatMulNBits' word for activations that are rounded to int8 by blocks, too: for a single row of 8 bits its float32 kernel takes 14 ms where
# this takes 0.25 (1152 x 6912, ONNX Runtime 1.31.1), and a model has such a row in every block.
ROUNDED = 4
LEAST = 32  # columns below which a matrix is no worth of it
# What stands between a matrix and the graph's end, or its beginning, without changing which layer it is.
_CHAIN = {"Add", "Cast", "Expand", "Flatten", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Split", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class Scheme:
    """How a precision holds matrices: bits of those that tokens pass, of those of conditions, and whether activations are rounded, too."""

    tokens: int
    conditions: int = 8
    dynamic: bool = False


SCHEMES = {"int8": Scheme(8, dynamic=True), "int8w": Scheme(8), "int4w": Scheme(4)}


@dataclass(frozen=True)
class Matrix:
    """A matrix that a node multiplies by, as rows of outputs (N, K)."""

    node: ir.Node
    value: ir.Value
    transposed: bool
    bias: ir.Value | None

    @property
    def name(self) -> str:
        """Of what it is rounded to: a weight that two nodes take in two orders is rounded twice."""
        return f"{self.value.name}.transposed" if self.transposed else str(self.value.name)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = _sizes(self.value)
        return (rows, columns) if self.transposed else (columns, rows)

    def read(self) -> np.ndarray:
        array: np.ndarray = self.value.const_value.numpy()  # type: ignore[union-attr]
        return array if self.transposed else array.T


def quantize(model: ir.Model, precision: str) -> None:
    """Hold the matrices of `model` (in float32) as `precision` says, in place."""
    scheme = SCHEMES[precision]
    edges = {id(node) for node in _first(model)} | {id(node) for node in _last(model)}
    for matrix in list(_matrices(model)):
        condition = matrix.node.op_type == "Gemm"
        if id(matrix.node) in edges or min(matrix.shape) < LEAST:
            continue
        if scheme.dynamic and not condition:
            _dynamic(model, matrix)
        else:
            _blockwise(model, matrix, scheme.conditions if condition else scheme.tokens, ROUNDED if condition else 0)
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Gather"]:
        _table(model, node)
    model.graph.opset_imports[DOMAIN] = 1
    for name in [name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del model.graph.initializers[name]


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


def rows(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round `weights` (N, K) to int8, a scale for each row: (N, K) and (N,)."""
    scales = np.abs(weights).max(axis=1).astype(np.float32) / 127
    scales[scales == 0] = 1
    return np.rint(weights / scales[:, None]).astype(np.int8), scales


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _sizes(value: ir.Value) -> tuple[int, int]:
    """Rows and columns of a constant."""
    rows, columns = value.const_value.shape.numpy()  # type: ignore[union-attr]
    return rows, columns


def _matrices(model: ir.Model) -> Iterator[Matrix]:
    """Every multiplication by a constant matrix."""
    for node in model.graph.all_nodes():
        value = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if value is None or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        if node.op_type == "MatMul":
            yield Matrix(node, value, False, None)
        elif not node.attributes.get_int("transA", 0) and all(node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta")):
            yield Matrix(node, value, bool(node.attributes.get_int("transB", 0)), node.inputs[2] if len(node.inputs) > 2 else None)


def _first(model: ir.Model) -> Iterator[ir.Node]:
    """Multiplications of what the graph was given."""
    open_values, seen = [value for value in model.graph.inputs if len(value.shape or ()) > 1], set[int]()
    while open_values:
        for use in open_values.pop().uses():
            node = use.node
            if node.op_type in ("MatMul", "Gemm") and use.idx == 0:
                yield node
            elif node.op_type in _CHAIN and id(node) not in seen:
                seen.add(id(node))
                open_values += node.outputs


def _last(model: ir.Model) -> Iterator[ir.Node]:
    """Multiplications whose product the graph gives."""
    open_values, seen = list(model.graph.outputs), set[int]()
    while open_values:
        node = open_values.pop().producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type in ("MatMul", "Gemm"):
            yield node
        elif node.op_type in _CHAIN - {"Mul"} and not _residual(node):
            open_values += [value for value in node.inputs if value is not None]


def _residual(node: ir.Node) -> bool:
    """Whether a node adds two things that were computed, as at the end of a block."""
    return node.op_type == "Add" and all(value is not None and value.const_value is None for value in node.inputs)


def _blockwise(model: ir.Model, matrix: Matrix, bits: int, accuracy_level: int) -> None:
    rows, columns = matrix.shape
    block = BLOCKS[bits]
    count = -(-columns // block)
    per_byte = 8 // bits
    constants = _constants(
        model,
        f"{matrix.name}.int{bits}",
        lambda: blocks(matrix.read(), bits, block),
        (("codes", ir.DataType.UINT8, (rows, count, block // per_byte)), ("scales", ir.DataType.FLOAT, (rows * count,)),
         ("zeros", ir.DataType.UINT8, (rows * -(-count // per_byte),))),
    )  # fmt: skip
    biased = [None, matrix.bias] if matrix.bias is not None else []
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    _replace(matrix.node, "MatMulNBits", [matrix.node.inputs[0], *constants, *biased], attributes, DOMAIN)


def _dynamic(model: ir.Model, matrix: Matrix) -> None:
    outputs, inputs = matrix.shape

    def round_rows() -> tuple[np.ndarray, np.ndarray]:
        codes, scales = rows(matrix.read())
        return np.ascontiguousarray(codes.T), scales

    described = (("codes", ir.DataType.INT8, (inputs, outputs)), ("scales", ir.DataType.FLOAT, (outputs,)))
    constants = _constants(model, f"{matrix.name}.int8rows", round_rows, described)
    _replace(matrix.node, "DynamicQuantizeMatMul", [matrix.node.inputs[0], *constants], {}, DOMAIN)


def _table(model: ir.Model, node: ir.Node) -> None:
    """Rows of a table by ids that the graph was given: taken in int8, then multiplied by their scales."""
    table, ids = node.inputs
    if table is None or ids is None or table.const_value is None or len(table.const_value.shape) != 2 or ids.const_value is not None:
        return
    (count, width), rank = _sizes(table), node.attributes.get("axis")
    if width < LEAST or (rank and rank.as_int()) or table.dtype != ir.DataType.FLOAT:
        return

    def read() -> tuple[np.ndarray, np.ndarray]:
        codes, scales = rows(table.const_value.numpy())  # type: ignore[union-attr]
        return codes, scales[:, None]

    described = (("codes", ir.DataType.INT8, (count, width)), ("scales", ir.DataType.FLOAT, (count, 1)))
    codes, scales = _constants(model, f"{table.name}.table", read, described)
    taken = ir.node("Gather", [codes, ids], {"axis": 0})
    scale = ir.node("Gather", [scales, ids], {"axis": 0})
    wide = ir.node("Cast", [taken.outputs[0]], {"to": ir.DataType.FLOAT})
    _replace(node, "Mul", [wide.outputs[0], scale.outputs[0]], {}, before=(taken, scale, wide))


def _constants(
    model: ir.Model, name: str, make: Callable[[], Sequence[np.ndarray]], described: Sequence[tuple[str, ir.DataType, tuple[int, ...]]]
) -> list[ir.Value]:
    """Initializers of what `make` gives, made when they are written; a matrix that two nodes share has one set."""
    values = []
    for position, (suffix, dtype, shape) in enumerate(described):
        full = f"{name}.{suffix}"
        if full not in model.graph.initializers:
            read = partial(_tensor, make, position, shape, full)
            lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=full)
            value = ir.Value(name=full, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
            model.graph.register_initializer(value)
        values.append(model.graph.initializers[full])
    return values


def _tensor(make: Callable[[], Sequence[np.ndarray]], position: int, shape: tuple[int, ...], name: str) -> "ir.Tensor[Any]":
    return ir.Tensor(np.ascontiguousarray(_made(make)[position]).reshape(shape), name=name)


@lru_cache(maxsize=1)  # codes, scales and zeros of a matrix are written one after the other
def _made(make: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
    return make()


def _replace(
    node: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    domain: str = "",
    before: Sequence[ir.Node] = (),
) -> None:
    """Put a node in the place of another, with what it needs `before` it."""
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    new = ir.node(kind, inputs, attributes, domain=domain)
    new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*before, new], [old], [new.outputs[0]])
