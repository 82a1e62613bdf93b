"""Engines really built by tensorrt-rtx, on a machine that needs no GPU. None is opened: that takes one."""

import errno
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cases import narrow

from elastic_export.exporting import export_bundle
from elastic_runtime import Bundle, BundleError, Span
from elastic_runtime.contract.artifacts import Range, TensorSpec, TrtArtifact
from elastic_runtime.errors import BudgetError, InferenceError, MissingError, UsageError
from elastic_targets.capture import BundleGraph

Tiny = Callable[..., Bundle]
ONE = {"latents": Span(32, 64)}
BUILDS = [("uvit-b", 23, 9), ("hdit-a", 23, 10), ("hdit-b", 20, 0), ("uvit-tokens-a", 23, 9), ("hdit-levels-a", 20, 0)]


def engines(bundle: Bundle) -> list[TrtArtifact]:
    return [artifact for artifact in bundle.manifest.graphs["denoiser"].artifacts if isinstance(artifact, TrtArtifact)]


def check_header(bundle: Bundle, artifact: TrtArtifact) -> None:
    """The file begins with the library's tag, its own length and the version that built it."""
    path = bundle.file(artifact.path)
    content = path.read_bytes()
    assert content[:4] == b"vtrt"
    assert struct.unpack_from("<Q", content, 16) == (len(content),)
    assert ".".join(map(str, content[24:28])) == artifact.builder_version
    assert len(content) == artifact.files[0].bytes


def nodes(*made: tuple[str, list[str], list[str]]) -> list[Any]:
    from onnx import helper

    return [helper.make_node(kind, inputs, outputs) for kind, inputs, outputs in made]


def add_one(tiny: Tiny) -> Bundle:
    return tiny(nodes(("Add", ["sample", "sample"], ["prediction"])))


def test_elit_builds_its_buckets_for_two_generations(room: ModuleType, bundle_copy: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    options = room.TrtOptions(sms=(89, 86), buckets={"latents": (16, 64)})
    made = export_bundle(Bundle.open(bundle_copy), "trt", options, on_progress=lambda *step: steps.append(step))
    (artifact,) = engines(made)
    assert (artifact.sms, artifact.precision, artifact.source) == ((86, 89), "fp32", "onnx/denoiser.onnx")
    assert artifact.path.startswith("trt/denoiser.sm86-89.tensorrt_rtx-")
    assert [profile.dimensions for profile in artifact.profiles] == [
        {"B": Range(1, 2, 4), "J": Range(1, 4, 4)},
        {"B": Range(1, 2, 4), "J": Range(5, 16, 16)},
    ]
    # elit-c has 4 blocks, a read and a write: six attentions, which opset 23 keeps whole and float32 must take apart
    assert artifact.network.attentions == 6
    assert artifact.network.loops == 0
    assert artifact.network.layers > 500
    assert "no CUDA device" in str(artifact.unverified) or artifact.verified
    check_header(made, artifact)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1:] == (1000, 1000)
    assert "about" in steps[0][0]
    Bundle.open(bundle_copy, hashes=True)
    assert made.manifest.graphs["denoiser"].artifacts[0].target == "onnx"  # what was there stays


@pytest.mark.parametrize(("name", "opset", "attentions"), narrow(BUILDS, 2))
def test_other_backbones_build_one_range(
    room: ModuleType, golden_bundle: Callable[..., Bundle], tmp_path: Path, name: str, opset: int, attentions: int
) -> None:
    """A block, Read and Write have an attention each; opset 20 spells it out."""
    bundle = Bundle.open(shutil.copytree(golden_bundle(name, opset).folder, tmp_path / "bundle"))
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets={}))
    (artifact,) = engines(made)
    axis = made.manifest.axis("latents")
    assert artifact.network.attentions == attentions
    assert [profile.dimensions["J"].min for profile in artifact.profiles] == [1]
    assert [profile.dimensions["J"].max for profile in artifact.profiles] == [axis.length(axis.max)]
    check_header(made, artifact)


