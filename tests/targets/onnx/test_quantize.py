"""Matrices in few bits: how they are rounded, which of them, and that what multiplies by them multiplies by what was rounded."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import denoiser_graph, write_bundle
from few_bits import unpacked

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

from onnx import numpy_helper  # noqa: E402

import elastic_export  # noqa: E402
from elastic_runtime import Bundle, ElasticPipeline, Span, UsageError, VerificationError, open_session  # noqa: E402
from elastic_runtime.contract.precision import PRECISIONS  # noqa: E402
from elastic_targets.onnx import OnnxOptions, rounding, stream  # noqa: E402
from elastic_targets.onnx.evaluate import evaluator  # noqa: E402
from elastic_targets.onnx.quantize import DOMAIN, quantize  # noqa: E402


def exported(folder: Path, precision: str, name: str = "elit-mnist", **options: Any) -> Bundle:
    return elastic_export.export(name, output=folder / precision, precision=precision, batch="1-2", **options)


@pytest.fixture(scope="module", params=["int8w", "int8", "int4w"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("b"), request.param)


def model_of(bundle: Bundle) -> Any:
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    return onnx.load(str(bundle.file(artifact.path)))


def precision_of(bundle: Bundle) -> str:
    return str(bundle.manifest.graphs["denoiser"].artifacts[0].precision)


def test_every_budget_is_within_its_precision_and_much_smaller(bundle: Bundle) -> None:
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    assert len(artifact.verified) > 3
    assert all(row.passed and row.tolerance == PRECISIONS[artifact.precision].tolerance for row in artifact.verified)
    assert sum(file.bytes for file in artifact.files) < 0.4 * bundle.manifest.cost[0].weight_bytes


def test_the_first_and_last_layers_keep_floats_and_conditions_eight_bits(bundle: Bundle) -> None:
    model, precision = model_of(bundle), precision_of(bundle)
    held = {each.name for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) > 1}
    floats = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in held]
    assert len(floats) == 1  # the last layer; the first is a convolution
    bits = Counter(
        (node.op_type, next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 8))
        for node in model.graph.node
        if node.domain == DOMAIN
    )
    conditions = bits.pop(("MatMulNBits", 8)) if precision != "int8w" else 0
    kind = {"int8w": ("MatMulNBits", 8), "int8": ("DynamicQuantizeMatMul", 8), "int4w": ("MatMulNBits", 4)}[precision]
    assert set(bits) == {kind}
    assert conditions > 0 or precision == "int8w"


@pytest.mark.parametrize("bundle", ["int4w"], indirect=True)
def test_what_multiplies_by_weights_alone_multiplies_by_what_was_rounded(bundle: Bundle) -> None:
    """The artifact against the same graph with the matrices unpacked into floats: equal to float32's rounding."""
    model = model_of(bundle)
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "MatMulNBits"]:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        matrix = unpacked(*(held[name] for name in node.input[1:4]), attributes["bits"], attributes["K"])
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), f"{node.output[0]}.wide"))
        bias = node.input[5] if len(node.input) > 5 else ""
        product = f"{node.output[0]}.product" if bias else node.output[0]
        index = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        model.graph.node.insert(index, onnx.helper.make_node("MatMul", [node.input[0], f"{node.output[0]}.wide"], [product]))
        if bias:
            model.graph.node.insert(index + 1, onnx.helper.make_node("Add", [product, bias], [node.output[0]]))
    session, plain = onnxruntime.InferenceSession(model.SerializeToString()), model_of(bundle)
    for attribute in [attribute for node in plain.graph.node for attribute in node.attribute if attribute.name == "accuracy_level"]:
        attribute.i = 0  # conditions are rounded besides
    feeds = {
        "sample": np.random.default_rng(0).standard_normal((2, 1, 32, 32)).astype(np.float32),
        "timestep": np.array([0.3, 0.7], np.float32), "class_labels": np.array([3, 10]), "latent_ids": np.arange(4),
    }  # fmt: skip
    feeds["sample"] = (
        feeds["sample"].reshape(-1)[: 2 * int(np.prod(bundle.manifest.model.sample_shape))].reshape(2, *bundle.manifest.model.sample_shape)
    )
    (prediction,) = onnxruntime.InferenceSession(plain.SerializeToString()).run(None, feeds)
    (wanted,) = session.run(None, feeds)
    assert np.abs(prediction - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def test_every_backend_draws_the_same_picture(bundle: Bundle) -> None:
    pytest.importorskip("openvino", reason="the other backend")
    pictures = []
    for backend in ("ort", "openvino"):
        with ElasticPipeline.from_pretrained(bundle, backend, threads=1) as pipe:
            result = pipe(3, num_inference_steps=4, seeds=0, output_type="np")
            assert result.facts["precision"] == precision_of(bundle)
            pictures.append(result.images)
    assert 10 * np.log10(1 / np.mean((pictures[0] - pictures[1]) ** 2)) > (30 if precision_of(bundle) == "int8" else 40)


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_picture_is_the_same_alone_and_in_a_batch(backend: str, bundle: Bundle) -> None:
    """ONNX Runtime rounds activations by the largest value of a run; OpenVINO by that of each row."""
    pytest.importorskip({"ort": "onnxruntime"}.get(backend, backend), reason="the backend")
    words: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    with ElasticPipeline.from_pretrained(bundle, backend) as pipe:
        both = pipe([3, 8], seeds=[5, 6], **words).images
        alone = pipe([8], seeds=[6], **words).images
    np.testing.assert_allclose(both[1:], alone, atol=1e-6)


def test_products_of_bytes_do_not_overflow_where_the_processor_has_no_vnni(tmp_path: Path) -> None:
    """255 x 127 twice is more than 16 bits hold. All values are alike, so that nothing is rounded and the product is exact."""
    codes = numpy_helper.from_array(np.full((8, 8), 127, np.int8), "codes")
    scales = numpy_helper.from_array(np.full(8, 1 / 127, np.float32), "scales")
    kinds = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    ports = denoiser_graph()
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]
        for specs in (ports.inputs, ports.outputs)
    )
    node = onnx.helper.make_node("DynamicQuantizeMatMul", ["sample", "codes", "scales"], ["prediction"], domain="com.microsoft")
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "product", inputs, outputs, [codes, scales])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    bundle = write_bundle(tmp_path / "b", model.SerializeToString())
    ports = bundle.manifest.graphs["denoiser"]
    in_parts = evaluator(bundle, ports, ports.artifacts[0])  # which proves large ones
    assert in_parts is not None
    feeds = {"sample": np.ones((1, 4, 8, 8), np.float32), "timestep": np.zeros(1, np.float32)}
    feeds |= {"class_labels": np.zeros(1, np.int64), "latent_ids": np.arange(1)}
    with open_session(bundle, "denoiser", "ort", lanes=1) as whole, in_parts as parts:
        for session in (whole, parts):
            np.testing.assert_allclose(session.run(feeds)["prediction"], 8, atol=1e-5)


