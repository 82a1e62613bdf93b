"""What a graph in nvfp4 means, in operators that ONNX Runtime has: it has none for float4, so this is what proves such a graph.

Codes of weights become the float16 matrices that they stand for. What TensorRT's own operator does to activations is spelled out: each
sixteen values are divided by a sixth of the largest, that scale having been rounded to float8, and rounded to the nearest float4, of two
that are as near to the one whose last bit is zero.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from elastic_targets.onnx.matrices import cleared, constants, put
from elastic_targets.onnx.qdq import CODES, DYNAMIC

FLOAT4 = ir.DataType.FLOAT4E2M1
LARGEST = CODES[FLOAT4][1]
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def spelled_out(model: ir.Model) -> ir.Model:
    """`model` without float4, changed in place."""
    for node in [node for node in model.graph.all_nodes() if node.op_type == DYNAMIC]:
        _activation(model, node)
    for node in [node for node in model.graph.all_nodes() if node.op_type == "DequantizeLinear"]:
        codes = node.inputs[0]
        if codes is not None and codes.const_value is not None and codes.const_value.dtype == FLOAT4:
            _weights(model, node, codes)
    cleared(model)
    return model


def _weights(model: ir.Model, node: ir.Node, codes: ir.Value) -> None:
    axis, block = node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()
    scales, whole = _sources(node.inputs[1])

    def read() -> list[np.ndarray]:
        own = (scales.const_value.numpy().astype(np.float32) * whole.const_value.numpy()).astype(np.float16)  # type: ignore[union-attr]
        wide = codes.const_value.numpy().astype(np.float32) * np.repeat(own.astype(np.float32), block, axis)  # type: ignore[union-attr]
        return [wide.astype(np.float16)]

    assert codes.const_value is not None
    (wide,) = constants(model, f"{codes.name}.wide", read, (("values", HALF, tuple(codes.const_value.shape.numpy())),))
    node.outputs[0].replace_all_uses_with(wide)
    _dropped(node)


def _activation(model: ir.Model, node: ir.Node) -> None:
    taken, whole = node.inputs
    (use,) = node.outputs[0].uses()
    block, last = node.attributes["block_size"].as_int(), use.node
    assert taken is not None
    assert whole is not None

    def held(name: str, value: object, kind: type) -> ir.Value:
        array: np.ndarray = np.array(value, kind)
        return constants(model, f"float4.{name}", lambda: [array], ((name, ir.DataType.from_numpy(array.dtype), array.shape),))[0]

    def then(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return put(node, kind, inputs, attributes)[0]

    shape = then("Shape", taken)
    sixteens = then("Concat", then("Shape", taken, end=-1), held("sixteens", [-1, block], np.int64), axis=0)
    wide = then("Reshape", then("Cast", taken, to=FLOAT), sixteens)
    most = then("ReduceMax", then("Abs", wide), held("last", [-1], np.int64), keepdims=1)
    zero = held("zero", 0, ml_dtypes.float8_e4m3fn)
    coded = then("QuantizeLinear", then("Div", most, held("largest", LARGEST, np.float32)), whole, zero)
    half = then("Cast", then("DequantizeLinear", coded, whole, zero), to=HALF)
    scale = then("Cast", half, to=FLOAT)
    steps = then("Div", wide, then("Max", scale, held("least", 1e-30, np.float32)))
    clipped = then("Clip", steps, held("low", -LARGEST, np.float32), held("high", LARGEST, np.float32))
    size = then("Abs", clipped)
    coarse = then("Where", then("Less", size, held("four", 4, np.float32)), held("one", 1, np.float32), held("two", 2, np.float32))
    step = then("Where", then("Less", size, held("two", 2, np.float32)), held("half", 0.5, np.float32), coarse)
    rounded = then("Mul", then("Round", then("Div", clipped, step)), step)
    made = then("Cast", then("Reshape", then("Mul", rounded, scale), shape), to=HALF)
    last.outputs[0].replace_all_uses_with(made)
    _dropped(last)


def _sources(scales: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Scales in float8 and the scale of those, of which `scales` were made."""
    cast: Any = scales.producer() if scales is not None else None
    codes, whole = cast.inputs[0].producer().inputs
    return codes, whole


def _dropped(node: ir.Node) -> None:
    """Remove a node of which nothing is taken, and what made what it alone took."""
    producers = [value.producer() for value in node.inputs if value is not None]
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)
    for producer in dict.fromkeys(each for each in producers if each is not None):
        alone = producer.graph is not None and not any(value.uses() for value in producer.outputs)
        if alone and producer.op_type in ("Cast", "DequantizeLinear", DYNAMIC):
            _dropped(producer)
