"""A denoiser's ONNX graph in two, by the rule of `elastic_targets.apart`."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from elastic_runtime.contract.artifacts import Apart, TensorSpec
from elastic_targets.apart import CONDITIONS, MODULATION, Step, described, own, require
from elastic_targets.onnx.evaluate import taken

_MULTIPLIES = {"MatMul", "Gemm", "MatMulNBits", "DynamicQuantizeMatMul"}


def split(model: ir.Model, inputs: Sequence[TensorSpec], path: str) -> tuple[ir.Model, ir.Model, Apart]:
    """The rest of `model` and what it computes of its conditions, which is to be written at `path` of the bundle; `model` is used up.

    Raises: UsageError for a model that multiplies nothing by its conditions alone.
    """
    graph, names = model.graph, [spec.name for spec in inputs]
    given = {str(value.name): value for value in graph.inputs}
    mine = _own(graph, [given[name] for name in CONDITIONS if name in given])
    inside = {id(node) for node in mine}
    cut = [value for node in mine for value in node.outputs if any(id(use.node) not in inside for use in value.uses())]
    require(cut, [str(value.name) for node in mine for value in node.outputs if value.is_graph_output()])
    sizes = [math.prod(_sizes(value)) for value in cut]
    taking = [name for name in names if any(id(use.node) in inside for use in given[name].uses())]
    gone = [name for name in taking if all(id(use.node) in inside for use in given[name].uses())]
    apart = described(path, taking, gone, sum(sizes), ir.convenience.create_value_mapping(graph))
    name = apart.outputs[0].name

    whole = _joined(graph, cut, sizes, name)
    conditions = ir.convenience.extract(graph, [given[name] for name in taking], [whole])
    whole.name = None  # the clone has it, and the rest's input is called so
    back = _parted(graph, cut, sizes, inside, name)
    left = [given[name] for name in names if name not in gone]
    remaining = ir.convenience.extract(graph, [*left, back], list(graph.outputs))
    made = [ir.Model(part, ir_version=model.ir_version, producer_name=model.producer_name) for part in (remaining, conditions)]
    return made[0], made[1], apart


def _own(graph: ir.Graph, conditions: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes up to the last multiplications of what depends on `conditions` and constants alone, in the graph's order."""
    nodes = list(graph)
    takes = [tuple(taken(node)) for node in nodes]
    constants = [id(value) for values in takes for value in values if value.const_value is not None]
    steps = [
        Step(tuple(map(id, values)), tuple(map(id, node.outputs)), id(node.inputs[1]) if node.op_type in _MULTIPLIES else None)
        for node, values in zip(nodes, takes, strict=True)
    ]
    return [nodes[place] for place in own(steps, map(id, conditions), constants)]


def _sizes(value: ir.Value) -> list[int]:
    """The sizes of a sample's part of what is cut: N of (B, N), none of (B,)."""
    sizes = list(value.shape or ())[1:]
    known = [size for size in sizes if isinstance(size, int)]
    if not value.shape or len(known) < len(sizes):
        raise RuntimeError(f"{value.name} depends on conditions alone and has shape {value.shape}, where a row for each sample belongs")
    return known


def _joined(graph: ir.Graph, cut: Sequence[ir.Value], sizes: Sequence[int], name: str) -> ir.Value:
    """All that is cut as one value (B, M), float32."""
    flat = []
    for value, size in zip(cut, sizes, strict=True):
        wide = _added(graph, "Cast", [value], {"to": int(ir.DataType.FLOAT)}) if value.dtype != ir.DataType.FLOAT else value
        flat.append(wide if len(value.shape or ()) == 2 else _added(graph, "Reshape", [wide, _constant(graph, [-1, size])]))
    whole = _added(graph, "Concat", flat, {"axis": 1})
    whole.name, whole.type = name, ir.TensorType(ir.DataType.FLOAT)
    first = (cut[0].shape or ir.Shape(["B"]))[0]
    whole.shape = ir.Shape([first, sum(sizes)])
    return whole


def _parted(graph: ir.Graph, cut: Sequence[ir.Value], sizes: Sequence[int], inside: set[int], name: str) -> ir.Value:
    """An input (B, M) whose parts take the places of what was cut, outside of what was computed of conditions."""
    first = (cut[0].shape or ir.Shape(["B"]))[0]
    value = ir.Value(name=name, shape=ir.Shape([first, sum(sizes)]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    start = next(iter(graph))
    parts = [value]
    if len(cut) > 1:
        node = ir.node("Split", [value, _constant(graph, sizes)], {"axis": 1}, num_outputs=len(cut))
        graph.insert_before(start, node)
        parts = list(node.outputs)
    for old, new in zip(cut, parts, strict=True):
        if len(dimensions := _sizes(old)) != 1:
            new = _added(graph, "Reshape", [new, _constant(graph, [-1, *dimensions])], before=start)
        if old.dtype != ir.DataType.FLOAT:
            new = _added(graph, "Cast", [new], {"to": int(old.dtype or ir.DataType.FLOAT)}, before=start)
        new.shape, new.type = old.shape, old.type
        for use in list(old.uses()):
            if id(use.node) not in inside:
                use.node.replace_input_with(use.idx, new)
    return value


def _added(
    graph: ir.Graph, kind: str, inputs: Sequence[ir.Value], attributes: dict[str, int] | None = None, before: ir.Node | None = None
) -> ir.Value:
    node = ir.node(kind, inputs, attributes or {})
    node.outputs[0].type = ir.TensorType(ir.DataType(attributes["to"])) if attributes and "to" in attributes else inputs[0].type
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, sizes: Sequence[int]) -> ir.Value:
    name = f"{MODULATION}_sizes_{len(graph.initializers)}"
    value = ir.Value(
        name=name, const_value=ir.tensor(np.array(sizes, np.int64)), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sizes)])
    )
    graph.register_initializer(value)
    return value
