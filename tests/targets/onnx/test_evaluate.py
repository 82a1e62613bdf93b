"""An artifact in parts answers as it does whole, however it is cut."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from cases import narrow

ir = pytest.importorskip("onnx_ir", reason="cutting a graph needs onnx_ir")
pytest.importorskip("torch", reason="exporting needs torch")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import elastic_export  # noqa: E402
from elastic_export import verifying  # noqa: E402
from elastic_runtime import Budget, Bundle, InferenceError, MissingError, open_session  # noqa: E402
from elastic_runtime.contract.reference import axis_feeds, cut, unpack  # noqa: E402
from elastic_runtime.sessions.checking import recordings  # noqa: E402
from elastic_targets.onnx.bfloat16 import spelled_out  # noqa: E402
from elastic_targets.onnx.evaluate import PartSession, evaluator  # noqa: E402

PRECISIONS = {"elt-mnist": "int8w", "elit-mnist": "fp16", "ralu-digits": "int4w"}


@pytest.fixture(scope="module", params=narrow(PRECISIONS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    name = request.param
    if name == "ralu-digits":
        pytest.importorskip("diffusers", reason="the folder is diffusers'")
    return elastic_export.export(name, output=tmp_path_factory.mktemp("b") / name, precision=PRECISIONS[name], batch="1-2")


@pytest.mark.parametrize("part", [1, 200_000, 10**9], ids=["a node a part", "some", "one part"])
def test_parts_answer_as_the_whole(bundle: Bundle, part: int) -> None:
    for name, graph in bundle.manifest.graphs.items():
        (artifact,) = graph.artifacts
        feeds, outputs = unpack(name, bundle.reference())
        budget: Budget = list(outputs)[-1]
        axes = tuple(axis for axis in bundle.manifest.axes if axis.name in budget)
        inputs = cut(graph.inputs, feeds, budget, axes) | axis_feeds(axes, budget)
        inputs = {spec.name: inputs[spec.name][:1] if spec.shape and spec.shape[0] == "B" else inputs[spec.name] for spec in graph.inputs}
        parts = PartSession(graph, ir.load(bundle.file(artifact.path)), part)
        assert f"in {len(parts._parts)} parts" in parts.where
        assert (len(parts._parts) == 1) == (part == 10**9)
        with parts, open_session(bundle, name, "ort") as whole:
            for spec in graph.outputs:
                output, wanted = parts.run(inputs)[spec.name], whole.run(inputs)[spec.name]
                bound = 5e-3 if artifact.precision == "fp16" else 1e-5  # half precision is fused otherwise
                assert np.abs(output - wanted).max() <= bound * max(1.0, np.abs(wanted).max()), name
    with pytest.raises(InferenceError, match="^this session is closed$"):
        parts.run(inputs)


def test_runs_that_are_handed_over_together_read_each_part_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = bundle.manifest.graphs["denoiser"]
    (artifact,) = graph.artifacts
    opened: list[object] = []
    begin = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **words: (opened.append(given), begin(*given, **words))[1])
    with PartSession(graph, ir.load(bundle.file(artifact.path)), 200_000) as parts:
        runs = [fed for _, fed, _ in recordings(bundle, "denoiser", parts)]
        together = parts.several(runs)
        assert len(opened) == len(parts._parts) > 1
        for alone, answer in zip(map(parts.run, runs), together, strict=True):
            assert all(np.abs(alone[name] - answer[name]).max() <= 1e-5 * max(1.0, np.abs(answer[name]).max()) for name in answer)
        assert len(opened) == (1 + len(runs)) * len(parts._parts)


def test_a_large_artifact_is_proven_in_parts_while_it_is_exported_and_whole_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "LARGE", 1000)
    bundle = elastic_export.export("elit-mnist", output=tmp_path / "b", batch="1-2")
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    assert all(row.passed and row.where.endswith("CPU, in 1 parts") for row in artifact.verified)
    ((_, again),) = elastic_export.verify(bundle)
    assert all(row.passed and "parts" not in row.where for row in again.verified)


def test_without_a_runtime_an_artifact_says_so_in_place_of_rows(digits: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("onnxruntime", "openvino") else find(name, *rest))
    ((_, artifact),) = elastic_export.verify(digits)
    assert artifact.verified == ()
    assert "ONNX Runtime is not installed: pip install 'elastic-export[ort]'" in str(artifact.unverified)
    with pytest.raises(MissingError, match="--precision int8 runs the graph before its weights are rounded, and ONNX Runtime is not"):
        elastic_export.export("elit-mnist", output=tmp_path / "b", precision="int8")


@pytest.mark.parametrize("name", narrow(["elt-mnist", "elit-mnist"]))
def test_bfloat16_is_proven_where_nothing_runs_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product is rounded to bfloat16, in a loop's body too: some 60 dB, where float32's arithmetic has 70 and more of such weights."""
    monkeypatch.setattr(verifying, "obstacles", lambda artifact: (None, ("nothing here runs it",)))
    bundle = elastic_export.export(name, output=tmp_path / "b", precision="bf16", batch="1-2")
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    assert artifact.verified
    assert all(row.passed and row.where.startswith("onnxruntime") and 50 < row.psnr_db < 68 for row in artifact.verified)