def test_turing_gets_an_fp16_engine_of_its_own(room: ModuleType, golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="exporting fp16 needs torch")
    from elastic_export.capture.capture import capture
    from elastic_export.capture.zoo import Request, load
    from elastic_export.exporting import export_capture
    from elastic_targets import target as enter

    captured = capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), ONE, Span(1, 2))
    onnx = enter("onnx").options(precision="fp16")
    bundle = export_capture(captured, "onnx", onnx, tmp_path / "half", "elastic-export onnx")
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(75, 89), buckets={}))
    assert [(artifact.sms, artifact.precision) for artifact in engines(made)] == [((75,), "fp16"), ((89,), "fp16")]
    for artifact in engines(made):
        check_header(made, artifact)
    with pytest.raises(
        UsageError, match="has no fp32 ONNX artifact of 'denoiser'; it has fp16. Add one with: elastic-export onnx MODEL --precision fp32"
    ):
        room.plan(BundleGraph(bundle, "denoiser"), room.TrtOptions(precision="fp32"))


def test_an_engine_that_streams_its_weights_builds(room: ModuleType, tiny: Tiny, tmp_path: Path) -> None:
    (artifact,) = room.lower(BundleGraph(add_one(tiny), "denoiser"), room.TrtOptions(sms=(86,), weight_streaming=True), tmp_path / "one")
    assert artifact.weight_streaming


def test_a_loop_with_its_condition_builds_and_its_count_stays_an_input(room: ModuleType, tiny: Tiny) -> None:
    made = export_bundle(looped(tiny, condition=True), "trt", room.TrtOptions(sms=(89,)))
    (artifact,) = engines(made)
    assert artifact.network.loops == 1
    assert [set(profile.dimensions) for profile in artifact.profiles] == [{"B"}]


def elt(folder: Path, opset: int) -> Bundle:
    """A small looped transformer with random weights, as the onnx command writes it."""
    from elastic_export.capture.capture import capture
    from elastic_export.capture.zoo import Request, load
    from elastic_export.exporting import export_capture
    from elastic_targets.onnx import OnnxOptions

    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_heads": 4, "num_classes": 10}
    config = folder / "elt.json"
    config.write_text(json.dumps({"family": "elt", "unique_blocks": 2, "loops": 3, "max_loops": 4} | sizes))
    captured = capture(load(Request("elt", config=config, random_weights=True)), {}, Span(1, 4))
    return export_capture(captured, "onnx", OnnxOptions(opset=opset), folder / "elt", "elastic-export onnx elt")


def test_a_looped_transformer_builds_for_every_loop_count_at_once(room: ModuleType, tmp_path: Path) -> None:
    made = export_bundle(elt(tmp_path, opset=20), "trt", room.TrtOptions(sms=(86, 89)))
    (artifact,) = engines(made)
    check_header(made, artifact)
    assert artifact.sms == (86, 89)
    assert artifact.network.loops == 1
    # The count is a value, so it is an ordinary input: only the batch has a profile.
    assert [set(profile.dimensions) for profile in artifact.profiles] == [{"B"}]


@pytest.mark.parametrize(("name", "opset"), narrow([("uvit-a", 23), ("hdit-b", 20)]))
def test_a_backbone_without_an_axis_builds_with_its_batch_open(
    room: ModuleType, backbone_bundle: Callable[[str, int], Bundle], tmp_path: Path, name: str, opset: int
) -> None:
    bundle = Bundle.open(shutil.copytree(backbone_bundle(name, opset).folder, tmp_path / "bundle"))
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,)))
    (artifact,) = engines(made)
    check_header(made, artifact)
    assert [profile.dimensions for profile in artifact.profiles] == [{"B": Range(1, 2, 4)}]


