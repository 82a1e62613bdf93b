"""A denoiser in two files, from its graph to its pictures: nothing but where it is computed changes."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import onnx_ir as ir  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from elastic_export.triton import models  # noqa: E402
from elastic_runtime import Bundle, BundleError, ElasticPipeline, UsageError  # noqa: E402
from elastic_runtime.contract.artifacts import OnnxArtifact, TensorSpec  # noqa: E402
from elastic_runtime.contract.bundle import encode  # noqa: E402
from elastic_runtime.files.folder import writing  # noqa: E402
from elastic_runtime.sessions import ort  # noqa: E402
from elastic_runtime.sessions.apart import ApartSession  # noqa: E402
from elastic_runtime.sessions.opening import open_artifact  # noqa: E402
from elastic_targets.onnx.apart import split  # noqa: E402
from elastic_targets.onnx.evaluate import evaluator  # noqa: E402
from elastic_web.fitting import fitting  # noqa: E402

NAMES = {"fp32": "onnx/denoiser.rest.onnx", "int4w": "onnx/denoiser.int4w.rest.onnx"}


@pytest.fixture(scope="module")
def bundle(in_two: Path) -> Bundle:
    return Bundle.open(in_two)


def artifacts(bundle: Bundle, precision: str) -> tuple[OnnxArtifact, OnnxArtifact]:
    """The artifact in one file, and that in two."""
    whole, apart = (each for each in bundle.manifest.graphs["denoiser"].artifacts if each.precision == precision)
    assert isinstance(whole, OnnxArtifact)
    assert isinstance(apart, OnnxArtifact)
    return whole, apart


@pytest.mark.parametrize("precision", NAMES)
def test_it_is_proven_at_every_budget_and_is_no_larger(bundle: Bundle, precision: str) -> None:
    whole, apart = artifacts(bundle, precision)
    assert apart.path == NAMES[precision]
    assert apart.conditions
    assert [file.path for file in apart.files] == [apart.path, apart.conditions.path]
    assert apart.conditions.gone == ("timestep", "class_labels")
    assert len(apart.verified) == len(whole.verified) > 1
    assert all(row.passed for row in apart.verified)
    rest, own = apart.files
    assert rest.bytes + own.bytes < 1.15 * whole.files[0].bytes + 20_000
    assert own.bytes > 50_000  # its matrices are there


def test_one_of_few_bits_for_tensorrt_is_proven_too(bundle: Bundle) -> None:
    """It computes in float16, and the file of its own gives float32 all the same."""
    (apart,) = (each for each in bundle.manifest.graphs["denoiser"].artifacts if each.precision == "fp8")
    assert apart.conditions
    assert apart.verified
    assert all(row.passed for row in apart.verified)
    own = onnx.load(bundle.file(apart.conditions.path))
    assert {weight.data_type for weight in own.graph.initializer if len(weight.dims) == 2} == {onnx.TensorProto.FLOAT16}
    assert own.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("backend", ["ort", "openvino"])
@pytest.mark.parametrize("precision", NAMES)
def test_a_step_is_the_same_in_one_file_and_in_two(bundle: Bundle, precision: str, backend: str) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(backend, backend), reason="the backend")
    source = np.random.default_rng(0)
    feeds = {
        "sample": source.standard_normal((2, 1, 16, 16)).astype(np.float32), "timestep": np.array([0.3, 0.7], np.float32),
        "class_labels": np.array([3, 10]), "latent_ids": np.arange(2),
    }  # fmt: skip
    answers = []
    for artifact in artifacts(bundle, precision):
        with open_artifact(bundle, "denoiser", artifact, backend, threads=1) as session:
            assert isinstance(session, ApartSession) is (artifact.conditions is not None)
            answers.append(session.run(feeds)["prediction"])
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-6 if precision == "fp32" else 1e-4, rtol=0)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ab2"])
def test_a_picture_s_conditions_are_computed_before_its_second_step(bundle: Bundle, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = ApartSession._compute

    def counted(self: ApartSession, given: dict[str, np.ndarray], needed: set[bytes]) -> None:
        computed.append(len(given["timestep"]))
        compute(self, given, needed)

    monkeypatch.setattr(ApartSession, "_compute", counted)
    manifest = bundle.manifest
    denoiser = msgspec.structs.replace(manifest.graphs["denoiser"], artifacts=artifacts(bundle, "fp32")[1:])
    only = Bundle(bundle.folder, msgspec.structs.replace(manifest, graphs={"denoiser": denoiser}))
    words: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "latent", "sampler": sampler}
    with ElasticPipeline(bundle, {"denoiser": open_artifact(bundle, "denoiser", artifacts(bundle, "fp32")[0])}) as pipe:
        wanted = pipe([3, 8], seeds=[5, 6], **words).images
    with ElasticPipeline.from_pretrained(only, "ort") as pipe:
        both = pipe([3, 8], seeds=[5, 6], **words).images
        assert computed == [3]  # two pictures' classes, and none
        alone = pipe([8], seeds=[6], **words).images
    np.testing.assert_allclose(both, wanted, atol=1e-5)
    np.testing.assert_allclose(both[1:], alone, atol=1e-6)


def test_it_may_be_exported_again_over_itself(bundle: Bundle, digits: Path, tmp_path: Path) -> None:
    """Its files get other names, since theirs are taken, and so does what the artifact says of them."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "b"))
    with writing(folder) as draft:
        assert draft.old
        denoiser, apart = draft.old.manifest.graphs["denoiser"], artifacts(draft.old, "fp32")[1]
        for file in apart.files:
            (draft.stage / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file.path, draft.stage / file.path)
        made = draft.commit(msgspec.structs.replace(draft.old.manifest, graphs={"denoiser": denoiser}))
    again = artifacts(made, "fp32")[1]
    assert again.conditions
    assert again.path != apart.path
    assert again.conditions.path in [file.path for file in again.files]
    open_artifact(made, "denoiser", again).close()


