"""The plain public backbones from the command line: made from a checkpoint, verified and drawn; they have no axis, some have no classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

import numpy as np
import torch
from conftest import Outcome
from PIL import Image

from elastic_export.capture.zoo import FAMILIES
from elastic_export.families.layers import randomize

Run = Callable[..., Outcome]
UVIT = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
HDIT = {
    "input_channels": 1, "input_size": [16, 24], "patch_size": [2, 2], "depths": [2, 1], "widths": [16, 32], "d_ffs": [48, 96],
    "self_attns": [{"type": "shifted-window", "d_head": 8, "window_size": 4}, {"type": "global", "d_head": 16}],
    "mapping_depth": 1, "mapping_width": 16, "mapping_d_ff": 48, "sigma_data": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run, str, dict[str, Any]], Path]:
    """A bundle of a small model, made once through the command from a bare state dict and a config. Tests must not change it."""
    folder = tmp_path_factory.mktemp("backbones")

    def bundle(run: Run, family: str, sizes: dict[str, Any]) -> Path:
        output = folder / family
        if not output.exists():
            module = FAMILIES[family].build(FAMILIES[family].params(**sizes))
            randomize(module, seed=0)
            torch.save(module.state_dict(), folder / f"{family}.pt")
            (folder / f"{family}.json").write_text(json.dumps(sizes))
            arguments = ("--checkpoint", folder / f"{family}.pt", "--config", folder / f"{family}.json")
            done = run("onnx", family, *arguments, "-o", output, "-q")
            assert done.code == 0, done.err
        return output

    return bundle


Made = Callable[[Run, str, dict[str, Any]], Path]


@pytest.mark.parametrize(("family", "sizes"), [("uvit", UVIT), ("hdit", HDIT)])
def test_they_are_verified_and_shown(run: Run, made: Made, family: str, sizes: dict[str, Any]) -> None:
    bundle = made(run, family, sizes)
    verified = run("verify", bundle)
    assert verified.code == 0, verified.err
    assert "fixed" in verified.out
    shown = run("inspect", bundle).out
    assert "axis" not in shown
    assert ("4 classes" in shown) == (family == "uvit")


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", "ddim", "ab2", "ab3"])
def test_uvit_draws_classes(run: Run, made: Made, tmp_path: Path, sampler: str) -> None:
    bundle = made(run, "uvit", UVIT)
    done = run(
        "generate", bundle, "-o", tmp_path / "a.png", "--classes", "0,3", "--steps", "4", "--guidance", "1.4", "--sampler", sampler,
        "--json", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["sampler"], record["guidance"], record["classes"]) == (sampler, 1.4, [0, 3])
    assert [step["budget"] for step in record["steps"]] == [{}] * 4
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 0


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler", "heun", "ab2", "ab3"])
def test_hdit_draws_from_noise_alone(run: Run, made: Made, tmp_path: Path, sampler: str) -> None:
    bundle = made(run, "hdit", HDIT)
    done = run("generate", bundle, "-o", tmp_path / "a.png", "--steps", "4", "--sampler", sampler, "--json", "-q")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["sampler"], record["guidance"], record.get("classes")) == (sampler, 1.0, None)
    assert record["steps"][0]["time"] == 160.0
    (tmp_path / "again.json").write_text(done.out)
    again = run("generate", bundle, "-o", tmp_path / "b.png", "--request", tmp_path / "again.json", "-q")
    assert again.code == 0, again.err
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_a_goal_chooses_among_steps(run: Run, made: Made, tmp_path: Path) -> None:
    done = run("generate", made(run, "hdit", HDIT), "-o", tmp_path / "a.png", "--target-ms", "60000", "--steps", "5", "--json", "-q")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["steps"]) == 5


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("uvit", ["--latents", "4"], "this model has no axis 'latents'; it has none"),
        ("uvit", ["--classes", "4"], "this model has classes 0 to 3, got 4"),
        ("uvit", ["--sampler", "euler"], "whose schedule is vp_sde, takes dpm++2m, ddpm, ddim, ab2 or ab3"),
        ("hdit", ["--sampler", "ddim"], "whose schedule is edm, takes dpm++2m, euler, heun, ab2 or ab3"),
        ("hdit", ["--classes", "1"], "hdit draws from noise alone: leave --classes out"),
        ("hdit", ["--prompt", "a cat"], "hdit draws from noise alone: leave --prompt out"),
        ("hdit", ["--guidance", "2"], "hdit has no classes to lead away from: leave guidance_scale out"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, made: Made, tmp_path: Path, family: str, arguments: list[str], message: str) -> None:
    bundle = made(run, family, {"uvit": UVIT, "hdit": HDIT}[family])
    done = run("generate", bundle, "-o", tmp_path / "a.png", "--steps", "3", "-q", *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())


def test_an_axis_cannot_be_narrowed_where_there_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "u.json").write_text(json.dumps(UVIT))
    done = run("onnx", "uvit", "--config", tmp_path / "u.json", "--random-weights", "--latents", "4", "-o", tmp_path / "u", "-q")
    assert done.code == 2
    assert "uvit has no axis 'latents'; it has none" in done.err
