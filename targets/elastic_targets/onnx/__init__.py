"""ONNX: one file with its axes open, for ONNX Runtime, OpenVINO and as the way into TensorRT.

Opset 23 keeps attention as one `Attention` node, which ONNX Runtime fuses; opset 20 spells it out, which TensorRT needs in float32.
"""

from elastic_targets.onnx.lower import TARGET, OnnxOptions

__all__ = ["OnnxOptions", "TARGET"]
