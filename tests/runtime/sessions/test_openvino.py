"""OpenVINO on a graph written by hand, and on a golden checkpoint."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import answers_stay_with_their_thread, manifest, write_bundle, write_manifest
from tiny import tiny_bundle, tiny_feeds

from elastic_runtime import Budget, Bundle, BundleError, ElasticPipeline, InferenceError, MissingError, Span, UsageError, open_session
from elastic_runtime.contract.artifacts import Graph, OnnxArtifact, TensorSpec
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.precision import PRECISIONS
from elastic_runtime.sessions import openvino
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.lanes import Lanes

# Not importorskip: importing OpenVINO is the backend's affair.
pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="these tests run OpenVINO: pip install 'elastic-export[openvino]'")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graph answers `sample + length of latent_ids`."""
    return tiny_bundle(tmp_path_factory.mktemp("openvino") / "tiny", 20)


def test_every_size_runs_and_outputs_are_the_callers_own(tiny: Bundle) -> None:
    with open_session(tiny, name="openvino", threads=1) as session:
        results = []
        for batch, kept in ((1, 16), (3, 2), (1, 16)):
            given = tiny_feeds(batch, kept)
            results.append(session.run(given)["prediction"])
            np.testing.assert_allclose(results[-1], given["sample"] + kept, atol=1e-6)
        np.testing.assert_array_equal(results[0], results[2])
        assert session.where.startswith("openvino 20")
        assert session.where.endswith("CPU f32")
    with pytest.raises(InferenceError, match="closed"):
        session.run(tiny_feeds(1, 16))


