"""Diffusers folders through `elastic-export onnx`: every component at every size, through ONNX Runtime."""

import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

import folders
import onnx
import torch
from conftest import Outcome
from diffusers import FluxTransformer2DModel

from elastic_runtime import Bundle, Span, open_session

Run = Callable[..., Outcome]


def rows(bundle: Bundle, graph: str) -> list[tuple[int, ...]]:
    """Sizes that a graph was proven at."""
    (artifact,) = bundle.manifest.graphs[graph].artifacts
    assert all(row.passed and row.max_abs <= row.tolerance for row in artifact.verified)
    assert artifact.precision == "fp16" or artifact.verified[0].tolerance < 2e-5
    return [tuple(row.budget.values()) for row in artifact.verified]


def test_a_whole_flux_folder_becomes_a_bundle(run: Run, tmp_path: Path) -> None:
    folders.write(tmp_path / "tiny-flux", folders.flux(), text=True)
    done = run("onnx", tmp_path / "tiny-flux", "-o", tmp_path / "out", "--batch", "1-2", "--json")
    assert done.code == 0, done.err
    bundle = Bundle.open(tmp_path / "out", hashes=True)
    manifest = bundle.manifest
    assert list(manifest.graphs) == ["denoiser", "decoder", "text_encoder", "text_encoder_2"]
    assert rows(bundle, "denoiser") == [(1, 4), (4, 25), (4, 34), (6, 64)]  # T, tokens; the middle of 1 to 6 is off the track, too
    assert (manifest.axis("tokens").carrier, manifest.axis("tokens").span) == ("shape", Span(4, 64))
    assert "denoiser/T=6,tokens=64/prediction" in bundle.reference()
    assert [row.budget for row in manifest.cost] == [{"tokens": count} for count in (4, 34, 64)]
    assert rows(bundle, "decoder") == [(4, 4), (9, 9), (10, 9), (9, 10), (16, 16)]
    assert len(rows(bundle, "text_encoder")) == len(rows(bundle, "text_encoder_2")) == 1
    assert (
        bundle.file("tokenizer/text_encoder_2/tokenizer.json").read_bytes()
        == (tmp_path / "tiny-flux" / "tokenizer_2" / "tokenizer.json").read_bytes()
    )
    assert manifest.provenance.checkpoint == "tiny-flux"
    assert json.loads(done.out)["manifest"]["model"]["patches"] == {
        "size": 2, "positions": "img_ids", "table": None, "guidance_embeds": True, "layout": "origin", "multiple": None,
    }  # fmt: skip
    model = onnx.load(bundle.file("onnx/denoiser.onnx"))
    assert {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input} == {
        "hidden_states": ["B", "S", 16], "encoder_hidden_states": ["B", "T", 16], "pooled_projections": ["B", 8], "timestep": ["B"],
        "img_ids": ["S", 3], "txt_ids": ["T", 3], "guidance": ["B"],
    }  # fmt: skip
    doubles = [value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE]
    assert not doubles
    shape = [
        dim.dim_param or dim.dim_value for dim in onnx.load(bundle.file("onnx/decoder.onnx")).graph.output[0].type.tensor_type.shape.dim
    ]
    assert shape == ["B", 3, "2*h", "2*w"]
    with open_session(bundle, "decoder") as session:
        assert session.run({"latent": np.zeros((1, 4, 5, 13), np.float32)})["image"].shape == (1, 3, 10, 26)