def test_attention_inside_a_loop_is_refused_with_the_opset_that_builds(room: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Attention operators and a Loop.*Export again with --opset 20"):
        export_bundle(elt(tmp_path, opset=23), "trt", room.TrtOptions(sms=(89,)))


def test_a_loop_without_condition_is_refused_with_the_remedy(room: ModuleType, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a trip count nor a condition going in.*Wire the condition"):
        room.lower(BundleGraph(looped(tiny, condition=False), "denoiser"), room.TrtOptions(sms=(89,)), tmp_path / "out")


def looped(tiny: Tiny, condition: bool) -> Bundle:
    """`sample + loops`, one at a time, as torch's `while_loop` exports it: the counter is carried, the trip count is empty."""
    from onnx import TensorProto, helper, numpy_helper

    one = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones((1, 8), np.float32)))
    step = helper.make_node("Constant", [], ["step"], value=numpy_helper.from_array(np.array(1)))
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [one, step, *nodes(("Add", ["x", "one"], ["y"]), ("Add", ["n", "step"], ["n1"]), ("Less", ["n1", "loops"], ["more"]))],
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("c", TensorProto.BOOL, []),
            info("n", TensorProto.INT64, []),
            info("x", TensorProto.FLOAT, ["B", 8]),
        ],
        [info("more", TensorProto.BOOL, []), info("n1", TensorProto.INT64, []), info("y", TensorProto.FLOAT, ["B", 8])],
    )
    loop = helper.make_node("Loop", ["", "any" if condition else "", "zero", "sample"], ["count", "prediction"], body=body)
    return tiny(
        [*nodes(("Less", ["zero", "loops"], ["any"])), loop],
        [numpy_helper.from_array(np.array(0), "zero")],
        (TensorSpec(name="loops", dtype="int64", shape=()),),
    )


def test_a_node_that_the_builder_does_not_take_is_named(room: ModuleType, tiny: Tiny, tmp_path: Path) -> None:
    from onnx import helper

    head = nodes(("NonZero", ["sample"], ["where"]))
    shape = helper.make_node("Cast", ["where"], ["prediction"], to=1)
    with pytest.raises(
        UsageError, match=r"cannot read denoiser.onnx \(opset 20\): node 0 is a NonZero: .*Change the model so that it does without"
    ):
        room.lower(BundleGraph(tiny([*head, shape]), "denoiser"), room.TrtOptions(sms=(89,)), tmp_path / "out")


def test_an_opset_that_the_parser_does_not_know_says_how_to_export_again(room: ModuleType, tiny: Tiny, tmp_path: Path) -> None:
    """An older TensorRT says the same of Attention (before 10.14) as this one says of an operator that nobody has."""
    from onnx import helper

    unknown = helper.make_node("Attention3", ["sample"], ["prediction"])
    with pytest.raises(UsageError, match=r"node 0 is a Attention3: .*export again with: elastic-export onnx --opset 20"):
        room.lower(BundleGraph(tiny([unknown], opset=23), "denoiser"), room.TrtOptions(sms=(89,)), tmp_path / "out")


