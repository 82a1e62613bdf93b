"""Attention that splits heads itself: the copies around it go, the numbers stay, and what only looks alike is left."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="it rewrites ONNX graphs")
onnxruntime = pytest.importorskip("onnxruntime", reason="it runs them")

import onnx_ir as ir  # noqa: E402

from elastic_targets.onnx.attention import unsplit  # noqa: E402

HEADS, WIDTH, TOKENS = 2, 4, 3


def graph(back: str = "same", swapped: bool = False) -> ir.Model:
    """Attention of heads that are split from (B, N, H*d); of windows (B, G, N, H*d) where `back` is `windows`."""
    shape: list[Any] = ["B", 5, TOKENS, HEADS * WIDTH] if back == "windows" else ["B", TOKENS, HEADS * WIDTH]
    split: list[Any] = ["5*B" if back == "windows" else "B", TOKENS, HEADS, WIDTH]
    whole = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    nodes, initializers, parts = [], [], []

    def constant(name: str, sizes: list[int]) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(np.array(sizes), name=name), type=ir.TensorType(ir.DataType.INT64))
        initializers.append(value)
        return value

    for name in "qkv":
        scaled = ir.node("Mul", [whole, whole]) if name == "v" else ir.node("Neg" if name == "k" else "Relu", [whole])
        scaled.outputs[0].shape, scaled.outputs[0].type = whole.shape, whole.type
        reshape = ir.node("Reshape", [scaled.outputs[0], constant(f"{name}_sizes", [-1, TOKENS, HEADS, WIDTH])])
        reshape.outputs[0].shape, reshape.outputs[0].type = ir.Shape(split), whole.type
        turn = ir.node("Transpose", [reshape.outputs[0]], {"perm": [0, 2, 1, 3]})
        turn.outputs[0].shape, turn.outputs[0].type = ir.Shape([split[0], HEADS, TOKENS, WIDTH]), whole.type
        nodes += [scaled, reshape, turn]
        parts.append(turn.outputs[0])
    attention = ir.node("Attention", parts)
    attention.outputs[0].shape, attention.outputs[0].type = parts[0].shape, whole.type
    turned = ir.node("Transpose", [attention.outputs[0]], {"perm": [0, 3, 1, 2] if swapped else [0, 2, 1, 3]})
    turned.outputs[0].type = whole.type
    joined = ir.node("Reshape", [turned.outputs[0], constant("joined", [-1, *shape[1:]])])
    joined.outputs[0].name, joined.outputs[0].shape, joined.outputs[0].type = "y", ir.Shape(shape), whole.type
    nodes += [attention, turned, joined]
    made = ir.Graph([whole], joined.outputs, nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="g")
    return ir.Model(made, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {"x": x})[0]
    return output


@pytest.mark.parametrize(("back", "reshapes"), [("same", 0), ("windows", 4)])
def test_the_copies_go_and_the_numbers_stay(back: str, reshapes: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, TOKENS, 8) if back == "windows" else (2, TOKENS, 8)).astype(np.float32)
    before, model = run(graph(back), x), graph(back)
    assert unsplit(model) == 1
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["Attention"], counts["Transpose"], counts["Reshape"]) == (1, 0, reshapes)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-6, atol=1e-6)


def test_heads_that_are_joined_in_another_order_are_left() -> None:
    model = graph(swapped=True)
    before = [node.op_type for node in model.graph]
    assert unsplit(model) == 0
    assert [node.op_type for node in model.graph] == before
