from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from classifier import WEIGHTS, Judge, accuracy, augment, fit, load_judge
from digits import Digits, load_digits


@pytest.mark.parametrize("side", WEIGHTS)
def test_committed_weights_reach_the_stated_accuracy(side: int, digits: tuple[Digits, Digits]) -> None:
    with safe_open(WEIGHTS[side], "pt") as weights:
        stated = float(weights.metadata()["accuracy"])
    assert stated >= 0.98
    assert accuracy(load_judge(side), load_digits(side)[0]) == pytest.approx(stated, abs=0.001)  # kernels differ by a digit or two
    assert WEIGHTS[side].stat().st_size <= 1_000_000


def test_judge_gives_features_and_labels_whatever_the_batch() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (7, 1, 32, 32))
    judge = load_judge()
    features, labels = judge.judge(images)
    assert (features.shape, labels.shape) == ((7, 64), (7,))
    assert features.dtype == np.float64
    np.testing.assert_allclose(judge.judge(images, batch=2)[0], features, rtol=1e-4, atol=1e-4)


def test_augmentation_moves_strokes_and_keeps_the_background() -> None:
    torch.manual_seed(0)
    images = torch.full((8, 1, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1
    moved = augment(images)
    assert moved.shape == images.shape
    assert moved.min() == -1
    assert moved.max() <= 1
    assert (moved[:, :, :4] == -1).all()
    assert not torch.equal(moved[0], moved[1])
    assert moved.mean().item() == pytest.approx(images.mean().item(), abs=0.05)


def test_fit_learns_and_repeats() -> None:
    labels = np.arange(40) % 10
    images = np.full((40, 1, 32, 32), -1, np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 3 * label : 3 * label + 4] = 1
    toy = Digits(images, labels)
    one, two = (fit(toy, epochs=2, seed=3, batch=20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not one.training


def test_missing_weights_are_advice(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"samples/classifier\.py"):
        load_judge(path=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(SystemExit, match=r"samples/classifier\.py"):
        load_judge(path=tmp_path / "bad.safetensors")
    assert sum(value.numel() for value in Judge().parameters()) < 250_000