def test_a_loop_s_body_is_held_in_few_bits_too(tmp_path: Path) -> None:
    model = model_of(exported(tmp_path, "int8w", "elt-mnist", loops="1-2"))
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    kinds = Counter(node.op_type for node in loop.attribute[0].g.node)
    assert kinds["MatMulNBits"] > 4


def test_products_of_bytes_in_a_loop_s_body_do_not_overflow(tmp_path: Path) -> None:
    """There ONNX Runtime's exact kernels pass by: two products must fit into 16 bits, and a step is as near as outside of loops."""
    bundle = exported(tmp_path, "int8", "elt-mnist", loops="1-2")
    model, (artifact,) = model_of(bundle), bundle.manifest.graphs["denoiser"].artifacts
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    codes = [held[node.input[1]] for node in loop.attribute[0].g.node if node.op_type == "DynamicQuantizeMatMul"]
    assert len(codes) > 4
    assert {int(np.abs(each.astype(int)).max()) for each in codes} == {63}
    assert min(row.psnr_db for row in artifact.verified) > 50


def test_what_was_wrong_before_it_was_rounded_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of the last block that is lost is far within the tolerance of four bits, and is none of rounding."""
    whole = stream.stream

    def lossy(*arguments: Any) -> Any:
        model = whole(*arguments)
        biases = [value for name, value in model.graph.initializers.items() if name.endswith(".bias") and "final" not in name]
        bias = biases[-1]
        bias.const_value = stream.TorchTensor(torch.zeros(*bias.const_value.shape.numpy()), name=bias.name)  # type: ignore[attr-defined]
        return model

    monkeypatch.setattr("elastic_targets.onnx.lower.stream", lossy)
    with pytest.raises(VerificationError, match=r"denoiser before its weights were rounded fails at latents=\d+: max abs error"):
        exported(tmp_path, "int4w")


def test_a_wrong_rounding_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Low and high halves of a byte exchanged."""
    packed = rounding._packed
    monkeypatch.setattr(rounding, "_packed", lambda codes, bits: (lambda byte: (byte << 4) | (byte >> 4))(packed(codes, bits)))
    with pytest.raises(VerificationError, match=r"denoiser \(onnx/denoiser.int4w.onnx\) fails at"):
        exported(tmp_path, "int4w")


