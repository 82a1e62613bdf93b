"""The tokens axis from the command line: export and refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")

from conftest import Outcome

from elastic_runtime import Bundle, Span

Run = Callable[..., Outcome]
SIZES = {
    "input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 10, "dechunk_kernel_sigma": 1.0,
    "enc_dec_dim_factor": 1, "encoder": "c1", "decoder": "c1",
}  # fmt: skip


def made(run: Run, folder: Path, *more: object) -> Outcome:
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(SIZES))
    return run("onnx", "dc-dit", "--config", config, "--random-weights", "-o", folder, "-q", *more)


def test_a_bundle_offers_the_caps_that_were_asked_for(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")
    done = made(run, tmp_path / "out", "--tokens", "8-32", "--batch", "1-2")
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.axis("tokens").span == Span(8, 32)
    assert [row.budget["tokens"] for row in manifest.cost] == list(range(8, 33))
    assert [row.flops for row in manifest.cost] == sorted({row.flops for row in manifest.cost})
    assert manifest.model.learned_variance
    (artifact,) = manifest.graphs["denoiser"].artifacts
    assert {row.budget["tokens"] for row in artifact.verified} >= {8, 32}
    assert all(row.passed for row in artifact.verified)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "3-64"], "tokens 3 is not available: this model offers 4-64; the nearest is 4"),
        (["--tokens", "4-65"], "tokens 65 is not available: this model offers 4-64; the nearest is 64"),
        (["--tokens", "64-8"], "is reversed"),
        (["--latents", "8-64"], "dc-dit has no axis 'latents'; it has tokens"),
    ],
)
def test_spans_that_the_model_does_not_offer(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = made(run, tmp_path / "out", *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_the_recorded_checkpoint_is_planned_from_its_config(run: Run, golden: Path, tmp_path: Path) -> None:
    sources = ("--checkpoint", golden / "dcdit-a.pt", "--config", golden / "dcdit-a.json")
    done = run("onnx", "dc-dit", *sources, "-o", tmp_path / "out", "--tokens", "16-256", "--dry-run", "--json")
    assert done.code == 0, done.err
    estimate = json.loads(done.out)
    assert estimate["verify"] == ["tokens=16", "tokens=100", "tokens=136", "tokens=256"]
    assert estimate["model"]["config"]["num_heads"] == 4
