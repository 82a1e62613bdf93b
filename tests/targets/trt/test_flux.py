"""Engines of FLUX's, FLUX.2's, Qwen-Image's, Z-Image's and Krea 2's denoisers, with a profile a stage, and of VAEs whose sides are open."""

from pathlib import Path
from types import ModuleType

import pytest
from cases import narrow

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")

import folders

from elastic_export.capture.folders import capture_folder
from elastic_export.exporting import export_bundle, export_capture
from elastic_export.sides import Sides
from elastic_runtime import Span
from elastic_runtime.contract.artifacts import Range, TrtArtifact
from elastic_targets import target
from elastic_targets.capture import BundleGraph


def test_a_flux_folder_builds(room: ModuleType, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux())
    captured = capture_folder(tmp_path / "f", None, None, Span(1, 2))
    bundle = export_capture(captured, "onnx", target("onnx").options(), tmp_path / "out", "elastic-export onnx f")
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets=room.read_buckets("16,28,64", bundle.manifest.axes)))
    engines = {
        name: artifact for name, graph in made.manifest.graphs.items() for artifact in graph.artifacts if isinstance(artifact, TrtArtifact)
    }
    assert [profile.dimensions["S"] for profile in engines["denoiser"].profiles] == [Range(4, 16, 16), Range(17, 28, 28), Range(29, 64, 64)]
    assert engines["denoiser"].network.attentions == 2
    (decoding,) = engines["decoder"].profiles
    assert decoding.dimensions["h"] == Range(4, 16, 16)
    assert decoding.shape(made.manifest.graphs["decoder"].outputs[0], "max") == (2, 3, 32, 32)
    guided = room.TrtOptions(sms=(89,), batch=Span(2, 2))
    batches = {name: room.plan(BundleGraph(bundle, name), guided).profiles[0].dimensions["B"] for name in engines}
    assert batches == {"denoiser": Range(2, 2, 2), "decoder": Range(1, 2, 2)}, "a picture is decoded by itself"


def test_a_qwen_image_denoiser_builds(room: ModuleType, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.qwen_image(), decoder=False)
    captured = capture_folder(tmp_path / "f", None, Span(16, 16), Span(1, 2))
    bundle = export_capture(captured, "onnx", target("onnx").options(), tmp_path / "out", "elastic-export onnx f")
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets=room.read_buckets("none", bundle.manifest.axes)))
    (engine,) = (artifact for artifact in made.manifest.graphs["denoiser"].artifacts if isinstance(artifact, TrtArtifact))
    assert engine.profiles[0].dimensions["S"] == Range(16, 64, 64)
    assert engine.network.attentions == 2


@pytest.mark.parametrize("guided", narrow([False, True]), ids=["klein", "dev"])
def test_a_flux_2_folder_builds(room: ModuleType, guided: bool, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux2(guidance_embeds=guided), decoder=guided)
    captured = capture_folder(tmp_path / "f", None, Span(16, 32), Span(1, 2))
    bundle = export_capture(captured, "onnx", target("onnx").options(), tmp_path / "out", "elastic-export onnx f")
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets=room.read_buckets("none", bundle.manifest.axes)))
    engines = {
        name: artifact for name, graph in made.manifest.graphs.items() for artifact in graph.artifacts if isinstance(artifact, TrtArtifact)
    }
    assert engines["denoiser"].profiles[0].dimensions["S"] == (Range(4, 64, 64) if guided else Range(64, 1024, 1024))  # no VAE: latent px
    assert engines["denoiser"].network.attentions == 3
    if guided:
        (decoding,) = engines["decoder"].profiles
        assert decoding.dimensions["h"] == Range(2, 8, 8)
        assert decoding.shape(made.manifest.graphs["decoder"].outputs[0], "max") == (2, 3, 32, 32)


@pytest.mark.parametrize("precision", narrow(["fp32", "fp16"]))
def test_a_z_image_denoiser_builds(room: ModuleType, tmp_path: Path, precision: str) -> None:
    folders.write(tmp_path / "f", folders.z_image(), decoder=False)
    captured = capture_folder(tmp_path / "f", None, Span(16, 16), Span(1, 2))
    onnx = target("onnx")
    bundle = export_capture(captured, "onnx", onnx.options(precision=precision), tmp_path / "out", "elastic-export onnx f")
    options = room.TrtOptions(sms=(89,), buckets=room.read_buckets("none", bundle.manifest.axes), precision=precision)
    made = export_bundle(bundle, "trt", options)
    (engine,) = (artifact for artifact in made.manifest.graphs["denoiser"].artifacts if isinstance(artifact, TrtArtifact))
    dimensions = engine.profiles[0].dimensions
    assert (dimensions["S"], dimensions["T"]) == (Range(32, 64, 64), Range(32, 512, 512))
    assert engine.network.attentions == 4  # of two refiners and two blocks


@pytest.mark.wide
def test_krea_2_builds_with_what_fuses_its_text_and_both_halves_of_its_vae(room: ModuleType, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.krea2())
    captured = capture_folder(tmp_path / "f", ("transformer", "vae", "encoder"), Span(16, 32), Span(1, 2), max_sequence_length=16)
    bundle = export_capture(captured, "onnx", target("onnx").options(), tmp_path / "out", "elastic-export onnx f", verify="none")
    options = room.TrtOptions(sms=(89,), buckets=room.read_buckets("none", bundle.manifest.axes))
    made = export_bundle(bundle, "trt", options)
    graphs = made.manifest.graphs
    engines = {name: artifact for name, graph in graphs.items() for artifact in graph.artifacts if isinstance(artifact, TrtArtifact)}
    assert {name: engine.network.attentions for name, engine in engines.items()} == {
        "denoiser": 2, "text_fusion": 3, "decoder": 1, "encoder": 1,
    }  # fmt: skip
    assert engines["text_fusion"].profiles[0].dimensions["T"] == Range(1, 16, 16)
    (encoding,) = engines["encoder"].profiles
    ends = [encoding.shape(graphs["encoder"].inputs[0], end) for end in ("min", "max")]
    assert ends == [(1, 3, 8, 8), (2, 3, 32, 32)]  # the picture has twice the latent's sides


@pytest.mark.wide
def test_elit_on_qwen_image_builds(room: ModuleType, golden: Path, tmp_path: Path) -> None:
    captured = capture_folder(golden / "elit-qwen-image-a", None, Sides(16, 24), Span(1, 2))
    bundle = export_capture(captured, "onnx", target("onnx").options(), tmp_path / "out", "elastic-export onnx f")
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets=room.read_buckets("24,96", bundle.manifest.axes)))
    (engine,) = (artifact for artifact in made.manifest.graphs["denoiser"].artifacts if isinstance(artifact, TrtArtifact))
    assert [profile.dimensions["J"] for profile in engine.profiles] == [Range(1, 4, 4), Range(5, 16, 16)]
    assert engine.network.attentions == 6  # of four blocks, Read and Write
