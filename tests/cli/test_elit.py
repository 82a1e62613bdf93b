"""Every backbone of ELIT from the command line: a checkpoint is exported, proven again and drawn; another backbone's is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cases import narrow

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

from conftest import Outcome
from PIL import Image

from elastic_runtime import Bundle

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of four channels."""
    diffusers = pytest.importorskip("diffusers", reason="--vae needs diffusers")
    folder: Path = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("family", "name", "prediction"),
    narrow(
        [
            ("elit-uvit", "uvit-b", "velocity"),
            ("elit-hdit", "hdit-a", "velocity"),
            ("elit-uvit-tokens", "uvit-tokens-a", "epsilon"),
            ("elit-hdit-levels", "hdit-levels-a", "edm"),
        ]
    ),
)
def test_a_checkpoint_is_exported_verified_and_drawn(
    run: Run, golden: Path, vae: Path, tmp_path: Path, family: str, name: str, prediction: str
) -> None:
    out = tmp_path / "out"
    sources = ("--checkpoint", golden / f"elit-{name}.pt", "--config", golden / f"elit-{name}.json")
    done = run("onnx", family, *sources, "-o", out, *(("--vae", vae) if prediction != "edm" else ()))
    assert done.code == 0, done.err
    manifest = Bundle.open(out).manifest
    assert (manifest.model.family, manifest.model.prediction) == (family, prediction)
    assert [row.budget["latents"] for row in manifest.cost] == list(manifest.axis("latents").values)
    done = run("verify", out)
    assert done.code == 0, done.err
    done = run(
        "generate", out, "-o", tmp_path / "row.png", "--classes", "1,2", "--steps", 2, "--latents", "16,48", "--guidance-latents", 16
    )
    assert done.code == 0, done.err
    with Image.open(tmp_path / "row.png") as picture:
        assert picture.width > picture.height >= 32


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("elit-sit", "uvit-a", "so it is an elit-uvit, not an elit-sit: export it as elit-uvit"),
        ("elit-hdit", "a", "so it is an elit-sit, not an elit-hdit: export it as elit-sit"),
    ],
)
def test_another_backbones_checkpoint_is_refused(run: Run, golden: Path, tmp_path: Path, family: str, name: str, message: str) -> None:
    done = run("onnx", family, "--checkpoint", golden / f"elit-{name}.pt", "-o", tmp_path / "out")
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_its_tail_is_refused(run: Run, golden: Path, tmp_path: Path) -> None:
    sources = ("--checkpoint", golden / "elit-uvit-a.pt", "--config", golden / "elit-uvit-a.json")
    done = run("onnx", "elit-uvit", *sources, "--head-blocks", 1, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 2
    assert "head_blocks 1 must equal tail_blocks 2" in done.err
