"""What a graph in bf16 means, in operators that ONNX Runtime's processor kernels have: this is what proves such a graph on any machine.

Each operator computes in float32 of values in bfloat16, and what it gives is rounded to bfloat16: as processors and GPUs multiply it.
"""

import onnx_ir as ir

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
            graph.insert_before(node, [wide := _cast(node, f"in.{position}", value, FLOAT)])
            node.replace_input_with(position, wide.outputs[0])
    for position, value in enumerate(node.outputs):
        if value.dtype == BFLOAT16:
            name, value.name = value.name, f"{value.name}.wide"
            value.type = ir.TensorType(FLOAT)
            graph.insert_after(node, [rounded := _cast(node, f"out.{position}", value, BFLOAT16)])
            rounded.outputs[0].name = name
            value.replace_all_uses_with(rounded.outputs[0], replace_graph_outputs=True)
            rounded.replace_input_with(0, value)


def _cast(node: ir.Node, place: str, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": dtype.value}, name=f"{node.name or node.outputs[0].name}.{place}")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = f"{cast.name}.value", value.shape, ir.TensorType(dtype)
    return cast
