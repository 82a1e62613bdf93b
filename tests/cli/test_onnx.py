import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

import torch
from conftest import Outcome

from elastic_runtime import Bundle, ElasticPipeline
from elastic_runtime.contract import artifacts
from elastic_runtime.contract.precision import PRECISIONS

Run = Callable[..., Outcome]


@pytest.fixture
def elit_c(golden: Path) -> list[object]:
    """Arguments that name the smallest golden model."""
    return ["elit-sit", "--checkpoint", golden / "elit-c.pt", "--config", golden / "elit-c.json"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_leaves_the_contract_and_says_so_in_json(run: Run, elit_c: list[object], tmp_path: Path) -> None:
    import onnx

    done = run("onnx", *elit_c, "-o", tmp_path / "out", "--latents", "8-32", "--batch", "1-2", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["schema"] == "elastic-export/onnx/1"
    assert document["manifest"]["axes"][0]["min"] == 8
    rows = document["manifest"]["graphs"]["denoiser"]["artifacts"][0]["verified"]
    assert [row["budget"]["latents"] for row in rows] == Bundle.open(tmp_path / "out").manifest.axis("latents").probes()
    assert all(row["passed"] and row["max_abs"] <= 1e-5 for row in rows)
    graph = onnx.load(tmp_path / "out/onnx/denoiser.onnx").graph
    names = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)
    }
    assert names == {
        "sample": ["B", 4, 16, 16], "timestep": ["B"], "class_labels": ["B"], "latent_ids": ["J"], "prediction": ["B", 4, 16, 16],
    }  # fmt: skip
    provenance = document["manifest"]["provenance"]
    assert provenance["command"].startswith("elastic-export onnx elit-sit --checkpoint elit-c.pt")
    assert str(tmp_path) not in provenance["command"]
    assert (provenance["checkpoint"], document["manifest"]["model"]["weights"]) == ("elit-c.pt", "checkpoint")
    assert document["manifest"]["model"]["config"]["head_blocks"] == 1


def test_a_bundle_is_not_clobbered_and_another_opset_joins_it(run: Run, elit_c: list[object], bundle_copy: Path) -> None:
    before = files(bundle_copy)
    refused = run("onnx", *elit_c, "-o", bundle_copy)
    assert refused.code == 2
    assert "denoiser.onnx exists: choose another -o/--output, or replace it with --overwrite" in refused.err
    assert files(bundle_copy) == before

    joined = run("onnx", *elit_c, "-o", bundle_copy, "--opset", 20)
    assert joined.code == 0, joined.err
    bundle = Bundle.open(bundle_copy, hashes=True)
    assert {artifact.path for artifact in bundle.manifest.graphs["denoiser"].artifacts} == {
        "onnx/denoiser.onnx",
        "onnx/denoiser.opset20.onnx",
    }
    assert files(bundle_copy)["onnx/denoiser.onnx"] == before["onnx/denoiser.onnx"]
    assert all(row.passed for artifact in bundle.manifest.graphs["denoiser"].artifacts for row in artifact.verified)

    narrower = run("onnx", *elit_c, "-o", bundle_copy, "--latents", "8-64")
    assert narrower.code == 2
    assert "its latents: 4-64 there, 8-64 here" in narrower.err
    other = run("onnx", "--random-weights", *elit_c[:1], *elit_c[3:], "-o", bundle_copy)
    assert other.code == 2
    assert "holds another export" in other.err


def test_overwriting_replaces_another_export(run: Run, elit_c: list[object], bundle_copy: Path) -> None:
    done = run("onnx", *elit_c, "-o", bundle_copy, "--latents", 64, "--batch", 1, "--overwrite")
    assert done.code == 0, done.err
    bundle = Bundle.open(bundle_copy, hashes=True)
    assert list(bundle.manifest.axis("latents").values) == [64]
    assert bundle.manifest.graphs["denoiser"].batch.max == 1


