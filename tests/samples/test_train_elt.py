import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_elt
import train_elt_masked
from digits import Digits, enlarged, halved
from elastic_export.families.elt import FAMILY, Elt
from elastic_export.families.elt_masked import FAMILY as MASKED
from elastic_export.families.elt_masked import EltMasked
from elastic_runtime.contract.schedule import ShiftedCosine
from train_elt import PARAMS, ilsd, noised, recipe
from train_elt_masked import masked_loss
from training import parser, train


@pytest.fixture
def shades() -> Digits:
    """Easy pictures: each of one shade."""
    generator = np.random.default_rng(0)
    levels = generator.uniform(-1, 1, (16, 1, 1, 1)).astype(np.float32)
    return Digits(np.broadcast_to(levels, (16, 1, 32, 32)).copy(), np.arange(16) % 10)


def options(run: Path, *more: str) -> argparse.Namespace:
    return parser("", steps=20).parse_args(["--run", str(run), "--batch", "4", "--threads", "1", *more])


RECIPES = [
    ("ilsd", lambda: Elt(PARAMS), recipe(True), FAMILY),
    ("looped", lambda: Elt(PARAMS), recipe(False), FAMILY),
    ("masked", lambda: EltMasked(train_elt_masked.PARAMS), masked_loss, MASKED),
]


@pytest.mark.parametrize(("name", "build", "loss", "family"), RECIPES, ids=[name for name, *_ in RECIPES])
def test_twenty_steps_learn_and_fit_in_five_megabytes(
    name: str, build: Any, loss: Any, family: Any, tmp_path: Path, shades: Digits
) -> None:
    weights = tmp_path / f"{name}.safetensors"
    seen: list[float] = []

    def watched(*arguments: Any) -> Any:
        value = loss(*arguments)
        seen.append(value.item())
        return value

    train(build, watched, options(tmp_path / "run", "--output", str(weights)), {"family": family.name, "config": {}}, shades)
    assert len(seen) == 20
    assert np.mean(seen[-4:]) < 0.9 * np.mean(seen[:4])
    assert weights.stat().st_size <= 5_000_000


def test_self_distillation_moves_from_the_data_to_the_teacher() -> None:
    asked: list[list[int]] = []

    def exits(counts: Any) -> list[torch.Tensor]:
        asked.append(list(counts))
        return [torch.tensor(float(count), requires_grad=True) for count in counts]

    def loss(progress: float, seed: int = 3) -> float:
        torch.manual_seed(seed)
        return ilsd(exits, 6, progress, lambda output: output * 100, lambda student, teacher: teacher - student).item()

    first, last = loss(0.0), loss(1.0)
    (student, teacher), _ = asked
    assert teacher == 6
    assert first == 100 * (teacher + student)
    assert last == 100 * teacher + (teacher - student)
    for seed in range(60):
        loss(0.5, seed)
    assert {student for student, _ in asked} == set(range(1, 7))


def test_the_teacher_learns_from_the_data_alone() -> None:
    teacher, student = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    ilsd(lambda counts: [student, teacher], 2, 1.0, lambda output: output, lambda a, b: (a - b).square()).backward()
    assert (teacher.grad.item(), student.grad.item()) == (1.0, 2.0)  # type: ignore[union-attr]


def test_noised_pictures_lie_on_the_schedule() -> None:
    torch.manual_seed(0)
    schedule, images = ShiftedCosine.at(32), torch.randn(500, 1, 2, 2)
    sample, time, v = noised(images, schedule)
    for picture, noisy, t, wanted in zip(images, sample, time, v, strict=True):
        alpha, sigma = schedule.alpha_sigma(float(t))
        noise = (noisy - alpha * picture) / sigma
        torch.testing.assert_close(alpha * noise - sigma * picture, wanted, atol=1e-3, rtol=1e-3)
    assert 0 < time.min() < 0.15 < 0.85 < time.max() < 1


def test_halved_digits_are_tokens_and_come_back() -> None:
    images = np.full((2, 1, 32, 32), -1.0, np.float32)
    images[1, :, 4:6, 4:6] = 1
    tokens = halved(images, 16)
    assert (tokens.shape, tokens.dtype, tokens.sum(), tokens[1, 0, 1, 1]) == ((2, 1, 14, 14), np.int64, 15, 15)
    np.testing.assert_array_equal(enlarged(tokens / 15 * 2 - 1), images)


def test_compile_is_refused_aloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_elt.py", "--run", "x", "--compile"])
    with pytest.raises(SystemExit):
        train_elt.read(parser("", steps=1))
    assert "leave it out" in capsys.readouterr().err
