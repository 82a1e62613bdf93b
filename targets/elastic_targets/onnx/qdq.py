"""Matrices and activations in few bits by Q/DQ in the graph, over float16: the form that TensorRT reads.

A matrix that tokens pass is held as codes under `DequantizeLinear`; what is multiplied by it passes `QuantizeLinear` and
`DequantizeLinear` with one scale for the whole tensor, which `calibrate` measured. A matrix of conditions is held in int8, a scale a row
of outputs, and what it multiplies keeps its floats. Everything else (`matrices` tells what, and tables and convolutions) stays float16.

nvfp4 (NVIDIA's documentation of TensorRT, "Working with quantized types"): sixteen values share a scale in float8, and a tensor a scale of
those in float32. Of activations the former are found while the engine runs, by an operator of TensorRT's own parser; `float4` computes
what it means.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from elastic_targets.onnx.matrices import Matrix, chosen, cleared, constants, put

DOMAIN, DYNAMIC = "trt", "TRT_FP4DynamicQuantize"
CODES: Mapping[ir.DataType, tuple[np.dtype[np.generic], float]] = {  # and the largest that a scale maps to
    ir.DataType.INT8: (np.dtype(np.int8), 127),
    ir.DataType.INT4: (np.dtype(ml_dtypes.int4), 7),
    ir.DataType.FLOAT8E4M3FN: (np.dtype(ml_dtypes.float8_e4m3fn), 448),
    ir.DataType.FLOAT4E2M1: (np.dtype(ml_dtypes.float4_e2m1fn), 6),
}
FLOAT8 = ir.DataType.FLOAT8E4M3FN
NORMAL = 2.0**-14  # the least float16 of full accuracy: what stands for the scale of nothing but zeros


@dataclass(frozen=True)
class Form:
    """How a precision holds a matrix that tokens pass: the type of its codes, how many of a row of outputs share a scale (None: all), and
    whether what it multiplies is rounded to that type, too. `opset` is the first whose operators take it."""

    codes: ir.DataType
    block: int | None = None
    activations: bool = True
    opset: int = 20

    @property
    def largest(self) -> float:
        return CODES[self.codes][1]


FORMS = {
    "int8qdq": Form(ir.DataType.INT8),
    "fp8": Form(FLOAT8),
    "int4qdq": Form(ir.DataType.INT4, block=64, activations=False, opset=21),
    "nvfp4": Form(ir.DataType.FLOAT4E2M1, block=16, opset=23),
}
CONDITIONS = Form(ir.DataType.INT8, activations=False)


def rounded(model: ir.Model, precision: str) -> list[tuple[Matrix, Form]]:
    """The matrices of `model` (in float16, but for what stays exact) that `precision` rounds, and how; one whose rows do not divide into
    blocks keeps its floats."""
    forms = [(matrix, CONDITIONS if matrix.condition else FORMS[precision]) for matrix in chosen(model)]
    return [
        (matrix, form)
        for matrix, form in forms
        if matrix.value.dtype == ir.DataType.FLOAT16 and not (form.block and matrix.shape[1] % form.block)
    ]


def activations(model: ir.Model, precision: str) -> list[str]:
    """Names of the values that `precision` rounds by one scale each."""
    return list(dict.fromkeys(str(matrix.taken.name) for matrix, form in rounded(model, precision) if form.activations))


def insert(model: ir.Model, precision: str, largest: Mapping[str, float]) -> None:
    """Put the Q/DQ nodes of `precision` into `model`, in place; `largest` is what each of its `activations` reaches."""
    passed: dict[tuple[int, int], ir.Value] = {}
    for matrix, form in rounded(model, precision):
        node, value = matrix.node, matrix.taken
        if form.activations:
            place = (id(node.graph), id(value))
            if place not in passed:
                passed[place] = _activation(model, node, value, form, largest[str(value.name)])
            node.replace_input_with(0, passed[place])
        node.replace_input_with(1, _weights(model, matrix, form))
    cleared(model)


def channels(weights: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Round `weights` (N, K), a scale a row: codes (N, K), and scales (N,) float16."""
    wide = weights.astype(np.float32)
    scales = _half(np.abs(wide).max(axis=1) / form.largest)
    return _codes(wide / scales[:, None].astype(np.float32), form), scales


