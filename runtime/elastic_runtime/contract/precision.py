"""The table of precisions: how an artifact holds its weights and computes, and what follows from it. No other file
spells these.

Rows stand from the most to the least exact, which is their rank. A row with no targets is read and rated, and nothing
makes it yet; its tolerance is a first bound, until its target has measured one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Name = Literal["fp32", "fp16", "bf16", "int8w", "int8", "int8qdq", "fp8", "int4w", "int4qdq", "nvfp4"]
Compression = Literal["palette8", "int8", "palette6", "w8a8", "palette4", "int4"]

EXACT: Name = "fp32"  # the original's own
HALF: Name = "fp16"  # what GPUs are rated in
DECODER, ENCODER = "decoder", "encoder"
CONVOLVED = (DECODER, ENCODER)  # graphs of a VAE, which have no form of few bits
FLOAT32 = 4.0  # bytes, the unit of the manifest's counts


@dataclass(frozen=True)
class Precision:
    """One row.

    `weight_bytes`, `activation_bytes`: of a weight with its share of the scales, and of a value between two operators.
    `tolerance`: what a step of a correct lowering may miss the original by, in units of max(1, max |reference|).
    `pictured`: a step does not prove it, so whole pictures are measured against the original's.
    `rate`: the peak rate that its matrix products run at, as in `device.Peak.flops`; where a device lists none of that
    name it computes in `fallback`.
    `backends`, `targets`: what runs and what makes it today.
    `base`: what is held in that precision where it is not rounded to few bits.
    `by_batch`: whether activations are rounded by the largest value of a whole batch, so that rows of one run depend on each other.
    """

    name: Name
    weight_bytes: float
    activation_bytes: float
    tolerance: float
    pictured: bool
    rate: str
    fallback: Name | None
    backends: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    base: Name = EXACT
    by_batch: bool = False

    def peak(self, rates: Mapping[str, float]) -> float:
        """The rate (operations a second) that it computes at where a device has these."""
        row = self
        while row.rate not in rates and row.fallback:
            row = PRECISIONS[row.fallback]
        return rates[row.rate]


EVERY = ("trt", "ort", "openvino", "coreml")
# Weights by blocks of a row, as ONNX Runtime's MatMulNBits takes them: a scale of four bytes and a zero point for each 32
# weights of 4 bits, for each 64 of 8. In Q/DQ form a scale of two bytes for each 64 of 4 bits; in nvfp4 one of one byte for each 16.
INT4, INT8, INT4_QDQ, NVFP4 = 0.5 + 4.5 / 32, 1 + 5 / 64, 0.5 + 2 / 64, 0.5 + 1 / 16
_ROWS = (
    Precision("fp32", 4, 4, 1e-5, False, "fp32", None, EVERY, ("onnx", "trt", "coreml")),
    Precision("fp16", 2, 2, 2e-2, False, "fp16", "fp32", EVERY, ("onnx", "trt", "coreml")),
    # ONNX Runtime (found with 1.31) has no Gemm, Conv or Attention for it. Tensor cores give it the rate of fp16.
    Precision("bf16", 2, 2, 1e-1, False, "fp16", "fp32", ("trt", "openvino"), ("onnx", "trt")),
    # Weights alone: multiplied in float32 by ONNX Runtime, which unpacks them as it goes.
    Precision("int8w", INT8, 4, 3e-2, True, "fp32", None, ("ort", "openvino"), ("onnx",)),
    Precision("int8", 1, 4, 1e-1, True, "int8", "fp32", ("ort", "openvino"), ("onnx",), by_batch=True),
    # What TensorRT reads: Q/DQ in the graph over fp16. ONNX Runtime computes it as it is written, to prove it; it has no float4.
    Precision("int8qdq", 1, 2, 1e-1, True, "int8", "fp16", ("trt", "ort"), ("onnx", "trt"), base=HALF),
    Precision("fp8", 1, 2, 1e-1, True, "fp8", "fp16", ("trt", "ort"), ("onnx", "trt"), base=HALF),
    Precision("int4w", INT4, 4, 2.5e-1, True, "fp32", None, ("ort", "openvino"), ("onnx",)),
    Precision("int4qdq", INT4_QDQ, 2, 2.5e-1, True, "fp16", "fp32", ("trt", "ort"), ("onnx", "trt"), base=HALF),
    Precision("nvfp4", NVFP4, 2, 3.5e-1, True, "fp4", "fp8", ("trt",), ("onnx", "trt"), base=HALF),
)
PRECISIONS: dict[str, Precision] = {row.name: row for row in _ROWS}
RATES = tuple(dict.fromkeys(row.rate for row in _ROWS))
# Weights of a Core ML package that are stored in fewer bits than its precision says (w8a8: int8, and so is what they multiply), from the
# most to the least exact, each with the bound of a step: no fault of the lowering, but one that a broken lowering would miss.
COMPRESSIONS: dict[str, float] = {"palette8": 2e-2, "int8": 3e-2, "palette6": 6e-2, "w8a8": 1e-1, "palette4": 2.5e-1, "int4": 2.5e-1}


def held(precision: str, graph: str) -> str:
    """What a graph is held in where `precision` is asked for: those of convolutions keep its base."""
    row = PRECISIONS.get(precision)
    return row.base if row and row.pictured and graph in CONVOLVED else precision


def tolerance(precision: str, compression: str | None = None) -> float:
    """The bound that an artifact is held to, in units of max(1, max |reference|)."""
    return max(PRECISIONS[precision].tolerance, COMPRESSIONS[compression] if compression else 0.0)


def rank(precision: str, compression: str | None = None) -> tuple[int, int]:
    """How exact an artifact is: less is more exact."""
    return list(PRECISIONS).index(precision), [None, *COMPRESSIONS].index(compression)