def test_an_input_whose_value_decides_a_shape_is_refused(room: ModuleType, tiny: Tiny, tmp_path: Path) -> None:
    reshape = nodes(("Reshape", ["sample", "size"], ["prediction"]))
    bundle = tiny(reshape, inputs=(TensorSpec(name="size", dtype="int64", shape=(2,)),))
    with pytest.raises(UsageError, match="the value of size decides a shape"):
        room.lower(BundleGraph(bundle, "denoiser"), room.TrtOptions(sms=(89,)), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sms": (87,)}, UsageError, r"does not build for sm 87 here; it builds for 75, 80, 86, 89, 120"),
        ({"sms": (75,)}, UsageError, "builds only fp16 and int8qdq graphs for sm 75, this one is fp32"),
        ({"sms": (86, 89), "precision": "fp8"}, UsageError, "has no fp8 ONNX artifact of 'denoiser'; it has fp32"),
        ({"precision": "int4w"}, UsageError, "must be one of fp32, .* got int4w; .* for TensorRT choose int4qdq"),
        ({"builder": "nvcc"}, UsageError, "--builder must be one of auto, rtx, tensorrt"),
        ({"version_compatible": True}, UsageError, "--version-compatible needs --builder tensorrt"),
        ({"spans": {"latents": Span(4, 128)}}, BudgetError, "latents 128 is not available: this model offers 4-64"),
        ({"buckets": {"S": (1,)}}, BudgetError, "this bundle has no S"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_read(
    room: ModuleType, tiny: Tiny, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        room.requires(BundleGraph(add_one(tiny), "denoiser"), room.TrtOptions(**options))


def test_an_absent_builder_is_one_line_that_installs_it(room: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = add_one(tiny)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingError, match=r"needs the package tensorrt .*pip install 'elastic-export\[trt\]'"):
        room.requires(BundleGraph(bundle, "denoiser"), room.TrtOptions(builder="tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingError, match=r"pip install 'elastic-export\[rtx\]'.*pip install 'elastic-export\[trt\]'"):
        room.requires(BundleGraph(bundle, "denoiser"), room.TrtOptions())


def test_refit_and_strip_need_a_driver_to_build(room: ModuleType, bundle_copy: Path) -> None:
    from elastic_runtime.sessions.trt import gpu

    if gpu()[0] is not None:
        pytest.skip("there is a GPU here")
    before = contents(bundle_copy)
    with pytest.raises(MissingError, match="needs a GPU and its driver to build with --refit or --strip"):
        export_bundle(Bundle.open(bundle_copy), "trt", room.TrtOptions(sms=(89,), spans=ONE, buckets={}, strip=True))
    assert contents(bundle_copy) == before


def test_an_engine_is_replaced_only_when_asked(room: ModuleType, tiny: Tiny) -> None:
    options = room.TrtOptions(sms=(89,))
    made = export_bundle(add_one(tiny), "trt", options)
    with pytest.raises(BundleError, match=r"exists: choose another -o/--output, or replace it with --overwrite"):
        export_bundle(made, "trt", options)
    assert len(engines(export_bundle(made, "trt", options, overwrite=True))) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_interrupting_a_build_calls_it_off_and_leaves_the_bundle_whole(room: ModuleType, bundle_copy: Path) -> None:
    before = contents(bundle_copy)

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(Bundle.open(bundle_copy), "trt", room.TrtOptions(sms=(89,)), on_progress=interrupt)
    assert contents(bundle_copy) == before
    assert not list(bundle_copy.glob(".*"))


def test_a_full_disk_leaves_the_bundle_whole(room: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = add_one(tiny)
    before = contents(bundle.folder)

    whole = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if path.suffix == ".engine" and mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(BundleError, match="no space left on the disk.*nothing was changed"):
        export_bundle(bundle, "trt", room.TrtOptions(sms=(89,)))
    assert contents(bundle.folder) == before


def test_a_killed_build_leaves_the_bundle_whole_and_the_next_one_clears_up(room: ModuleType, tiny: Tiny) -> None:
    bundle = add_one(tiny)
    before = contents(bundle.folder)
    script = (
        "import os, sys\nfrom elastic_export.exporting import export_bundle\n"
        "from elastic_runtime import Bundle\nfrom elastic_targets import target\n"
        "export_bundle(Bundle.open(sys.argv[1]), 'trt', target('trt').options(sms=(89,)), on_progress=lambda *_: os.kill(os.getpid(), 9))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(bundle.folder)], check=False).returncode == -9
    assert {name: content for name, content in contents(bundle.folder).items() if not name.startswith(".")} == before
    assert list(bundle.folder.glob(".partial-*"))
    export_bundle(bundle, "trt", room.TrtOptions(sms=(89,)))
    assert not list(bundle.folder.glob(".*"))


def test_what_the_builder_says_reaches_the_user(room: ModuleType, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that the graph contradicts: not reachable through the options, so it is forced here."""
    bundle = add_one(tiny)
    from elastic_targets.trt import engine

    monkeypatch.setattr(engine, "_optimization_profile", lambda parsed, *_: parsed.builder.create_optimization_profile())
    with pytest.raises(InferenceError, match="tensorrt_rtx .* failed to build for sm 89: .*profile"):
        room.lower(BundleGraph(bundle, "denoiser"), room.TrtOptions(sms=(89,)), tmp_path / "out")


def test_the_room_and_the_command_from_a_bundle_need_no_torch_and_no_onnx(room: ModuleType, tiny: Tiny) -> None:
    script = (
        "import sys\nsys.modules |= dict.fromkeys(('torch', 'onnx', 'onnxscript', 'onnxruntime'))\n"
        "from elastic_export.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", script, "trt", str(add_one(tiny).folder), "--sm", "89", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "for sm 89, " in done.stdout


def test_bf16_builds_and_its_graph_computes_what_the_original_does(room: ModuleType, golden: Path, tmp_path: Path) -> None:
    """ONNX Runtime cannot run bfloat16 graphs: OpenVINO does where it is installed, and onnx's own evaluator everywhere. Where OpenVINO is
    not, the graph is proven spelled out for ONNX Runtime."""
    pytest.importorskip("torch", reason="exporting bf16 needs torch")
    from onnx.reference import ReferenceEvaluator

    from elastic_export.capture.capture import capture
    from elastic_export.capture.zoo import Request, load
    from elastic_export.exporting import export_capture
    from elastic_runtime.contract.precision import PRECISIONS
    from elastic_runtime.contract.reference import axis_feeds, compare, unpack
    from elastic_targets import target as enter

    captured = capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), ONE, Span(1, 2))
    bundle = export_capture(captured, "onnx", enter("onnx").options(precision="bf16"), tmp_path / "brain", "elastic-export onnx")
    (onnx,) = bundle.manifest.graphs["denoiser"].artifacts
    runtime = "openvino" if find_spec("openvino") else "onnxruntime"
    assert onnx.verified
    assert all(row.passed and row.where.startswith(runtime) for row in onnx.verified)
    feeds, outputs = unpack("denoiser", bundle.reference())
    budget, wanted = next(iter(outputs.items()))
    (got,) = ReferenceEvaluator(str(bundle.file(onnx.path))).run(None, feeds | axis_feeds(bundle.manifest.axes, budget))
    assert compare(got, wanted["prediction"], budget, PRECISIONS["bf16"].tolerance, "onnx").passed
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets={}))
    assert [artifact.precision for artifact in engines(made)] == ["bf16"]


@pytest.mark.parametrize(("here", "builder"), [(89, "tensorrt_rtx"), (87, "tensorrt"), (90, "tensorrt")])
def test_auto_takes_the_builder_that_serves_the_gpu_of_this_machine(
    room: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, here: int, builder: str
) -> None:
    import fake_gpu

    bundle = add_one(tiny)
    rtx = sys.modules["tensorrt_rtx"]
    fake_gpu.install(monkeypatch, sm=here, name="tensorrt", version="10.3.0")
    assert sys.modules["tensorrt_rtx"] is rtx
    plan = room.plan(BundleGraph(bundle, "denoiser"), room.TrtOptions())
    assert plan.builder.name == builder
    assert any(here in sms for sms in plan.engines)
    if builder == "tensorrt":
        with pytest.raises(
            UsageError, match=f"tensorrt 10.3.0 does not build for sm 86 here; it builds for {here}. It builds only for the GPU"
        ):
            room.plan(BundleGraph(bundle, "denoiser"), room.TrtOptions(builder="tensorrt", sms=(86,)))


def test_full_tensorrt_needs_the_gpu_that_the_engine_is_for(room: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_gpu

    bundle = add_one(tiny)
    fake_gpu.install(monkeypatch, name="tensorrt", version="10.3.0")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingError, match="builds on the GPU that will run the engine, and the CUDA bindings are not installed"):
        room.requires(BundleGraph(bundle, "denoiser"), room.TrtOptions(builder="tensorrt"))
