"""An exported graph is tidied as onnxscript's own passes do it."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
ort = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import onnx_ir as ir  # noqa: E402
from onnxscript import optimizer  # noqa: E402

from elastic_targets.onnx.optimize import optimize  # noqa: E402

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
graph (float[B, 8] x, float[4, 8] w) => (float[B, 4] y, float[B, 8] z)
<float[1] zero = {0}, float[1] one = {1}, int64[2] flat = {-1, 8}, int64[3] deep = {-1, 2, 4}, int64[1] axis = {0}>
{
  a = Add(x, zero)
  b = Mul(a, one)
  c = Reshape(b, deep)
  d = Reshape(c, flat)
  e = Transpose<perm = [1, 0]>(d)
  f = Transpose<perm = [1, 0]>(e)
  g = Cast<to = 11>(f)
  h = Cast<to = 1>(g)
  turned = Transpose<perm = [1, 0]>(w)
  y = MatMul(h, turned)
  two = Add(one, one)
  k = Unsqueeze(f, axis)
  l = Squeeze(k, axis)
  z = Mul(l, two)
}
"""


def nodes(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def answers(model: ir.Model) -> list[np.ndarray]:
    source = np.random.default_rng(0)
    feeds = {"x": source.standard_normal((3, 8), np.float32), "w": source.standard_normal((4, 8), np.float32)}
    outputs: list[np.ndarray] = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
    return outputs


def test_what_changes_nothing_goes_and_the_answers_stay() -> None:
    plain, tidied, theirs = (ir.from_proto(onnx.parser.parse_model(TEXT)) for _ in range(3))
    optimize(tidied)
    optimizer.optimize(theirs)
    assert nodes(tidied) == nodes(theirs)
    assert len(tidied.graph) <= len(plain.graph) - 4
    for one, other in zip(answers(tidied), answers(plain), strict=True):
        np.testing.assert_array_equal(one, other)
