import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from digits import Digits
from elastic_export.capture.zoo import Request, load
from finetune_elit import PLAIN, elastic, noised, plain
from training import parser


@pytest.fixture
def few() -> Iterator[Digits]:
    """A dozen pictures of noise; the threads that training sets are set back."""
    threads = torch.get_num_threads()
    yield Digits(np.random.default_rng(0).uniform(-1, 1, (12, 1, 32, 32)).astype(np.float32), np.arange(12) % 10)
    torch.set_num_threads(threads)


def asked(run: Path, output: Path) -> Namespace:
    """Options of two steps, without a plain checkpoint."""
    options = parser("", steps=2).parse_args(["--run", str(run), "--batch", "2", "--threads", "1", "--output", str(output)])
    options.plain = None
    return options


def test_a_plain_model_is_trained_and_becomes_one_with_budgets(few: Digits, tmp_path: Path) -> None:
    options = asked(tmp_path / "one", tmp_path / "plain.safetensors")
    plain(options, few)
    options.run, options.output, options.plain = tmp_path / "two", tmp_path / "elit.safetensors", tmp_path / "plain.safetensors"
    trained = elastic(options, few)

    begun = load_file(tmp_path / "two" / "begun.safetensors")
    assert any(name.startswith("input_token_editor.") for name in begun)
    config = tmp_path / "elit.config.json"
    made = load(Request("elit-hdit-levels", options.output, config))
    assert json.loads(config.read_text())["family"] == "elit-hdit-levels"
    arrays = made.family.feeds(made.params, {"latents": 64}, 2)
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        answers = trained(**given)
        assert (made.module(**given) - answers).abs().max() < 2e-2 * answers.abs().max()  # the file is in half precision


def test_the_same_model_is_trained_from_scratch(few: Digits, tmp_path: Path) -> None:
    options = asked(tmp_path / "run", tmp_path / "scratch.safetensors")
    elastic(options, few)
    made = load(Request("elit-hdit-levels", options.output, tmp_path / "scratch.config.json"))
    assert made.params.windows.places == 16


def test_what_is_to_be_answered_leads_back_to_the_picture() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 1, 32, 32) * 2 - 1
    given, wanted = noised(images, torch.zeros(64, dtype=torch.int64))
    for row in (0, 17, 63):
        skip, out, scale = PLAIN.schedule.preconditioning(float(given["timestep"][row]))
        torch.testing.assert_close(skip * given["sample"][row] / scale + out * wanted[row], images[row], atol=1e-4, rtol=1e-4)
    assert given["timestep"].log().mean().item() == pytest.approx(-0.5, abs=0.6)
