"""`Attention` on tokens as they come: heads are split off and joined by the operator, not by copies around it.

torch exports attention with its heads as a dimension, (B, H, N, d), between a reshape and a transpose on every side. From opset 23 the
operator takes (B, N, H*d) too and knows the number of heads, so that four copies of all tokens go.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

WITH_HEADS = 23  # the first opset with the operator
HEADS = (0, 2, 1, 3)  # (B, N, H, d) <-> (B, H, N, d)


class Split(NamedTuple):
    """Tokens (..., H*d) that a reshape to `sizes` (B, N, H, d) and a transpose split into heads; `sizes` is None where B and N stay."""

    tokens: ir.Value
    heads: int
    sizes: tuple[int, ...] | None


def unsplit(model: ir.Model) -> int:
    """Rewrite in place each Attention whose inputs are split into heads by Reshape and Transpose, and whose output is joined so; return
    how many there were."""
    count = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("", "Attention") or len(node.outputs) != 1 or any(node.inputs[4:]):
            continue
        parts = [_split(value) for value in node.inputs[:3]]
        joins = _joins(node.outputs[0])
        if joins is None or None in parts:
            continue
        q, k, v = (_whole(model.graph, node, part) for part in parts if part)
        attributes = [ir.AttrInt64(name, part.heads) for name, part in zip(("q_num_heads", "kv_num_heads"), parts, strict=False) if part]
        fused = ir.Node("", "Attention", [q, k, v, *node.inputs[3:]], [*node.attributes.values(), *attributes], name=node.name)
        model.graph.insert_before(node, fused)
        output, (reshape, same) = fused.outputs[0], joins
        joined = reshape.outputs[0]
        if same:
            output.name, output.type, output.shape = joined.name, joined.type, joined.shape
            joined.replace_all_uses_with(output, replace_graph_outputs=True)
        else:
            output.type = joined.type
            reshape.replace_input_with(0, output)
        count += 1
    RemoveUnusedNodesPass()(model)
    return count


def _split(value: ir.Value | None) -> Split | None:
    """How a value (B, H, N, d) is made of tokens, or None where it is not."""
    transpose = value.producer() if value else None
    if transpose is None or transpose.op_type != "Transpose" or tuple(transpose.attributes["perm"].as_ints()) != HEADS:
        return None
    split = transpose.inputs[0]
    reshape = split.producer() if split else None
    if split is None or reshape is None or reshape.op_type != "Reshape":
        return None
    tokens = reshape.inputs[0]
    if tokens is None or tokens.shape is None or split.shape is None or len(split.shape) != 4:
        return None
    heads, width, features = split.shape[2], split.shape[3], tokens.shape[-1]
    if not (isinstance(heads, int) and isinstance(width, int) and heads * width == features):
        return None
    if len(tokens.shape) == 3 and tuple(tokens.shape[:2]) == tuple(split.shape[:2]):
        return Split(tokens, heads, None)
    sizes = _sizes(reshape)
    return Split(tokens, heads, sizes) if sizes else None


def _whole(graph: ir.Graph, before: ir.Node, split: Split) -> ir.Value:
    """The tokens as (B, N, H*d), reshaped without a copy where they are not."""
    if split.sizes is None:
        return split.tokens
    name = f"{split.tokens.name}_{before.name}_{len(graph)}"
    sizes = np.array([*split.sizes[:2], split.sizes[2] * split.sizes[3]], dtype=np.int64)
    shape = ir.Value(name=f"{name}_shape", const_value=ir.tensor(sizes), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3]))
    graph.register_initializer(shape)
    node = ir.Node("", "Reshape", [split.tokens, shape], name=name)
    node.outputs[0].type = split.tokens.type
    graph.insert_before(before, node)
    return node.outputs[0]


def _joins(value: ir.Value) -> tuple[ir.Node, bool] | None:
    """The Reshape that alone takes (B, H, N, d), transposed back, and whether it makes (B, N, H*d) of it; None where there is none."""
    shape = value.shape
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type or value.is_graph_output():
            return None
        node = uses[0].node
        if op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) != HEADS:
            return None
        value = node.outputs[0]
    if shape is None or value.shape is None:
        return None
    same = len(value.shape) == 3 and (value.shape[0], value.shape[1]) == (shape[0], shape[2])
    return (node, same) if same or _sizes(node) else None


def _sizes(reshape: ir.Node) -> tuple[int, ...] | None:
    """The sizes that a Reshape asks for, where they are known and none is taken from its input's own dimensions."""
    given = reshape.inputs[1]
    tensor = ir.convenience.get_const_tensor(given) if given else None
    sizes = tuple(int(size) for size in tensor.numpy()) if tensor is not None else ()
    return sizes if sizes and 0 not in sizes else None