@pytest.mark.parametrize(
    ("name", "transformer", "dtype"),
    narrow(
        [
            ("sd3", lambda: folders.sd3(), "fp32"),
            ("schnell", lambda: folders.flux(guidance_embeds=False), "fp16"),
            ("z-image", lambda: folders.z_image(), "fp16"),
        ]
    ),
    ids=["sd3", "schnell", "z-image"],
)
def test_every_kind_of_transformer_exports_alone(run: Run, tmp_path: Path, name: str, transformer: Callable[[], Any], dtype: str) -> None:
    folders.write(tmp_path / name, transformer(), decoder=name == "sd3")
    size = "16-24" if name == "sd3" else "8-16"  # without a VAE, pixels are those of the latent
    options = ["--components", "transformer", "--size", size, "--batch", "1-2", "--precision", dtype]
    done = run("onnx", tmp_path / name, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    bundle = Bundle.open(tmp_path / "out")
    assert list(bundle.manifest.graphs) == ["denoiser"]
    assert len(set(rows(bundle, "denoiser"))) == (4 if name == "z-image" else 5)  # one count of tokens at this size
    inputs = {spec.name for spec in bundle.manifest.graphs["denoiser"].inputs}
    assert ("guidance" in inputs, "pos_ids" in inputs) == (False, name.startswith("sd3"))
    assert ("pooled_projections" in inputs) == (name != "z-image")
    assert bundle.manifest.model.text is not None
    assert bundle.manifest.model.text.encoders == ()


def test_the_golden_flux_agrees_at_every_stage(run: Run, golden: Path, tmp_path: Path) -> None:
    """Recorded inputs of the stages of both presets, through ONNX Runtime, against diffusers' own transformer."""
    done = run("onnx", golden / "ralu-flux", "-o", tmp_path / "out", "--components", "transformer", "--size", "512", "--batch", "1")
    assert done.code == 0, done.err
    recorded = np.load(golden / "ralu-flux" / "io.npz")
    original = FluxTransformer2DModel.from_pretrained(golden / "ralu-flux" / "transformer", low_cpu_mem_usage=False).eval()
    shared = {"encoder_hidden_states": recorded["prompt_embeds"], "pooled_projections": recorded["pooled"]}
    shared |= {"txt_ids": np.zeros((24, 3), np.float32), "guidance": np.array([3.5], np.float32)}
    with open_session(Bundle.open(tmp_path / "out")) as session, torch.inference_mode():
        for preset, tokens in (("preset4", 256), ("preset4", 484), ("preset4", 1024), ("preset7", 331)):
            step = int(np.flatnonzero(recorded[f"{preset}.tokens"] == tokens)[0])
            feeds = shared | {
                "hidden_states": recorded[f"{preset}.stage_input_{tokens}"][None],
                "img_ids": recorded[f"{preset}.ids_{tokens}"],
                "timestep": recorded[f"{preset}.timesteps"][step : step + 1].astype(np.float32),
            }
            wanted = original(**{name: torch.from_numpy(array) for name, array in feeds.items()}, return_dict=False)[0].numpy()
            assert np.abs(session.run(feeds)["prediction"] - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


def test_a_dry_run_tells_memory_and_sizes_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux(), text=True)
    done = run("onnx", tmp_path / "f", "-o", tmp_path / "out", "--dry-run", "--json")
    estimate = json.loads(done.out)
    assert set(estimate["peak_bytes"]) == {"denoiser", "decoder", "text_encoder", "text_encoder_2"}
    shown = run("onnx", tmp_path / "f", "-o", tmp_path / "out", "--dry-run", "-q").out
    assert re.search(r"decoder: 0\.\d MB on disk, about 65\d\.\d MB of memory at most while exporting, verified at h=4,w=4, ", shown)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latents", "4-8", "--vae", "x"], "has its own sizes and weights: --latents, --vae do not go with it"),
        (
            ["--components", "vae", "--conditions-apart"],
            "--conditions-apart is for a denoiser, and --components vae has none: leave it out, or add transformer",
        ),
        (["--components", "vae", "--precision", "denoiser=int4w", "--rounding", "gptq"], "--rounding gptq is for a denoiser, and"),
        (["--components", "vae", "--precision", "denoiser=int4w", "--keep", "1"], "--keep 1 is for a denoiser, and"),
        (["--components", "vae,unet"], "--components are transformer, vae, text, encoder, got unet"),
        (["--tokens", "4-65"], "--tokens 4-65 does not go with sides of 16-32 pixels"),
    ],
)
def test_options_of_other_models_are_refused(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    folders.write(tmp_path / "f", folders.flux())
    done = run("onnx", tmp_path / "f", "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    other = run("onnx", "elit-sit", "--random-weights", "-o", tmp_path / "out", "--components", "vae")
    assert "--components, --size, --max-sequence-length and --adapter are for a diffusers folder, and elit-sit is none" in other.err


def test_a_dry_run_tells_sizes_to_within_a_tenth(run: Run, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux(num_layers=2, num_attention_heads=8, attention_head_dim=64, axes_dims_rope=(16, 24, 24)))
    for precision in ("fp32", "int4w"):
        words = (
            "onnx",
            tmp_path / "f",
            "-o",
            tmp_path / precision,
            "--precision",
            precision,
            "--components",
            "transformer",
            "--verify",
            "none",
        )
        estimate = json.loads(run(*words, "--dry-run", "--json").out)["file_bytes"]["denoiser"]
        made = json.loads(run(*words, "--json").out)["manifest"]["graphs"]["denoiser"]["artifacts"][0]["files"]
        assert estimate == pytest.approx(sum(file["bytes"] for file in made), rel=0.1), precision


def test_another_precision_joins_beside_the_decoder_that_is_there(run: Run, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux())
    words = ("onnx", tmp_path / "f", "-o", tmp_path / "out", "--size", "16", "--batch", "1-2", "--json")
    first = json.loads(run(*words).out)["manifest"]["graphs"]
    done = run(*words, "--precision", "int8w")
    second = json.loads(done.out)["manifest"]["graphs"]
    assert second["decoder"] == first["decoder"]
    assert [artifact["precision"] for artifact in second["denoiser"]["artifacts"]] == ["fp32", "int8w"]
    again = run(*words, "--precision", "int8w")
    assert (again.code, "denoiser.int8w.onnx exists: choose another" in again.err) == (2, True)


def test_a_disk_that_is_too_small_is_found_before_anything_is_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.write(tmp_path / "f", folders.flux(), decoder=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    done = run("onnx", tmp_path / "f", "-o", tmp_path / "out", "--components", "transformer")
    assert done.code == 2
    assert re.search(rf"the artifacts need 0\.00 GB, and {re.escape(str(tmp_path / 'out'))} has 0\.00 GB free: make room", done.err)
    assert not (tmp_path / "out" / "elastic.json").exists()


def test_a_dry_run_refuses_what_the_run_would(run: Run, tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux())
    command = ("onnx", tmp_path / "f", "-o", tmp_path / "out", "--components", "transformer")
    assert run(*command).code == 0
    for arguments, message in (((), "onnx/denoiser.onnx exists"), (("--size", "32"), "holds another export")):
        for dry in ((), ("--dry-run",)):
            done = run(*command, *arguments, *dry)
            assert (done.code, message in done.err) == (2, True), done.err
    assert run(*command, "--overwrite", "--dry-run").code == 0


def test_what_was_taken_for_granted_is_noted(run: Run, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux())
    (folder / "model_index.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    done = run("onnx", folder, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    notes = " ".join(done.err.split())
    assert "has no model_index.json: it is taken for a model of prompts whose components are transformer, vae" in notes
    assert "has no scheduler: plain sampling (plan full) will space its steps evenly" in notes


def test_a_bundle_of_other_components_is_shown_and_not_timed(run: Run, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux())
    assert run("onnx", folder, "-o", tmp_path / "out", "--components", "vae").code == 0
    shown = run("inspect", tmp_path / "out")
    assert (shown.code, "cost of one sample" in shown.out) == (0, False)
    timed = run("bench", tmp_path / "out", "--runtimes", "onnxruntime")
    assert (timed.code, "has no graph 'denoiser', it has decoder" in " ".join(timed.err.split())) == (2, True)
    drawn = run("generate", folder, "-o", tmp_path / "a.png")
    assert f"It is a diffusers folder: elastic-export onnx {folder} -o BUNDLE" in " ".join(drawn.err.split())


def test_a_packaged_folder_is_a_sample_by_its_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastic_export.capture import zoo

    folder = folders.write(tmp_path / "tiny-digits", folders.flux(guidance_embeds=False))
    labels = {"id2label": {str(label): str(label) for label in range(folders.POOLED)}}
    listed = {name: ["diffusers", name] for name in ("transformer", "vae")}
    (folder / "model_index.json").write_text(json.dumps(labels | listed))
    (tmp_path / "tiny-digits.json").write_text(json.dumps({"family": "flux", "quality": []}))
    monkeypatch.setattr(zoo, "_PRETRAINED", tmp_path)
    entry = json.loads(run("models", "--json").out)["models"][0]
    assert (entry["name"], entry["family"], entry["weights"], entry["axes"]) == ("tiny-digits", "flux", "packaged", "tokens 4-64")
    assert 0 < entry["gflops"][0] < entry["gflops"][1]
    done = run("onnx", "tiny-digits", "-o", tmp_path / "out", "--dry-run", "--json")
    model = json.loads(done.out)["model"]
    assert (model["name"], model["num_classes"], model["text"]) == ("tiny-digits", folders.POOLED, None)