@pytest.mark.parametrize("name", narrow(["elt-mnist", "elit-mnist"]))
def test_bfloat16_goes_from_part_to_part(name: str, tmp_path: Path) -> None:
    bundle = elastic_export.export(name, output=tmp_path / "b", precision="bf16", batch="1-2", verify="none")
    (graph,) = bundle.manifest.graphs.values()
    (artifact,) = graph.artifacts
    sizes = {spec.name: [1 if isinstance(size, str) else size for size in spec.shape] for spec in graph.inputs}
    feeds = {spec.name: np.full(sizes[spec.name], spec.dtype == "float32", spec.dtype) for spec in graph.inputs}
    answers = []
    for most in (100_000, 1_000_000_000):
        with PartSession(graph, spelled_out(ir.load(bundle.file(artifact.path))), most) as parts:
            answers.append(parts.run(feeds))
            assert ("in 1 parts" in parts.where) == (most > 100_000)
    for each, answer in answers[0].items():  # what ONNX Runtime fuses within a part may tip a rounding over
        assert np.abs(answers[1][each] - answer).max() <= 2.0**-7 * np.abs(answer).max()


def test_no_weight_stays_mapped_when_its_part_was_run_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("what is mapped is told on Linux")
    monkeypatch.setattr("elastic_targets.onnx.stream.EXTERNAL_FROM", 0)
    bundle = elastic_export.export("elt-mnist", output=tmp_path / "b", batch="1-2", verify="none")
    (graph,) = bundle.manifest.graphs.values()
    (artifact,) = graph.artifacts
    assert len(artifact.files) == 2
    feeds = {spec.name: np.ones([1 if isinstance(size, str) else size for size in spec.shape], spec.dtype) for spec in graph.inputs}
    with PartSession(graph, ir.load(bundle.file(artifact.path)), 200_000) as parts:
        first = parts.run(feeds)
        assert "denoiser.onnx.data" not in maps.read_text()
        assert all(np.array_equal(again, first[name]) for name, again in parts.run(feeds).items())
    store = tmp_path / "store"  # as hubs keep files: by their hashes, and links by their names
    bundle.folder.rename(store)
    for name in ("elastic.json", *(file.path for file in bundle.manifest.files())):
        (tmp_path / "linked" / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).rename(store / name.replace("/", "-"))
        (tmp_path / "linked" / name).symlink_to(store / name.replace("/", "-"))
    linked = Bundle.open(tmp_path / "linked", hashes=True)
    session = evaluator(linked, graph, artifact)
    assert session is not None
    with session:
        assert all(np.array_equal(again, first[name]) for name, again in session.run(feeds).items())
