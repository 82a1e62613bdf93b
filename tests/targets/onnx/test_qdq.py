"""Q/DQ in the graph: that it means what it should, that its scales are what a graph reaches, and what is refused."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="small floats need ml_dtypes")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import elastic_export  # noqa: E402
from elastic_runtime import Budget, Bundle, ModelError, Span, UsageError  # noqa: E402
from elastic_runtime.contract.artifacts import Graph, OnnxArtifact, TensorSpec  # noqa: E402
from elastic_runtime.contract.precision import PRECISIONS  # noqa: E402
from elastic_runtime.contract.reference import unpack  # noqa: E402
from elastic_targets import feeds  # noqa: E402
from elastic_targets.capture import GraphCapture  # noqa: E402
from elastic_targets.onnx import OnnxOptions, calibrate, lower, qdq  # noqa: E402
from elastic_targets.onnx.evaluate import PartSession  # noqa: E402
from elastic_targets.onnx.float4 import spelled_out  # noqa: E402
from elastic_targets.onnx.matrices import chosen  # noqa: E402
from elastic_targets.onnx.qdq import FORMS  # noqa: E402

# What a step of the golden model is off by, with room.
BOUNDS = {"int8qdq": 0.04, "fp8": 0.08, "int4qdq": 0.15, "nvfp4": 0.2}


def of(bundle: Bundle, precision: str) -> OnnxArtifact:
    (artifact,) = (each for each in bundle.manifest.graphs["denoiser"].artifacts if each.precision == precision)
    assert isinstance(artifact, OnnxArtifact)
    return artifact


@pytest.mark.parametrize("precision", FORMS)
def test_every_precision_is_proven_and_is_rounded(rounded: Bundle, precision: str) -> None:
    artifact = of(rounded, precision)
    assert [row.budget for row in artifact.verified] == [{"latents": 4}, {"latents": 64}]
    assert all(row.passed and row.tolerance == PRECISIONS[precision].tolerance for row in artifact.verified)
    assert all("onnxruntime" in row.where for row in artifact.verified)
    _, outputs = unpack("denoiser", rounded.reference())
    for row in artifact.verified:
        size = max(1.0, float(np.abs(outputs[Budget(**row.budget)]["prediction"]).max()))
        assert 1e-3 * size < row.max_abs < BOUNDS[precision] * size


@pytest.mark.parametrize("precision", FORMS)
def test_tokens_pass_codes_conditions_int8_and_the_ends_floats(rounded: Bundle, precision: str) -> None:
    model, form = onnx.load(str(rounded.file(of(rounded, precision).path))), FORMS[precision]
    held = {each.name: each for each in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    kinds: Counter[Any] = Counter()
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            weights = made.get(node.input[1])
            codes = held[weights.input[0]].data_type if weights is not None and weights.input[0] in held else None
            source = made.get(node.input[0])
            kinds[node.op_type, codes, source is not None and source.op_type == "DequantizeLinear"] += 1
    flat = precision == "nvfp4"  # whose operator takes windows as rows
    tokens = {key: count for key, count in kinds.items() if key[:2] == ("MatMul", int(form.codes))}
    assert sum(tokens.values()) >= 4
    assert flat or all(key[2] == form.activations for key in tokens)
    assert kinds["Gemm", TensorProto.INT8, False] >= 4
    floats = [held[node.input[1]] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in held]
    assert all(each.data_type == TensorProto.FLOAT16 for each in floats)
    assert len([each for each in floats if each.dims[0] % (form.block or 1) == 0]) <= 1, "the last layer; the first is a convolution"
    assert {spec.type.tensor_type.elem_type for spec in model.graph.output} == {TensorProto.FLOAT}


def graph_of(*nodes: Any, inputs: dict[str, list[Any]], **constants: np.ndarray) -> ir.Model:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in inputs.items()]
    held = [ir.to_proto(ir.Tensor(array, name=name)) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", values, [onnx.ValueInfoProto(name="y")], held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=11))


def chain(rows: int = 64) -> ir.Model:
    """A product between others, which keep their floats."""
    square = (np.random.default_rng(0).standard_normal((rows, 64)) / 8).astype(np.float16)
    nodes = [
        helper.make_node("Relu", ["x"], ["read"]),
        helper.make_node("MatMul", ["read", "a"], ["one"]),
        helper.make_node("Relu", ["one"], ["y"]),
    ]
    return graph_of(*nodes, inputs={"x": ["m", rows]}, a=square)


def ran(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    (answer,) = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings).run(None, feeds)
    assert isinstance(answer, np.ndarray)
    return answer


@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize("ratio", [1.0, 0.5, 16.0])
def test_a_scale_is_right_where_the_error_is_least(precision: str, ratio: float) -> None:
    """Half the scale cuts off what is large, sixteen times the scale leaves int8 four bits."""
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float16)
    plain, model = chain(), chain()
    (name,) = qdq.activations(model, precision) or [""]
    qdq.insert(model, precision, {name: ratio * float(x.max())})
    wanted, output = ran(plain, x=x), ran(spelled_out(model), x=x)
    error = np.sqrt(np.mean((output - wanted).astype(np.float32) ** 2) / np.mean(wanted.astype(np.float32) ** 2))
    bound = {"int8qdq": 0.012, "fp8": 0.05, "int4qdq": 0.12, "nvfp4": 0.18}[precision]
    worse = (ratio == 0.5 and FORMS[precision].activations) or (ratio == 16 and precision == "int8qdq")
    assert (error > bound) == worse, error


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision", FORMS)
def test_codes_stand_for_the_weights_in_the_graph_s_own_order(precision: str, transposed: bool) -> None:
    form, weights = FORMS[precision], np.random.default_rng(0).standard_normal((48, 128)).astype(np.float16)
    weights[7] = 0
    weights[9] *= 1e-5  # a scale that float16 has no normal number for
    if form.block is None:
        codes, scales = qdq.channels(weights, form)
        own = scales.astype(np.float32)[:, None]
    else:
        codes, scales, *whole = (qdq.doubled if form.codes == ir.DataType.FLOAT4E2M1 else qdq.blocks)(weights, form)
        own = np.repeat(scales.astype(np.float32) * (whole[0] if whole else 1), form.block, axis=1)
    wide = np.abs(weights.astype(np.float32))
    bound = {"int8qdq": 0.5 * own, "int4qdq": 0.5 * own, "fp8": np.maximum(wide / 16, own / 1024), "nvfp4": own + 4e-5}[precision]
    assert (np.abs(codes.astype(np.float32) * own - weights.astype(np.float32)) <= 1.01 * bound).all()
    assert (codes[7].astype(np.float32) == 0).all()
    order = weights if transposed else weights.T
    node = helper.make_node("Gemm" if transposed else "MatMul", ["read", "a"], ["one"], **({"transB": 1} if transposed else {}))
    nodes = [helper.make_node("Relu", ["x"], ["read"]), node, helper.make_node("Relu", ["one"], ["y"])]
    model = graph_of(*nodes, inputs={"x": ["m", 128]}, a=np.ascontiguousarray(order))
    assert [matrix.condition for matrix in chosen(model)] == [transposed]
    qdq.insert(model, precision, {"read": 1.0})
    output = ran(spelled_out(model), x=np.eye(128, dtype=np.float16))
    assert np.abs(output - np.maximum(weights.T, 0)).max() <= {"int8qdq": 0.03, "fp8": 0.2, "int4qdq": 0.3, "nvfp4": 0.7}[precision]


def test_float4_is_what_the_type_is_block_by_block() -> None:
    """Against the type itself; a block of zeros and one of next to nothing stay so."""
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 64)).astype(np.float16)
    x[0, 0, 0] = 0
    x[0, 0, 1, :16] = 1e-7
    eye = np.eye(64, dtype=np.float16)
    nodes = [helper.make_node(kind, *ports) for kind, ports in (
        ("Neg", (["x"], ["read"])), ("MatMul", (["read", "a"], ["one"])), ("Neg", (["one"], ["y"])),
    )]  # fmt: skip
    model = graph_of(*nodes, inputs={"x": ["b", "g", "p", 64]}, a=eye)
    qdq.insert(model, "nvfp4", {"read": float(np.abs(x).max())})
    output = ran(spelled_out(model), x=x)
    whole = np.float32(np.abs(x).max()) / 6 / 448
    wide = x.astype(np.float32).reshape(-1, 16)
    scale = (np.abs(wide).max(1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    scale = scale.astype(np.float16).astype(np.float32)[:, None]
    wanted = np.clip(wide / np.maximum(scale, 1e-30), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_allclose(output, wanted.reshape(x.shape), atol=2e-3)


def looped() -> tuple[GraphCapture, ir.Model]:
    """A graph that doubles its input in each of three passes, and multiplies within."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["held", "held"], ["twice"]),
            helper.make_node("MatMul", ["twice", "a"], ["product"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("pass", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held", TensorProto.FLOAT, ["B", 32]),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["B", 32])],
    )
    nodes = [helper.make_node("Loop", ["passes", "true", "sample"], ["last"], body=body), helper.make_node("Neg", ["last"], ["prediction"])]
    held = [
        numpy_helper.from_array(np.array(3), "passes"), numpy_helper.from_array(np.array(True), "true"),
        numpy_helper.from_array(np.eye(32, dtype=np.float32), "a"),
    ]  # fmt: skip
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 32])] for name in ("sample", "prediction")]
    made = helper.make_graph(nodes, "g", *ports, held)
    specs = [(TensorSpec(name=name, dtype="float32", shape=("B", 32)),) for name in ("sample", "prediction")]
    graph = GraphCapture(
        "denoiser", None, *specs, axes=(), batch=Span(1, 2), feeds=lambda budget, size: {"sample": np.ones((size, 32), "f")}
    )
    return graph, ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_the_largest_of_every_pass_and_feed_is_taken_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, model = looped()
    seen: list[float] = []
    several = PartSession.several

    def spied(session: PartSession, runs: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        seen.extend(float(np.abs(each["sample"]).max()) for each in runs)
        return several(session, runs)

    monkeypatch.setattr(PartSession, "several", spied)
    progress: list[tuple[str, int, int]] = []
    maxima = calibrate.largest(graph, model, ["sample", "twice"], lambda *words: progress.append(words))
    assert maxima == {"sample": pytest.approx(max(seen)), "twice": pytest.approx(8 * max(seen))}
    assert len(seen) == feeds.FEEDS // 2
    assert progress == [("calibrating", done, len(seen)) for done in range(1, len(seen) + 1)]
    assert calibrate.largest(graph, model, ["sample", "twice"]) == maxima
    assert [value.name for value in model.graph.outputs] == ["prediction"], "what was asked about is as it was"


def test_a_value_that_is_not_finite_is_refused_and_not_left_out() -> None:
    graph, model = looped()
    model.graph.initializers["a"].const_value = ir.tensor(np.full((32, 32), np.nan, np.float32))
    with pytest.raises(ModelError, match="product of the denoiser is not finite in the floats that it is held in"):
        calibrate.largest(graph, model, ["sample", "product"])


def test_times_go_all_along_the_schedule_and_samples_from_noise_to_levels() -> None:
    graph, _ = looped()
    own_feeds = {"sample": np.zeros((2, 3, 8, 8), np.float32), "timestep": np.zeros(2, np.float32), "class_labels": np.arange(2)}
    for unit, own in ((1.0, 0.5), (1000.0, 500.0)):
        made = GraphCapture(**{**graph.__dict__, "feeds": lambda budget, size: own_feeds | {"timestep": np.full(size, own, np.float32)}})  # noqa: B023
        given = list(feeds.feeds(made, Budget()))
        times = np.concatenate([each["timestep"] for each in given]) / unit
        assert (times.min(), times.max()) == pytest.approx((0.02, 0.98), abs=1e-3)
        spreads = [float(np.std(sample, axis=(1, 2)).mean()) for each in given for sample in each["sample"]]
        assert min(spreads) == 0, "plain levels"
        assert max(spreads) > 0.9, "plain noise"
    ids = {"inputs": (TensorSpec(name="input_ids", dtype="int64", shape=("B", 4)),)}
    text = GraphCapture(**graph.__dict__ | ids | {"feeds": lambda budget, size: {"input_ids": np.zeros((size, 4), np.int64)}})
    assert len(list(feeds.feeds(text, Budget()))) == 1, "nothing of it changes"


def test_what_was_rounded_is_held_to_float16_s_own_tolerance_before(rounded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that the export holds to it is the one that was rounded, in its own precision."""
    graph, base = looped()
    described = Graph(inputs=graph.inputs, outputs=graph.outputs, dimensions=graph.dimensions, artifacts=())
    monkeypatch.setattr(lower, "_floats", lambda _, precision, opset: base)
    pair = lower.unrounded(graph, described, OnnxOptions(precision="fp8"))
    assert pair is not None
    session, precision = pair
    assert precision == "fp16"
    assert session.run({"sample": np.ones((1, 32), np.float32)})["prediction"].min() == -8
    described = rounded.manifest.graphs["denoiser"]
    assert described.tolerance(precision="fp16") == PRECISIONS["fp16"].tolerance < described.tolerance(of(rounded, "fp8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4qdq", "opset": 20}, "--precision int4qdq needs --opset 23, got 20, .* it has those of int8qdq, fp8"),
        ({"precision": "nvfp4", "opset": 20}, "--precision nvfp4 needs --opset 23, got 20"),
        ({"precision": "fp4"}, re.escape("must be one of fp32, fp16, bf16, int8, int8w, int4w, int8qdq, fp8, int4qdq, nvfp4, got fp4")),
    ],
)
def test_what_there_is_not_is_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        elastic_export.export("elit-mnist", output=tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_keeps_float16() -> None:
    assert {graph: OnnxOptions(precision="fp8").of(graph) for graph in ("denoiser", "decoder", "encoder", "text_encoder")} == {
        "denoiser": "fp8", "decoder": "fp16", "encoder": "fp16", "text_encoder": "fp8",
    }  # fmt: skip