def test_a_damaged_file_is_told_when_it_is_opened(bundle: Bundle, tmp_path: Path) -> None:
    apart = artifacts(bundle, "fp32")[1]
    assert apart.conditions
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "b"))
    file = folder / apart.conditions.path
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(BundleError, match="cannot open"):
        open_artifact(Bundle.open(folder), "denoiser", apart)


def test_memory_is_held_back_by_the_size_of_a_half(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = artifacts(bundle, "fp32")[1]
    sizes = [file.bytes for file in apart.files]
    for large, arenas in ((max(sizes) + 1, [True, True]), (max(sizes), [False, True]), (min(sizes), [False, False])):
        monkeypatch.setattr(ort, "LARGE", large)
        with open_artifact(bundle, "denoiser", apart, "ort", lanes=1) as session:
            assert isinstance(session, ApartSession)
            inner = [session._rest, session._conditions]
            assert [each._session.get_session_options().enable_cpu_mem_arena for each in inner] == arenas  # type: ignore[union-attr]


def test_what_takes_one_file_takes_the_other_artifact(bundle: Bundle) -> None:
    assert fitting(bundle, ("fp32",))["denoiser"].conditions is None
    made, left = models(bundle)
    assert len(made) == 2
    assert all("two files" in why for why in left)


def test_a_large_one_is_proven_in_parts(bundle: Bundle) -> None:
    graph, apart = bundle.manifest.graphs["denoiser"], artifacts(bundle, "fp32")[1]
    session = evaluator(bundle, graph, apart)
    assert isinstance(session, ApartSession)
    with session:
        answer = session.run(
            {"sample": np.ones((1, 1, 16, 16), np.float32), "timestep": np.ones(1, np.float32), "class_labels": np.zeros(1, np.int64)}
            | {"latent_ids": np.arange(1)}
        )
    assert np.isfinite(answer["prediction"]).all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"path": "onnx/denoiser.rest.onnx"}, "has its conditions in onnx/denoiser.rest.onnx, which is no other one of its files"),
        ({"path": "onnx/other.onnx"}, "has its conditions in onnx/other.onnx, which is no other one of its files"),
        ({"inputs": ("timestep",)}, "takes timestep, of which timestep, class_labels are gone, not of the graph's"),
        ({"inputs": ("latent_ids", "timestep", "class_labels")}, "not of the graph's"),
        ({"outputs": ()}, "gives nothing, not rows"),
        ({"outputs": (TensorSpec(name="sample", dtype="float32", shape=("B", 4)),)}, "under names of their own"),
        ({"outputs": (TensorSpec(name="rows", dtype="float32", shape=("B", 0)),)}, "not rows"),
    ],
)
def test_a_manifest_that_does_not_agree_is_refused(bundle: Bundle, changes: dict[str, Any], why: str) -> None:
    apart = artifacts(bundle, "fp32")[1]
    wrong = msgspec.structs.replace(apart, conditions=msgspec.structs.replace(apart.conditions, **changes))
    denoiser = msgspec.structs.replace(bundle.manifest.graphs["denoiser"], artifacts=(wrong,))
    with pytest.raises(BundleError, match=why):
        encode(msgspec.structs.replace(bundle.manifest, graphs={"denoiser": denoiser}))


def graph_of(*nodes: Any, **constants: Any) -> Any:
    """A model of a sample (B, 4), its time and what the nodes give as `prediction`."""
    values = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("sample", ["B", 4]), ("timestep", ["B"]))]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", values, [onnx.helper.make_tensor_value_info("prediction", 1, ["B", 4])], held)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10))


