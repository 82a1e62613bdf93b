"""DC-DiT's graph as the RTX builder sees it: a sorted choice whose number is the length of an input."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from cases import narrow

from elastic_export.exporting import export_bundle
from elastic_runtime import Bundle, Span
from elastic_runtime.contract.artifacts import Range, TrtArtifact


def dcdit(folder: Path, opset: int) -> Bundle:
    """A small DC-DiT with random weights, as the onnx command writes it."""
    pytest.importorskip("torch", reason="exporting needs torch")
    from elastic_export.capture.capture import capture
    from elastic_export.capture.zoo import Request, load
    from elastic_export.exporting import export_capture
    from elastic_targets.onnx import OnnxOptions

    sizes = {"input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 10}
    config = folder / "dcdit.json"
    config.write_text(json.dumps({"dechunk_kernel_sigma": 1.0, "enc_dec_dim_factor": 1, "encoder": "c1", "decoder": "c1"} | sizes))
    captured = capture(load(Request("dc-dit", config=config, random_weights=True)), {"tokens": Span(16, 64)}, Span(1, 4))
    return export_capture(captured, "onnx", OnnxOptions(opset=opset), folder / "dcdit", "elastic-export onnx dc-dit")


@pytest.mark.parametrize("opset", narrow([23, 20]))
def test_a_profile_for_each_bucket_of_slots(opset: int, room: ModuleType, tmp_path: Path) -> None:
    made = export_bundle(dcdit(tmp_path, opset), "trt", room.TrtOptions(sms=(89,), buckets={"tokens": (32, 64)}))
    (artifact,) = (each for each in made.manifest.graphs["denoiser"].artifacts if isinstance(each, TrtArtifact))
    assert [profile.dimensions for profile in artifact.profiles] == [
        {"B": Range(1, 2, 4), "K": Range(16, 32, 32)},
        {"B": Range(1, 2, 4), "K": Range(33, 64, 64)},
    ]
    assert artifact.network.attentions == (1 if opset == 23 else 0)
    assert made.file(artifact.path).stat().st_size == artifact.files[0].bytes