def test_half_precision_is_verified_at_its_own_tolerance(
    run: Run, elit_c: list[object], golden_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    done = run("onnx", *elit_c, "-o", tmp_path / "half", "--dtype", "fp16", "--json")
    assert done.code == 0, done.err
    (artifact,) = json.loads(done.out)["manifest"]["graphs"]["denoiser"]["artifacts"]
    assert (artifact["precision"], artifact["files"][0]["path"]) == ("fp16", "onnx/denoiser.fp16.onnx")
    assert all(row["passed"] and 0 < row["max_abs"] < 2e-2 for row in artifact["verified"])
    assert artifact["files"][0]["bytes"] < 0.7 * (golden_bundle("c").folder / "onnx/denoiser.onnx").stat().st_size


@pytest.mark.parametrize("exists", [True, False])
def test_a_budget_that_misses_its_tolerance_fails_the_export_and_nothing_is_lost(
    exists: bool, run: Run, elit_c: list[object], bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exists:
        shutil.rmtree(bundle_copy)
    before = files(bundle_copy) if exists else {}
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], tolerance=1e-9))
    monkeypatch.setattr(artifacts, "ROUNDINGS", 0)  # the original's own rounding is more than that
    done = run("onnx", *elit_c, "-o", bundle_copy, "--opset", 20)
    assert done.code == 1
    assert "fails at latents=4: max abs error" in done.err
    assert "tolerance is 1e-09" in done.err
    assert (files(bundle_copy) if bundle_copy.exists() else {}) == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == (["bundle"] if exists else [])


def test_random_weights_are_recorded_and_said(run: Run, elit_c: list[object], tmp_path: Path) -> None:
    done = run("onnx", "elit-sit", *elit_c[3:], "--random-weights", "-o", tmp_path / "random", "--latents", 64, "--batch", 1)
    assert done.code == 0, done.err
    assert "the weights are random" in done.err
    manifest = Bundle.open(tmp_path / "random").manifest
    assert (manifest.model.weights, manifest.provenance.checkpoint) == ("random", None)