INPUTS = (TensorSpec(name="sample", dtype="float32", shape=("B", 4)), TensorSpec(name="timestep", dtype="float32", shape=("B",)))


def test_a_model_without_weights_for_its_conditions_is_refused() -> None:
    nodes = [
        onnx.helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        onnx.helper.make_node("Mul", ["sample", "column"], ["prediction"]),
    ]
    with pytest.raises(UsageError, match="has no weights for its conditions alone: leave --conditions-apart out"):
        split(graph_of(*nodes, one=np.array([1])), INPUTS, "onnx/c.onnx")


def test_a_row_of_one_value_is_cut_too_and_a_name_that_is_taken_is_not_taken_again() -> None:
    nodes = [
        onnx.helper.make_node("Mul", ["timestep", "thousand"], ["modulation"]),
        onnx.helper.make_node("Unsqueeze", ["modulation", "one"], ["column"]),
        onnx.helper.make_node("MatMul", ["column", "weights"], ["shift"]),
        onnx.helper.make_node("Unsqueeze", ["modulation", "one"], ["factor"]),
        onnx.helper.make_node("Mul", ["sample", "factor"], ["scaled"]),
        onnx.helper.make_node("Add", ["scaled", "shift"], ["prediction"]),
    ]
    constants = {"one": np.array([1]), "weights": np.ones((1, 4), np.float32), "thousand": np.float32(1000)}
    model = graph_of(*nodes, **constants)
    shapes = {"modulation": ["B"], "column": ["B", 1], "factor": ["B", 1]}
    for value in (value for node in model.graph for value in node.outputs):
        value.shape, value.dtype = ir.Shape(shapes.get(value.name, ["B", 4])), model.graph.inputs[0].dtype
    rest, conditions, apart = split(model, INPUTS, "onnx/c.onnx")
    assert apart.outputs[0].name == "modulation_"
    feeds = {"sample": np.ones((2, 4), np.float32), "timestep": np.array([1, 2], np.float32)}
    whole, halves = graph_of(*nodes, **constants), (ir.to_proto(each).SerializeToString() for each in (conditions, rest))
    (wanted,) = onnxruntime.InferenceSession(ir.to_proto(whole).SerializeToString()).run(None, feeds)
    first, second = map(onnxruntime.InferenceSession, halves)
    (rows,) = first.run(None, {"timestep": feeds["timestep"]})
    (prediction,) = second.run(None, {"sample": feeds["sample"], "modulation_": rows})
    np.testing.assert_array_equal(prediction, wanted)


def test_what_the_rest_needs_itself_stays_its_input() -> None:
    """The time is multiplied by weights, and scales the sample besides."""
    nodes = [
        onnx.helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        onnx.helper.make_node("MatMul", ["column", "weights"], ["shift"]),
        onnx.helper.make_node("Unsqueeze", ["timestep", "one"], ["factor"]),
        onnx.helper.make_node("Mul", ["sample", "factor"], ["scaled"]),
        onnx.helper.make_node("Add", ["scaled", "shift"], ["prediction"]),
    ]
    model = graph_of(*nodes, one=np.array([1]), weights=np.ones((1, 4), np.float32))
    for value in (value for node in model.graph for value in node.outputs):
        value.shape, value.dtype = model.graph.inputs[0].shape, model.graph.inputs[0].dtype
    rest, conditions, apart = split(model, INPUTS, "onnx/c.onnx")
    assert (apart.inputs, apart.gone) == (("timestep",), ())
    assert [value.name for value in rest.graph.inputs] == ["sample", "timestep", "modulation"]
    assert [node.op_type for node in conditions.graph][:2] == ["Unsqueeze", "MatMul"]


def test_weights_that_come_from_few_bits_are_weights() -> None:
    """In a graph for TensorRT a matrix is a node's answer, which depends on nothing."""
    nodes = [
        onnx.helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["weights"]),
        onnx.helper.make_node("MatMul", ["column", "weights"], ["shift"]),
        onnx.helper.make_node("Add", ["sample", "shift"], ["prediction"]),
    ]
    model = graph_of(*nodes, one=np.array([1]), codes=np.ones((1, 4), np.int8), scale=np.float32(0.5))
    for value in (value for node in model.graph for value in node.outputs):
        value.shape, value.dtype = model.graph.inputs[0].shape, model.graph.inputs[0].dtype
    rest, conditions, apart = split(model, INPUTS, "onnx/c.onnx")
    assert apart.gone == ("timestep",)
    assert [node.op_type for node in conditions.graph][:3] == ["Unsqueeze", "DequantizeLinear", "MatMul"]
    assert not rest.graph.initializers.keys() & {"codes", "scale"}
