import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from digits import Digits
from elastic_export.capture.zoo import Request, load
from finetune_elit import elastic, noised, plain
from training import parser


def test_a_plain_model_is_trained_and_becomes_one_with_budgets(tmp_path: Path) -> None:
    generator, threads = np.random.default_rng(0), torch.get_num_threads()
    data = Digits(generator.uniform(-1, 1, (12, 1, 32, 32)).astype(np.float32), np.arange(12) % 10)
    options = parser("", steps=2).parse_args(["--run", str(tmp_path / "one"), "--batch", "2", "--threads", "1"])
    options.output, options.plain = tmp_path / "plain.safetensors", None
    plain(options, data)
    options.run, options.output, options.plain = tmp_path / "two", tmp_path / "elit.safetensors", tmp_path / "plain.safetensors"
    trained = elastic(options, data)
    torch.set_num_threads(threads)

    assert "input_token_editor.adapters.0.pos_embed" in load_file(tmp_path / "two" / "begun.safetensors")
    config = tmp_path / "elit.config.json"
    made = load(Request("elit-uvit-tokens", options.output, config))
    assert json.loads(config.read_text())["family"] == "elit-uvit-tokens"
    arrays = made.family.feeds(made.params, {"latents": 64}, 2)
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        assert (made.module(**given) - trained(**given)).abs().max() < 1e-2  # the file is in half precision


def test_the_same_model_is_trained_from_scratch(tmp_path: Path) -> None:
    generator, threads = np.random.default_rng(0), torch.get_num_threads()
    data = Digits(generator.uniform(-1, 1, (12, 1, 32, 32)).astype(np.float32), np.arange(12) % 10)
    options = parser("", steps=1).parse_args(["--run", str(tmp_path / "run"), "--batch", "2", "--threads", "1"])
    options.output, options.plain = tmp_path / "scratch.safetensors", None
    elastic(options, data)
    torch.set_num_threads(threads)
    made = load(Request("elit-uvit-tokens", options.output, tmp_path / "scratch.config.json"))
    assert made.params.windows.places == 16


def test_what_is_noised_keeps_its_variance() -> None:
    torch.manual_seed(0)
    given, noise = noised(torch.randn(64, 1, 32, 32), torch.zeros(64, dtype=torch.int64))
    assert given["sample"].var().item() == pytest.approx(1, abs=0.05)
    assert noise.shape == given["sample"].shape
    assert 0 < given["timestep"].min() < given["timestep"].max() <= 999