@pytest.mark.parametrize(
    ("text", "graphs"),
    [
        ("int4w", {"denoiser": "int4w", "text_encoder_2": "int4w", "text_fusion": "int4w", "decoder": "fp32"}),
        ("fp16", {"denoiser": "fp16", "text_encoder": "fp16", "decoder": "fp16"}),
        ("denoiser=int4w, text=int8w", {"denoiser": "int4w", "text_encoder": "int8w", "text_encoder_3": "int8w", "text_fusion": "fp32"}),
        ("text=int8w,text_encoder=fp16", {"denoiser": "fp32", "text_encoder": "fp16", "text_encoder_2": "int8w"}),
    ],
)
def test_a_precision_is_one_for_all_graphs_or_one_a_graph(text: str, graphs: dict[str, str]) -> None:
    assert {graph: OnnxOptions(precision=text).of(graph) for graph in graphs} == graphs


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int3w", "--precision for onnx must be one of fp32, fp16, bf16, int8, int8w, int4w, int8qdq, fp8, int4qdq, nvfp4, got int3w"),
        ("vae=fp16", "or one a graph, as in denoiser=int4w,text=int8w,decoder=fp16; got 'vae=fp16'"),
        ("denoiser=", "got 'denoiser'"),
        ("denoiser=int4w,fp16", "got 'fp16'"),
        ("denoiser=fp33", "or one a graph, as in .* got 'denoiser=fp33'"),
        ("denoiser=int8w,text=int8w", "--precision text=int8w is for a graph that this export has not; it has denoiser: leave it out"),
    ],
)
def test_a_precision_that_there_is_not_is_refused_by_name(precision: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message) if ".*" not in message else message):
        exported(tmp_path, precision)


def test_a_decoder_of_convolutions_keeps_its_floats(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the folders are diffusers'")
    with pytest.raises(UsageError, match="a decoder is made of convolutions, which keep their floats: its precision is one of fp32, fp16"):
        exported(tmp_path, "decoder=int4w", "ralu-digits")


def test_a_text_encoder_s_vocabulary_and_matrices_are_held_in_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the folders are diffusers'")
    transformers = pytest.importorskip("transformers", reason="the encoders are transformers'")
    import folders

    from elastic_export.foreign.folder import Folder
    from elastic_export.foreign.text_encoders import text_encoder
    from elastic_targets.onnx.lower import lower

    path = folders.write(tmp_path / "f", folders.flux(), text=True)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    transformers.T5EncoderModel(config).eval().save_pretrained(path / "text_encoder_2")
    graph = text_encoder(Folder.open(path), "text_encoder_2", 6, Span(1, 2))
    (artifact,) = lower(graph, OnnxOptions(precision="denoiser=int4w,text=int8w"), tmp_path)
    assert (artifact.precision, artifact.path) == ("int8w", "onnx/text_encoder_2.int8w.onnx")
    model = onnx.load(str(tmp_path / artifact.path))
    kinds = {each.name: (each.data_type, tuple(each.dims)) for each in model.graph.initializer}
    assert (onnx.TensorProto.INT8, (500, 64)) in kinds.values()
    assert (onnx.TensorProto.FLOAT, (500, 64)) not in kinds.values()
    assert Counter(node.op_type for node in model.graph.node)["MatMulNBits"] >= 12
    (output,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, graph.example())
    with torch.no_grad():
        (wanted,) = graph.module(**{name: torch.from_numpy(array) for name, array in graph.example().items()})
    assert 1e-5 < np.abs(output - wanted.numpy()).max() < PRECISIONS["int8w"].tolerance * max(1.0, wanted.abs().max().item())


def graph_of(*nodes: Any, **constants: np.ndarray) -> Any:
    """A model of one input `x` (1, 64) and what its nodes give as `y`."""
    import onnx_ir as ir

    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (("x", 1, ["m", 64]), ("ids", 7, ["n"]))]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", values, [onnx.ValueInfoProto(name="y")], held)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10))


def test_a_product_that_is_scaled_keeps_its_floats() -> None:
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "a"], ["first"]),
        onnx.helper.make_node("Relu", ["first"], ["middle"]),
        onnx.helper.make_node("Gemm", ["middle", "b", "c"], ["last"], alpha=2.0, beta=2.0),
        onnx.helper.make_node("Relu", ["last"], ["y"]),
    ]
    square = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = graph_of(*nodes, a=square, b=square, c=square[0])
    quantize(model, "int8w")
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu", "Gemm", "Relu"]


@pytest.mark.parametrize("precision", ["int8", "int8w"])
def test_a_table_that_is_multiplied_by_too_is_rounded_for_each(precision: str) -> None:
    """As a vocabulary is that a model both reads and writes; and once more in the other order."""
    import onnx_ir as ir

    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["taken"]),
        onnx.helper.make_node("Relu", ["taken"], ["read"]),
        onnx.helper.make_node("MatMul", ["read", "table"], ["one"]),
        onnx.helper.make_node("Relu", ["one"], ["middle"]),
        onnx.helper.make_node("Gemm", ["middle", "table"], ["other"], transB=1),
        onnx.helper.make_node("Add", ["other", "x"], ["sum"]),
        onnx.helper.make_node("Relu", ["sum"], ["y"]),
    ]
    table = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    feeds = {"x": table[:3], "ids": np.array([5, 1, 60])}
    plain, model = graph_of(*nodes, table=table), graph_of(*nodes, table=table)
    quantize(model, precision)
    assert {node.op_type for node in model.graph} >= {"MatMulNBits", "Gather", "Cast"}
    wanted, output = (onnxruntime.InferenceSession(ir.to_proto(each).SerializeToString()).run(None, feeds)[0] for each in (plain, model))
    assert np.abs(output - wanted).max() < 0.03 * np.abs(wanted).max()
