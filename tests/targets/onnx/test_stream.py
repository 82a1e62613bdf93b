"""Weights stay on disk until they are written, and what is written is what an export with all of them in memory writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders  # noqa: E402
import onnxruntime  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export import verifying  # noqa: E402
from elastic_export.capture.folders import capture_folder  # noqa: E402
from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_runtime import Bundle, Span, open_session  # noqa: E402
from elastic_targets.capture import GraphCapture  # noqa: E402
from elastic_targets.onnx import OnnxOptions, evaluate, stream  # noqa: E402
from elastic_targets.onnx.lower import lower  # noqa: E402
from elastic_targets.weights import Streamed, filled, weights  # noqa: E402


def graphs(folder: Path) -> list[GraphCapture]:
    made = folders.write(folder, folders.flux(), text=True)
    return capture_folder(made, None, Span(16, 32), Span(1, 2), digest=False).graphs


def answers(file: Path, graph: GraphCapture) -> list[np.ndarray]:
    outputs: list[np.ndarray] = onnxruntime.InferenceSession(str(file)).run(None, graph.example())
    return outputs


def in_memory(graph: GraphCapture, folder: Path) -> Path:
    """What the exporter makes of the graph with all its weights in memory, optimised."""
    program = torch.onnx.export(
        filled(graph.module),
        kwargs={name: torch.from_numpy(array) for name, array in graph.example().items()},
        dynamo=True,
        opset_version=23,
        input_names=[spec.name for spec in graph.inputs],
        output_names=[spec.name for spec in graph.outputs],
        dynamic_shapes={spec.name: graph.dynamic(spec) for spec in graph.inputs},
        verbose=False,
    )
    program.save(str(folder / "memory.onnx"))
    return folder / "memory.onnx"


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("small", narrow([0, stream.SMALL]), ids=["all", "large"])
def test_what_is_written_one_by_one_answers_as_what_is_exported_from_memory(
    small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SMALL", small)
    for graph in graphs(tmp_path / "f"):
        (artifact,) = lower(graph, OnnxOptions(), tmp_path)
        ours, theirs = answers(tmp_path / artifact.path, graph), answers(in_memory(graph, tmp_path), graph)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other, graph.name)


@pytest.mark.parametrize("precision", narrow(["int4w", "fp32", "fp16"]))
def test_no_large_weight_is_read_before_it_is_written(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SMALL", 0)
    graph = graphs(tmp_path / "f")[0]
    reads: list[str] = []
    values = Streamed.values
    monkeypatch.setattr(Streamed, "values", lambda self: reads.append(str(tuple(self.shape))) or values(self))
    written: list[int] = []
    monkeypatch.setattr("elastic_targets.onnx.lower.write", lambda *arguments: written.append(len(reads)) or stream.write(*arguments))
    lower(graph, OnnxOptions(precision=precision), tmp_path)
    assert written == [0]
    assert len(reads) >= len(dict(weights(graph.module)))


def test_weights_stand_in_files_of_bounded_size_that_the_bundle_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "EXTERNAL_FROM", 0)
    monkeypatch.setattr(stream, "MOST_BYTES", 100_000)
    folders.write(tmp_path / "f", folders.flux())
    bundle = elastic_export.export(tmp_path / "f", output=tmp_path / "b", size="16-32", batch="1-2", components="transformer")
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    beside = [file for file in artifact.files if file.path != artifact.path]
    assert len(beside) > 1
    assert all(file.bytes <= 100_000 for file in beside)
    listed = {file.path for file in artifact.files}
    assert {path.relative_to(bundle.folder).as_posix() for path in (bundle.folder / "onnx").iterdir()} == listed
    assert all(row.passed for _, each in elastic_export.verify(bundle) for row in each.verified)


def test_an_artifact_that_lists_not_all_its_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "EXTERNAL_FROM", 0)
    monkeypatch.setattr("elastic_targets.onnx.lower.write", lambda *arguments: stream.write(*arguments)[:1])
    folders.write(tmp_path / "f", folders.flux(), decoder=False)
    with pytest.raises(RuntimeError, match="has weights in denoiser.onnx.data, which the artifact does not list"):
        elastic_export.export(tmp_path / "f", output=tmp_path / "b", size="16-32", components="transformer")
    assert not (tmp_path / "b" / "elastic.json").exists()


def test_a_checkpoint_stays_on_disk_too(golden: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous() for name, value in read_checkpoint(golden / "elit-c.pt").weights.items()}, tmp_path / "c.safetensors"
    )
    model = load(Request("elit-sit", tmp_path / "c.safetensors", golden / "elit-c.json"))
    assert all(isinstance(weight, Streamed) for _, weight in weights(model.module))


PROGRAM = """
import json, sys
from pathlib import Path
from elastic_export.capture.folders import capture_folder
from elastic_runtime import Span
from elastic_runtime.device.memory import peak_bytes
from elastic_targets.onnx.lower import OnnxOptions, lower
folder, precision = Path(sys.argv[1]), sys.argv[2]
(graph,) = capture_folder(folder, ("transformer",), Span(16, 32), Span(1, 1), digest=False).graphs
lower(graph, OnnxOptions(precision=precision), folder)
print(json.dumps(peak_bytes()))
"""


def test_an_export_holds_no_more_than_a_few_weights(tmp_path: Path) -> None:
    """Two models of one graph, of 5 and 330 MB in float32: what the second takes more is less than a third of its weights."""
    held = []
    for heads in (2, 16):
        sizes: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": heads, "attention_head_dim": 64}
        made = folders.write(tmp_path / str(heads), folders.flux(axes_dims_rope=(16, 24, 24), **sizes), decoder=False)
        size = sum(file.stat().st_size for file in (made / "transformer").glob("*.safetensors"))
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(made), "fp32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]
        held.append((json.loads(done.stdout), size))
    (few, small), (many, large) = held
    assert large - small > 2.5e8
    assert many - few < 0.33 * (large - small)


def test_a_bundle_of_streamed_weights_opens_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "EXTERNAL_FROM", 0)
    elastic_export.export("elit-mnist", output=tmp_path / "b", batch="1-2", latents="16-32")
    with open_session(Bundle.open(tmp_path / "b", hashes=True)) as session:
        assert session.batch == Span(1, 2)


@pytest.mark.parametrize(("opset", "options"), [(23, {"precision": "int4w", "rounding": "gptq"}), (20, {})], ids=["gptq", "fp32"])
def test_weights_within_a_loop_stay_on_disk_too(
    opset: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ELT of real size has a loop of more weights than protobuf takes in one message."""
    monkeypatch.setattr(stream, "SMALL", 0)
    monkeypatch.setattr(stream, "EXTERNAL_FROM", 0)
    monkeypatch.setattr(evaluate, "BESIDE", 1000)
    monkeypatch.setattr(verifying, "LARGE", 1000)
    bundle = elastic_export.export("elt-mnist", output=tmp_path / "b", batch="1-2", opset=opset, **options)
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    assert all(row.passed and row.where.endswith("in 1 parts") for row in artifact.verified)
    assert len(artifact.verified) == 4