def test_a_dry_run_tells_the_budgets_and_writes_nothing(run: Run, elit_c: list[object], tmp_path: Path) -> None:
    done = run("onnx", *elit_c, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.err
    assert "would write" in done.out
    assert "latents=4, latents=24" in done.out
    estimate = json.loads(run("onnx", *elit_c, "-o", tmp_path / "out", "--dry-run", "--json").out)
    assert (estimate["dry_run"], estimate["verify"][0]) == (True, "latents=4")
    ends = json.loads(run("onnx", *elit_c, "-o", tmp_path / "out", "--dry-run", "--json", "--verify", "ends").out)
    assert ends["verify"] == ["latents=4", "latents=64"]
    none = run("onnx", *elit_c, "-o", tmp_path / "out", "--dry-run", "--verify", "none").out
    assert "not verified" in none
    assert "verified at" not in none
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latents", "6-64"], "latents 6 is not available: this model offers 4-64 in steps of 4; the nearest is 4"),
        (["--latents", "4-128"], "latents 128 is not available"),
        (["--latents", "64-4"], "reversed: write 4-64"),
        (["--latents", "many"], "a span is written 32-256 or 64, got 'many'"),
        (["--batch", "0-2"], "--batch must start at 1 or more, got 0-2"),
        (["--batch", "4-1"], "reversed: write 1-4"),
        (["--opset", "19"], "--opset must be one of 20, 23, got 19"),
        (
            ["--precision", "int3"],
            "--precision for onnx must be one of fp32, fp16, bf16, int8, int8w, int4w, int8qdq, fp8, int4qdq, nvfp4, got int3",
        ),
        (["--dtype", "bf16", "--opset", "20"], "--precision bf16 needs --opset 23, got 20"),
        (["--head-blocks", "3"], "head_blocks 3 + tail_blocks 1 must leave a core in depth 4"),
        (["--head-blocks", "-1"], "Invalid value for '--head-blocks'"),
        (["--vae", "nowhere"], "holds no config.json: give the folder of a diffusers AutoencoderKL"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_wrong_option_is_answered_in_a_sentence(
    dry: bool, options: list[str], message: str, run: Run, elit_c: list[object], tmp_path: Path
) -> None:
    done = run("onnx", *elit_c, "-o", tmp_path / "out", *options, *(["--dry-run"] if dry else []))
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_contradicts_the_checkpoint_is_answered_with_both_values(
    run: Run, elit_c: list[object], golden: Path, tmp_path: Path
) -> None:
    config = json.loads((golden / "elit-c.json").read_text())
    for change, message in (
        ({"hidden_size": 64}, "hidden_size is 32 by the checkpoint's shapes but 64 by config"),
        ({"head_blocks": 2}, "Override with --head-blocks"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"family": "dit"}, "is of family 'dit'"),
        ({"num_heads": "four"}, "num_heads must be a whole number, got 'four'"),
        ({"num_heads": 5}, "hidden_size 32 must be a multiple of num_heads 5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        done = run("onnx", *elit_c[:3], "--config", tmp_path / "config.json", "-o", tmp_path / "out")
        assert done.code == 2
        assert message in done.err
    for text, message in (("{", "is not JSON"), ("[1]", "must hold a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        done = run("onnx", *elit_c[:3], "--config", tmp_path / "config.json", "-o", tmp_path / "out")
        assert (done.code, message in done.err) == (2, True), done.err
    done = run("onnx", *elit_c[:3], "--config", tmp_path / "nowhere.json", "-o", tmp_path / "out")
    assert (done.code, "cannot read --config" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["elit-mnst"], "there is no model 'elit-mnst'; did you mean elit-mnist"),
        (["zzzz"], "there is no model 'zzzz'; see: elastic-export models"),
        (["elit-sit-xl-256"], "needs its weights: give --checkpoint FILE (.pt or .safetensors), or say --random-weights aloud"),
        (["elit-sit", "--random-weights"], "nothing tells input_size"),
        (["elit-mnist", "--head-blocks", "3"], "is a packaged sample with its own weights: --head-blocks does not go with it"),
        (["elit-mnist", "--random-weights"], "is a packaged sample with its own weights: --random-weights does not go with it"),
        (["elit-sit", "--checkpoint", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["elit-sit-xl-256", "--checkpoint", "x.pt", "--random-weights"], "give --checkpoint or --random-weights, not both"),
    ],
)
def test_a_model_that_cannot_be_had_is_answered_in_a_sentence(arguments: list[str], message: str, run: Run, tmp_path: Path) -> None:
    done = run("onnx", *arguments, "-o", tmp_path / "out")
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_bundle_is_never_replaced(run: Run, elit_c: list[object], tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "file"
    folder.mkdir()
    (folder / "cat.jpg").write_text("cat")
    file.write_text("text")
    for output in (folder, file):
        done = run("onnx", *elit_c, "-o", output, "--overwrite")
        assert done.code == 2
        assert f"{output.name} exists and is not a bundle; it is left alone" in done.err
    assert (folder / "cat.jpg").read_text() == "cat"
    assert file.read_text() == "text"


def test_a_damaged_bundle_is_only_replaced_when_told_to(run: Run, elit_c: list[object], bundle_copy: Path) -> None:
    (bundle_copy / "onnx/denoiser.onnx").write_bytes(b"cut")
    refused = run("onnx", *elit_c, "-o", bundle_copy, "--opset", 20)
    assert (refused.code, "is damaged" in refused.err) == (2, True)
    done = run("onnx", *elit_c, "-o", bundle_copy, "--opset", 20, "--latents", 64, "--batch", 1, "--overwrite")
    assert done.code == 0, done.err
    assert [artifact.path for artifact in Bundle.open(bundle_copy, hashes=True).manifest.graphs["denoiser"].artifacts] == [
        "onnx/denoiser.opset20.onnx"
    ]


def test_a_vae_adds_the_decoder_and_pictures_come_out(run: Run, elit_c: list[object], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="--vae needs diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    # two pictures a run at least, as a server may want it: the decoder must still take what is left over
    done = run("onnx", *elit_c, "-o", tmp_path / "out", "--latents", 64, "--batch", "2-4", "--vae", tmp_path / "vae")
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.model.vae is not None
    assert (manifest.model.vae.scaling_factor, manifest.model.vae.shift_factor, manifest.model.vae.upscale) == (0.5, 0.25, 2)
    assert all(row.passed for row in manifest.graphs["decoder"].artifacts[0].verified)
    done = run("generate", tmp_path / "out", "-o", tmp_path / "row.png", "--classes", "1,2", "--steps", 1, "--guidance", 1)
    assert done.code == 0, done.err
    with ElasticPipeline.from_pretrained(tmp_path / "out") as pipe:
        latents = pipe([1, 2, 3], num_inference_steps=1, output_type="latent").images
        ours = pipe.images(latents, "np")
        with torch.inference_mode():
            theirs = vae.decode(torch.from_numpy(latents / 0.5 + 0.25).float()).sample.numpy()
    assert abs(ours - (theirs.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1)).max() < 1e-4

    wrong = run("onnx", "elit-mnist", "-o", tmp_path / "other", "--vae", tmp_path / "vae")
    assert (wrong.code, "decodes 4 channels, but the model draws 1" in wrong.err) == (2, True), wrong.err


def test_training_only_weights_are_said_to_be_ignored(run: Run, elit_c: list[object], golden: Path, tmp_path: Path) -> None:
    from elastic_export.foreign.checkpoint import read_checkpoint

    weights: dict[str, Any] = dict(read_checkpoint(golden / "elit-c.pt").weights) | {"projectors.0.weight": torch.zeros(1)}
    torch.save({"ema": weights, "args": None}, tmp_path / "c.pt")
    done = run("onnx", "elit-sit", "--checkpoint", tmp_path / "c.pt", *elit_c[3:], "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.err
    assert "ignored 1 training-only weights, projectors.0.weight among them" in done.err