def test_each_thread_gets_its_own_answer(tiny: Bundle) -> None:
    with open_session(tiny, name="openvino", threads=2) as session:
        given = [tiny_feeds(1 + k % 4, 1 + k) for k in range(8)]
        answers_stay_with_their_thread(lambda k: session.run(given[k])["prediction"], lambda k: given[k]["sample"] + 1 + k)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_closes_what_it_inherited(tiny: Bundle) -> None:
    """In a process of its own, which has no other threads to lose. Both write to one pipe: each line with one call."""
    program = """
import os, sys
from elastic_runtime import Bundle, open_session
session = open_session(Bundle.open(sys.argv[1]), name="openvino", threads=2)
child = os.fork()
session.close()
os.write(1, b"closed\\n")
if not child:
    sys.exit()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tiny.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["closed", "closed", "0"], done.stderr


def test_a_count_of_no_dimensions_stays_one(tmp_path: Path) -> None:
    """`loops` is 0-d in graphs of looped models."""
    onnx = pytest.importorskip("onnx", reason="writing the graph needs onnx")
    from onnx import TensorProto, helper

    loops = TensorSpec(name="loops", dtype="int64", shape=())
    tripled = TensorSpec(name="prediction", dtype="int64", shape=())
    path = tmp_path / "denoiser.onnx"
    ends = [helper.make_tensor_value_info(spec.name, TensorProto.INT64, []) for spec in (loops, tripled)]
    three = helper.make_tensor("three", TensorProto.INT64, [], [3])
    graph = helper.make_graph([helper.make_node("Mul", ["loops", "three"], ["prediction"])], "tripled", ends[:1], ends[1:], [three])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    artifact = OnnxArtifact(precision="fp32", files=(entry(tmp_path, path),), toolchain={}, opset=20)
    counted = Graph(inputs=(loops,), outputs=(tripled,), dimensions={"B": Span(1, 1)}, artifacts=(artifact,))
    write_manifest(tmp_path, msgspec.structs.replace(manifest(artifacts=(artifact,)), graphs={"denoiser": counted}))
    with open_session(Bundle.open(tmp_path), name="openvino", threads=1) as session:
        assert session.run({"loops": np.array(4)})["prediction"] == 12


def test_it_draws_pictures_as_any_backend_does(tiny: Bundle) -> None:
    with ElasticPipeline.from_pretrained(tiny, "openvino", threads=1) as pipe:
        noise = np.zeros((2, 4, 8, 8))
        drawn = pipe([1, 2], num_inference_steps=1, noise=noise, output_type="latent").images
    np.testing.assert_allclose(drawn, -16.0)


def test_the_default_precision_holds_the_tolerance_of_a_golden_model(golden_bundle: Callable[[str], Bundle]) -> None:
    bundle = golden_bundle("c")
    with open_session(bundle, name="openvino", threads=1) as session:
        rows = list(check(bundle, "denoiser", session, PRECISIONS["fp32"].tolerance))
    assert len(rows) > 2
    assert all(row.passed for row in rows)


def test_an_unknown_wish_is_answered_with_what_there_is(tiny: Bundle) -> None:
    with pytest.raises(UsageError, match="precision is one of fp32, fp16, bf16, got 'f8'"):
        open_session(tiny, name="openvino", precision="f8")
    with pytest.raises(UsageError, match="threads is a whole number, 0 for one a core, got -1"):
        open_session(tiny, name="openvino", threads=-1)
    with pytest.raises(MissingError, match="no device 'ABACUS' here; it has .*CPU"):
        open_session(tiny, name="openvino", device="ABACUS")


@pytest.mark.parametrize(
    ("device", "has", "processor"),
    [
        ("CPU", ["CPU"], "cpu"),
        ("GPU.1", ["CPU", "GPU.0", "GPU.1"], "gpu"),
        ("GPU", ["CPU", "GPU.0", "GPU.1"], "gpu"),
        ("NPU", ["NPU"], "npu"),
    ],
)
def test_a_device_of_several_is_named_and_tells_its_kind(
    device: str, has: list[str], processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    class Core:
        available_devices = has

        def compile_model(self, path: str, device: str, settings: dict[str, object]) -> SimpleNamespace:
            asked.append((device, settings))
            kind = SimpleNamespace(get_type_name=lambda: "f32")  # whatever it was asked for
            return SimpleNamespace(create_infer_request=object, get_property={"INFERENCE_PRECISION_HINT": kind}.__getitem__)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, __version__="2026.4", __spec__=object()))  # type: ignore[arg-type]
    monkeypatch.setattr(openvino, "thread_limit", lambda: 3)
    with open_session(write_bundle(tmp_path / "b"), name="openvino", device=device, lanes=1) as session:
        assert session.processor == processor
    threads = {"INFERENCE_NUM_THREADS": 3} if processor == "cpu" else {}
    assert asked == [(device, {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"} | threads)]
    with pytest.raises(MissingError, match=f"this {device} computes no fp16, and OpenVINO would run it in fp32: use precision fp32"):
        open_session(write_bundle(tmp_path / "d"), name="openvino", device=device, precision="fp16", lanes=1)
    with pytest.raises(MissingError, match=r"no device 'GPU\.7' here"):
        open_session(write_bundle(tmp_path / "c"), name="openvino", device="GPU.7")


@pytest.mark.parametrize(("able", "hint"), [(["FP32", "BF16"], "bf16"), (["FP32"], "f32")])
def test_an_artifact_in_bfloat16_is_computed_in_it_where_the_processor_can(
    able: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        available_devices = ("CPU",)

        def get_property(self, device: str, name: str) -> object:
            return {"OPTIMIZATION_CAPABILITIES": able, "FULL_DEVICE_NAME": "abacus"}[name]

        def compile_model(self, path: str, device: str, settings: dict[str, str]) -> SimpleNamespace:
            kind = SimpleNamespace(get_type_name=lambda: settings["INFERENCE_PRECISION_HINT"])
            return SimpleNamespace(create_infer_request=object, get_property={"INFERENCE_PRECISION_HINT": kind}.__getitem__)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, __version__="2026.4", __spec__=object()))  # type: ignore[arg-type]
    bundle = write_bundle(tmp_path / "b", precision="bf16")
    with open_session(bundle, name="openvino", lanes=1) as session:
        assert session.where.endswith(f"CPU {hint}")
    with open_session(bundle, name="openvino", lanes=1, precision="fp32") as session:
        assert session.where.endswith("CPU f32")
    if "BF16" not in able:
        with pytest.raises(MissingError, match="this abacus computes no bfloat16: use precision fp32"):
            open_session(bundle, name="openvino", lanes=1, precision="bf16")


@pytest.mark.parametrize(
    ("sizes", "looped", "size"),
    [
        ([(768, 768), (3072, 768)], False, 256),
        ([(768, 64), (128, 128)], False, 128),  # a quarter of the weights would be multiplied in floats
        ([(768, 768), (64, 64)], False, 256),  # here fewer than a hundredth
        ([(1024, 64)], True, 256),
        ([(32, 512)], False, None),
        ([], False, None),
    ],
)
def test_values_share_a_scale_as_far_as_rows_allow(sizes: list[tuple[int, int]], looped: bool, size: int | None, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="writing the graph needs onnx")
    file = tmp_path / "products.onnx"
    onnx.save(products(sizes, looped), str(file))
    with openvino.without_telemetry():
        import openvino as library
    assert openvino.group(library.Core().read_model(str(file))) == size


def products(sizes: list[tuple[int, int]], looped: bool) -> Any:
    """An ONNX model that multiplies an input for each matrix of bytes, in a loop or not; and one that takes rows of a table of bytes."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(np.ones((2048, 2048), np.int8), "table")]
    nodes, inputs, outputs = [helper.make_node("Gather", ["table", "ids"], ["rows"])], [], []
    for i, (inner, outer) in enumerate(sizes):
        constants += [numpy_helper.from_array(np.ones((inner, outer), np.int8), f"codes{i}")]
        constants += [numpy_helper.from_array(np.ones(outer, np.float32), f"scales{i}")]
        nodes += [helper.make_node("DynamicQuantizeMatMul", [f"x{i}", f"codes{i}", f"scales{i}"], [f"y{i}"], domain="com.microsoft")]
        inputs += [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["B", inner])]
        outputs += [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["B", outer])]
    ids, rows = (
        helper.make_tensor_value_info("ids", TensorProto.INT64, [2]),
        helper.make_tensor_value_info("rows", TensorProto.INT8, [2, 2048]),
    )
    if looped:
        scalar = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("goes_on", "still")]
        turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
        body = helper.make_graph(
            [helper.make_node("Identity", ["goes_on"], ["still"]), *nodes[1:]], "body", [turn, scalar[0]], [scalar[1], *outputs]
        )
        constants += [numpy_helper.from_array(np.array(3), "turns")]
        nodes[1:] = [helper.make_node("Loop", ["turns", ""], [f"all{i}" for i in range(len(sizes))], body=body)]
        outputs = [helper.make_tensor_value_info(f"all{i}", TensorProto.FLOAT, ["T", "B", outer]) for i, (_, outer) in enumerate(sizes)]
    graph = helper.make_graph(nodes, "products", [ids, *inputs], [rows, *outputs], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


@pytest.mark.parametrize("weak", ["min", "max"])
def test_lanes_draw_the_same_picture(weak: str, golden_bundle: Callable[[str], Bundle]) -> None:
    """Both branches of guidance as one batch and in two streams; and branches of two sizes, through both ways."""
    bundle = golden_bundle("c")
    (axis,) = bundle.manifest.axes
    words: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 2.0, "seeds": 0, "output_type": "latent"}
    words |= {"budget": Budget(**{axis.name: axis.max}), "guidance_budget": Budget(**{axis.name: getattr(axis, weak)})}
    pictures = []
    for lanes in (1, 2):
        with ElasticPipeline.from_pretrained(bundle, "openvino", threads=2, lanes=lanes) as pipe:
            pictures.append(pipe([1], **words).images)
    np.testing.assert_allclose(*pictures, atol=1e-5)


def test_a_small_denoiser_s_way_is_measured_when_it_is_opened(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(Lanes, "measure", lambda self, feeds: measured.append(len(feeds["sample"])))
    open_session(tiny, name="openvino", threads=2).close()
    open_session(tiny, name="openvino", threads=1).close()
    assert measured == [2]
    with pytest.raises(UsageError, match="lanes is a whole number from 1, got 0"):
        open_session(tiny, name="openvino", lanes=0)


def test_an_artifact_that_is_no_graph_is_said_to_be_damaged(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"OpenVINO cannot open .*denoiser\.onnx"):
        open_session(write_bundle(tmp_path / "b"), name="openvino")


def test_a_missing_package_is_answered_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingError, match=r"pip install 'elastic-export\[openvino\]'"):
        open_session(write_bundle(tmp_path / "b"), name="openvino")


def test_opening_loads_no_telemetry(tiny: Bundle) -> None:
    program = """
import sys
from elastic_runtime import Bundle, open_session
open_session(Bundle.open(sys.argv[1]), name="openvino").close()
print(sorted(name for name in sys.modules if name.startswith("openvino_telemetry")))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tiny.folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
