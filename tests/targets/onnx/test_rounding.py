"""How matrices come to few bits: bounds that hold for any weights, and what the operator computes by what was packed."""

from typing import Any

import numpy as np
import pytest
from few_bits import unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")

from elastic_targets.onnx import rounding
from elastic_targets.onnx.rounding import blocks, compensated, rows, slabs

BLOCKS = {4: 32, 8: 64}
KINDS = ("normal", "zeros", "alike", "outliers", "zeros between")


def matrix(rows: int, columns: int, seed: int, scale: float, kind: str) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    if kind == "zeros":
        values[:] = 0
    if kind == "alike":
        values[:] = values[0, 0]
    if kind == "outliers":
        values[:, seed % columns] *= 1000
    if kind == "zeros between":
        values[:, ::7] = 0
    return (values * scale).astype(np.float32)


matrices = st.builds(
    matrix,
    st.integers(1, 9),
    st.integers(1, 200) | st.sampled_from([32, 33, 64, 65]),
    st.integers(0, 2**31),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    st.sampled_from(KINDS),
)


def products(columns: int, seed: int, kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs (M, K) that go together more or less, and their gram matrices."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((40, columns)) @ (np.eye(columns) + draw.standard_normal((columns, columns)) / 4)
    if kind == "unseen":
        mixed[:] = 0
    if kind == "some unseen":
        mixed[:, ::3] = 0
    if kind == "one row":
        mixed = mixed[:1]
    inputs = mixed.astype(np.float32)
    return inputs, [inputs[:, each].T @ inputs[:, each] for each in slabs(columns, 32)]


@given(weights=matrices, bits=st.sampled_from([4, 8]))
def test_a_block_is_off_by_half_a_step_at_most_and_zero_stays_zero(weights: np.ndarray, bits: int) -> None:
    codes, scales, zeros = blocks(weights, bits, BLOCKS[bits])
    floats = unpacked(codes, scales, zeros, bits, weights.shape[1])
    steps = np.repeat(scales.reshape(len(weights), -1), BLOCKS[bits], axis=1)[:, : weights.shape[1]]
    assert (np.abs(floats - weights) <= steps * 1.001).all()  # half a step, and half of one for the zero point's own place
    assert (floats[weights == 0] == 0).all()


@given(weights=matrices)
def test_a_row_is_off_by_half_a_step_at_most(weights: np.ndarray) -> None:
    codes, scales = rows(weights)
    assert (np.abs(codes * scales[:, None] - weights) <= 0.5001 * scales[:, None]).all()
    assert np.abs(codes.astype(int)).max() <= 127


@settings(deadline=None)
@given(weights=matrices, bits=st.sampled_from([4, 8]), seen=st.sampled_from(["all", "unseen", "some unseen", "one row"]))
def test_compensated_products_are_off_by_no_more_than_the_nearest_ones(weights: np.ndarray, bits: int, seen: str) -> None:
    inputs, grams = products(weights.shape[1], weights.size, seen)
    made = [unpacked(*each, bits, weights.shape[1]) for each in (
        compensated(weights, grams, bits, BLOCKS[bits]), blocks(weights, bits, BLOCKS[bits]))]  # fmt: skip
    off, nearest = (np.square(inputs.astype(np.float64) @ (each.astype(np.float64) - weights).T).sum(axis=0) for each in made)
    size = np.square(inputs).sum() * np.square(weights.astype(np.float64)).sum(axis=1)
    assert (off <= nearest * 1.001 + 1e-10 * size).all()


def test_what_goes_together_is_made_up_for() -> None:
    """Inputs of few directions, as activations are: products are a third as far off, in a matrix with a tail of one column."""
    draw = np.random.default_rng(0)
    inputs = (draw.standard_normal((500, 20)) @ draw.standard_normal((20, 161))).astype(np.float32)
    weights = draw.standard_normal((50, 161)).astype(np.float32)
    fitted, nearest = (unpacked(*each, 4, 161) for each in (compensated(weights, [inputs.T @ inputs], 4, 32), blocks(weights, 4, 32)))
    assert np.abs(inputs @ (fitted - weights).T).mean() < 0.33 * np.abs(inputs @ (nearest - weights).T).mean()


def test_slabs_of_columns_are_fitted_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SLAB", 70)  # 64 of which are whole blocks
    weights = np.random.default_rng(0).standard_normal((6, 150)).astype(np.float32)
    inputs, grams = products(150, 1, "all")
    assert [(each.start, each.stop) for each in slabs(150, 32)] == [(0, 64), (64, 128), (128, 150)]
    whole = unpacked(*compensated(weights, grams, 4, 32), 4, 150)
    alone = unpacked(*compensated(weights[:, 64:128], [inputs[:, 64:128].T @ inputs[:, 64:128]], 4, 32), 4, 64)
    np.testing.assert_array_equal(whole[:, 64:128], alone)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_operator_multiplies_by_what_was_packed(bits: int, backend: str) -> None:
    onnx = pytest.importorskip("onnx", reason="the graph is made with onnx")
    library = pytest.importorskip(backend, reason="the backend that is asked")
    weights = matrix(48, 97, 3, 1.0, "outliers")  # 97: a tail of one column
    inputs, grams = products(97, 3, "all")
    packed = compensated(weights, grams, bits, BLOCKS[bits])
    held = [onnx.numpy_helper.from_array(array, name) for array, name in zip(packed, ("codes", "scales", "zeros"), strict=True)]
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "codes", "scales", "zeros"], ["y"], domain="com.microsoft", K=97, N=48, bits=bits, block_size=BLOCKS[bits]
    )
    ports = [onnx.helper.make_tensor_value_info(name, 1, [40, width]) for name, width in (("x", 97), ("y", 48))]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:], held)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    content = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    output = product(library, content, inputs)
    np.testing.assert_allclose(output, inputs @ unpacked(*packed, bits, 97).T, rtol=1e-4, atol=1e-3 * np.abs(output).max())


def product(library: Any, content: bytes, inputs: np.ndarray) -> np.ndarray:
    if library.__name__ == "onnxruntime":
        return np.asarray(library.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": inputs})[0])
    core = library.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return np.asarray(core.compile_model(core.read_model(content), "CPU", config)([inputs])[0])
