import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from digits import Digits
from train_elit import BACKBONES, flow_loss
from training import drop_labels, parser, rate, train

ABOUT = {"family": "elit-sit", "config": {"depth": 6}}


@pytest.fixture
def noise() -> Digits:
    generator = np.random.default_rng(0)
    return Digits(generator.uniform(-1, 1, (12, 1, 32, 32)).astype(np.float32), np.arange(12) % 10)


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(run: Path, *more: str) -> argparse.Namespace:
    return parser("", steps=4).parse_args(["--run", str(run), "--batch", "2", "--threads", "1", "--save-every", "1", *more])


def small(model: Callable[..., Tensor], images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """A loss with its own randomness, as every recipe has, for a model of two layers."""
    return (model(images.flatten(1)) - torch.randn(len(images), 3) - labels[:, None] - progress).square().mean()


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4), nn.Tanh(), nn.Linear(4, 3))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_elit_recipe_takes_two_steps_and_writes_weights_and_record(backbone: str, tmp_path: Path, noise: Digits) -> None:
    family, params = BACKBONES[backbone]
    weights = tmp_path / "out" / "elit.safetensors"
    given = options(tmp_path / "run", "--steps", "2", "--output", str(weights))
    ema = train(lambda: family.build(params), flow_loss, given, ABOUT, noise)
    written = load_file(weights)
    assert written.keys() == ema.state_dict().keys()
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert weights.stat().st_size <= 5_000_000
    record = json.loads(weights.with_suffix(".json").read_text())
    assert (record["family"], record["config"], record["quality"]) == (*ABOUT.values(), [])
    assert (record["training"]["step"], record["training"]["batch"], record["training"]["digits"]) == (2, 2, 12)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, noise: Digits) -> None:
    whole = train(two_layers, small, options(tmp_path / "whole"), ABOUT, noise)
    calls = 0

    def interrupted(*arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return small(*arguments)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        train(two_layers, interrupted, options(tmp_path / "cut"), ABOUT, noise)
    torch.manual_seed(99)  # another process starts elsewhere
    assert same(train(two_layers, small, options(tmp_path / "cut"), ABOUT, noise), whole)
    assert not same(train(two_layers, small, options(tmp_path / "other", "--seed", "1"), ABOUT, noise), whole)


def test_a_kill_in_mid_write_leaves_the_old_checkpoint(tmp_path: Path, noise: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    train(two_layers, small, options(tmp_path, "--steps", "2"), ABOUT, noise)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def killed(state: object, path: Path) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(SystemExit, match="killed"):
            train(two_layers, small, options(tmp_path), ABOUT, noise)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    train(two_layers, small, options(tmp_path), ABOUT, noise)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoiled(tmp_path: Path, noise: Digits) -> None:
    train(two_layers, small, options(tmp_path, "--steps", "2"), ABOUT, noise)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"loss of step 2 is nan: .* smaller --lr than 0\.001"):
        train(two_layers, lambda *arguments: small(*arguments) * float("nan"), options(tmp_path), ABOUT, noise)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path, noise: Digits) -> None:
    train(two_layers, small, options(tmp_path, "--steps", "1"), ABOUT, noise)
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of another model .* give another --run"):
        train(lambda: nn.Linear(1024, 3), small, options(tmp_path), ABOUT, noise)


def test_rate_rises_stays_and_falls() -> None:
    rates = [rate(step, 400) for step in range(400)]
    assert rates[0] < rates[6] < rates[7] == 1
    assert set(rates[7:300]) == {1}
    assert rates[300:] == sorted(rates[300:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_labels_drop_at_the_stated_rate() -> None:
    torch.manual_seed(0)
    dropped = drop_labels(torch.zeros(10_000, dtype=torch.int64), null_label=10)
    assert set(dropped.tolist()) == {0, 10}
    assert (dropped == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)
