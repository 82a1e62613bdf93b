"""What a graph in bf16 means, in operators that ONNX Runtime's processor kernels have: this is what proves such a graph on any machine.

Each operator computes in float32 of values in bfloat16, and what it gives is rounded to bfloat16: as processors and GPUs multiply it.
"""

import onnx_ir as ir

from elastic_targets.onnx.matrices import put

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_CARRIERS = ("Cast", "Loop", "Scan", "If")  # they take any values, and compute nothing themselves


def spelled_out(model: ir.Model) -> ir.Model:
    """`model` with bfloat16 only where values are cast to it or from it, changed in place."""
    for node in list(model.graph.all_nodes()):
        if node.op_type not in _CARRIERS:
            _spell(node)
    return model


def _spell(node: ir.Node) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for position, value in enumerate(node.inputs):
        if value is not None and value.dtype == BFLOAT16:
            node.replace_input_with(position, put(node, "Cast", (value,), {"to": FLOAT})[0])
    for value in node.outputs:
        if value.dtype == BFLOAT16:
            name, value.name, value.type = value.name, f"{value.name}.wide", ir.TensorType(FLOAT)
            rounded = ir.node("Cast", [value], {"to": BFLOAT16}, name=f"{name}.rounded")
            rounded.outputs[0].name, rounded.outputs[0].shape, rounded.outputs[0].type = name, value.shape, ir.TensorType(BFLOAT16)
            graph.insert_after(node, [rounded])
            value.replace_all_uses_with(rounded.outputs[0], replace_graph_outputs=True)
            rounded.replace_input_with(0, value)
