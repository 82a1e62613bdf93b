import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers", reason="the recipe trains diffusers' classes")

import train_ralu
from digits import Digits
from train_ralu import GRID, LOW, grown, packed, pictures_of, raster, sequence, train_transformer, train_vae
from training import parser


@pytest.fixture
def shades() -> Digits:
    """Easy pictures: each of one shade."""
    levels = np.random.default_rng(0).uniform(-1, 1, (8, 1, 1, 1)).astype(np.float32)
    return Digits(np.broadcast_to(levels, (8, 1, 32, 32)).copy(), np.arange(8) % 10)


def options(run: Path, output: Path) -> argparse.Namespace:
    return parser("", steps=2).parse_args(["--run", str(run), "--output", str(output), "--batch", "2", "--threads", "1"])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # bfloat16 activations, float32 norms
def test_the_recipe_leaves_a_diffusers_folder_below_5_mb(tmp_path: Path, shades: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ralu-digits"
    with pytest.raises(SystemExit, match="no trained vae: run .*train_ralu.py vae --output"):
        train_transformer(options(tmp_path / "t", folder), shades)
    monkeypatch.setattr(train_ralu, "TOKENS", 64)
    threads = torch.get_num_threads()
    vae = train_vae(options(tmp_path / "v", folder), shades)
    train_transformer(options(tmp_path / "t", folder), shades)
    torch.set_num_threads(threads)
    index = json.loads((folder / "model_index.json").read_text())
    assert len(index["id2label"]) == 10
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    record = json.loads(folder.with_suffix(".json").read_text())
    assert (record["family"], record["training"]["step"], record["autoencoder"]["step"]) == ("flux", 2, 2)
    assert sorted(path.name for path in folder.rglob("*.json")) == ["config.json"] * 2 + ["model_index.json", "scheduler_config.json"]
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 5_000_000
    latents = (train_ralu.encode(vae, torch.from_numpy(shades.images)) - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.mean().abs() < 1e-3
    assert latents.std() == pytest.approx(1, abs=1e-3)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["_class_name"], config["in_channels"], config["pooled_projection_dim"]) == ("FluxTransformer2DModel", 16, 10)


def test_glyphs_have_hard_smooth_outlines() -> None:
    image = torch.full((1, 1, 32, 32), -1.0)
    image[:, :, :, 12:20] = 1.0
    glyph = pictures_of(image)
    assert glyph.shape == (1, 3, 64, 64)
    assert glyph.min() == pytest.approx(-1, abs=1e-3)
    assert ((glyph.abs() < 0.9).sum(dim=-1) <= 4).all()  # the values between black and white of two outlines


def test_tokens_are_patches_in_raster_order_with_channels_first() -> None:
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    tokens = packed(latents)
    assert tokens.shape == (1, 6, 8)
    assert torch.equal(tokens[0, 4].view(2, 2, 2), latents[0, :, 2:4, 2:4])


@given(st.sets(st.integers(0, LOW - 1), min_size=1))
def test_a_mixed_sequence_covers_the_picture_once(parents: set[int]) -> None:
    chosen = torch.zeros(LOW, dtype=torch.bool)
    chosen[list(parents)] = True
    index, ids = grown(chosen)
    kept = LOW - len(parents)
    assert len(index) == len(ids) == kept + 4 * len(parents)
    area = torch.zeros(2 * GRID, 2 * GRID)
    for number, (_, row, column) in enumerate(ids.tolist()):
        size = 2 if number < kept else 1
        area[int(2 * row) : int(2 * row) + size, int(2 * column) : int(2 * column) + size] += 1
    assert (area == 1).all()
    low = index[:kept]
    assert torch.equal(raster(GRID)[low], ids[:kept])
    assert torch.equal(raster(2 * GRID)[index[kept:] - LOW] / 2, ids[kept:])


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_a_step_sees_one_size_or_a_mixture(seed: int) -> None:
    torch.manual_seed(seed)
    index, ids = sequence(torch.randn(2, 5 * LOW, 16))
    assert len(index) == len(ids) == len(index.unique())
    assert LOW <= len(index) <= 4 * LOW
    assert ids.dtype == torch.float32
