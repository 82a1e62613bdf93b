"""Which matrices of a graph are held in few bits, told by the graph's own shape, and how constants and nodes take their place.

- The first and the last layers, which speak the latent's language, keep their floats (they are small, and their errors are seen at once).
- Matrices of conditions (one row a sample: timestep, pooled text, modulation) are told from those that tokens pass: an error there moves
  every token.

Weights are read, rounded and written one at a time.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir

from elastic_targets.onnx.stream import ORIGIN

LEAST = 32  # columns below which a matrix is no worth of it
# What stands between a matrix and the graph's end, or its beginning, without changing which layer it is.
_CHAIN = {"Add", "Cast", "Expand", "Flatten", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Split", "Transpose", "Unsqueeze"}


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
    def weight(self) -> str:
        """The weight's name in the model, also where the optimiser turned it and numbered what came of that."""
        origin = self.value.metadata_props.get(ORIGIN)
        return ast.literal_eval(origin)[0] if origin else str(self.value.name)

    @property
    def taken(self) -> ir.Value:
        """What is multiplied by it, (..., K)."""
        return self.node.inputs[0]  # type: ignore[return-value]

    @property
    def condition(self) -> bool:
        """Whether it multiplies one row a sample."""
        return self.node.op_type == "Gemm"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = sizes(self.value)
        return (rows, columns) if self.transposed else (columns, rows)

    def read(self) -> np.ndarray:
        array: np.ndarray = self.value.const_value.numpy()  # type: ignore[union-attr]
        return array if self.transposed else array.T


def chosen(model: ir.Model) -> list[Matrix]:
    """The matrices to hold in few bits."""
    edges = {id(node) for node in _first(model)} | {id(node) for node in _last(model)}
    return [matrix for matrix in _matrices(model) if id(matrix.node) not in edges and min(matrix.shape) >= LEAST]


def cleared(model: ir.Model) -> None:
    """Drop the constants that nothing takes any more."""
    for name in [name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del model.graph.initializers[name]


def sizes(value: ir.Value) -> tuple[int, int]:
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


def constants(
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


def replace(
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


def put(
    node: ir.Node, kind: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], outputs: int = 1, domain: str = ""
) -> list[ir.Value]:
    """What a new node before `node` gives. It is called after what that gives, since a loop's body shares its names with the graph."""
    number = node.meta["put"] = node.meta.get("put", 0) + 1
    made = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=f"{node.outputs[0].name}.{kind}.{number}")
    for position, value in enumerate(made.outputs):
        value.name = f"{made.name}.{position}"
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, [made])
    return list(made.outputs)