def blocks(weights: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Round `weights` (N, K), a scale a block of a row: codes (N, K), and scales (N, K / block) float16."""
    assert form.block
    wide = weights.astype(np.float32).reshape(len(weights), -1, form.block)
    scales = _half(np.abs(wide).max(axis=2) / form.largest)
    return _codes(wide / scales[..., None].astype(np.float32), form).reshape(weights.shape), scales


def doubled(weights: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round `weights` (N, K), a scale a block whose scales are rounded, too: codes (N, K), scales (N, K / block) float8, and the scale of
    those () float32."""
    assert form.block
    wide = weights.astype(np.float32).reshape(len(weights), -1, form.block)
    whole = np.float32(_whole(float(np.abs(wide).max())))
    scales = _codes(np.abs(wide).max(axis=2) / form.largest / whole, Form(FLOAT8))
    own = scales.astype(np.float32) * whole
    own[own == 0] = 1  # of a block of next to nothing, which becomes nothing
    return _codes(wide / own[..., None], form).reshape(weights.shape), scales, np.array(whole)


def _whole(largest: float) -> float:
    """The scale of scales: the largest block's takes the largest float8."""
    return (largest or 1.0) / CODES[ir.DataType.FLOAT4E2M1][1] / CODES[FLOAT8][1]


def _half(scales: np.ndarray) -> np.ndarray:
    """Scales in float16, in which the codes are then found: rounded up, so that nothing is cut off, and none of them zero."""
    half = scales.astype(np.float16)
    half = np.where(half < scales, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(half == 0, np.float16(NORMAL), half)


def _codes(steps: np.ndarray, form: Form) -> np.ndarray:
    kind, largest = CODES[form.codes]
    whole = form.codes in (ir.DataType.INT8, ir.DataType.INT4)
    return np.clip(np.rint(steps) if whole else steps, -largest, largest).astype(kind)


def _weights(model: ir.Model, matrix: Matrix, form: Form) -> ir.Value:
    """The matrix in the graph's own order, out of its codes."""
    (rows, columns), outputs = matrix.shape, 0 if matrix.transposed else 1
    inputs, name = 1 - outputs, f"{matrix.name}.{form.codes.name.lower()}"

    def turned(array: np.ndarray) -> np.ndarray:
        return array if array.ndim < 2 or matrix.transposed else array.T

    def size(*shape: int) -> tuple[int, ...]:
        return shape if matrix.transposed else shape[::-1]

    half, codes = ir.DataType.FLOAT16, ("codes", form.codes, size(rows, columns))
    if form.block is None:
        zeros = np.zeros(rows, CODES[form.codes][0])  # said, as ONNX Runtime 1.31 puts a scalar in their place
        described = (codes, ("scales", half, (rows,)), ("zeros", form.codes, (rows,)))
        taken = constants(model, name, lambda: [*(turned(each) for each in channels(matrix.read(), form)), zeros], described)
        return _before(matrix.node, "DequantizeLinear", taken, half, axis=outputs)
    small = size(rows, columns // form.block)
    if form.codes != ir.DataType.FLOAT4E2M1:
        taken = constants(model, name, lambda: [turned(each) for each in blocks(matrix.read(), form)], (codes, ("scales", half, small)))
        return _before(matrix.node, "DequantizeLinear", taken, half, axis=inputs, block_size=form.block)
    twice = (codes, ("scales", FLOAT8, small), ("scale", ir.DataType.FLOAT, ()))
    kept, scales, whole = constants(model, name, lambda: [turned(each) for each in doubled(matrix.read(), form)], twice)
    return _before(matrix.node, "DequantizeLinear", [kept, _scale(matrix.node, scales, whole)], half, axis=inputs, block_size=form.block)


def _activation(model: ir.Model, node: ir.Node, value: ir.Value, form: Form, largest: float) -> ir.Value:
    """`value` rounded, before `node`."""
    name, half = f"{value.name}.{form.codes.name.lower()}", ir.DataType.FLOAT16
    if form.codes == ir.DataType.FLOAT4E2M1:
        return _dynamic(model, node, value, form, name, largest)
    kind = CODES[form.codes][0]
    described = (("scale", half, ()), ("zero", form.codes, ()))
    taken = constants(model, name, lambda: [_half(np.array(largest / form.largest)), np.zeros((), kind)], described)
    return _before(node, "DequantizeLinear", [_before(node, "QuantizeLinear", [value, *taken], form.codes), *taken], half)


def _dynamic(model: ir.Model, node: ir.Node, value: ir.Value, form: Form, name: str, largest: float) -> ir.Value:
    """`value` rounded by TensorRT's own operator, which takes two dimensions or three."""
    model.graph.opset_imports[DOMAIN] = 1
    half, columns = ir.DataType.FLOAT16, Matrix(node, node.inputs[1], False, None).shape[1]  # type: ignore[arg-type]
    (whole,) = constants(model, name, lambda: [np.array(_whole(largest), np.float32)], (("scale", ir.DataType.FLOAT, ()),))
    flat, block = value.shape is not None and len(value.shape) in (2, 3), form.block
    assert block
    taken = value
    if not flat:
        (rows,) = constants(model, f"rows.{columns}", lambda: [np.array([-1, columns])], (("shape", ir.DataType.INT64, (2,)),))
        taken = _before(node, "Reshape", [value, rows], half)
    words = {"axis": -1, "block_size": block, "scale_type": int(FLOAT8)}
    codes, scales = put(node, DYNAMIC, [taken, whole], words, 2, DOMAIN)
    wide = _before(node, "DequantizeLinear", [codes, _scale(node, scales, whole)], half, axis=-1, block_size=block)
    if flat:
        return wide
    return _before(node, "Reshape", [wide, _before(node, "Shape", [value], ir.DataType.INT64)], half)


def _scale(node: ir.Node, scales: ir.Value, whole: ir.Value) -> ir.Value:
    """Scales out of float8, in float16."""
    wide = _before(node, "DequantizeLinear", [scales, whole], ir.DataType.FLOAT)
    return _before(node, "Cast", [wide], ir.DataType.FLOAT16, to=int(ir.DataType.FLOAT16))


def _before(node: ir.Node, kind: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
    (made,) = put(node, kind, inputs, attributes)
    made.type = ir.TensorType(dtype)
    return made
