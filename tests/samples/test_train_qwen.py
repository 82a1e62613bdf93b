"""The recipe of the text-to-image sample, two steps of each part, up to a picture of a prompt."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the recipe trains diffusers' classes")
pytest.importorskip("transformers", reason="its text encoder is transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import elastic_export
from classifier import load_judge
from digits import NAMES, Digits, load_digits
from elastic_runtime import ElasticPipeline, UsageError
from evaluate import Protocol, check, evaluate
from train_qwen import PROMPT, read_prompts, train_transformer, train_vae
from training import parser


def options(run: Path, output: Path) -> argparse.Namespace:
    return parser("", steps=2).parse_args(["--run", str(run), "--output", str(output), "--batch", "2", "--threads", "1", "--no-bf16"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen")
    folder, (digits, _) = root / "elit-qwen-digits", load_digits()
    some = Digits(digits.images[:8], digits.labels[:8])
    with pytest.raises(SystemExit, match=r"no trained vae: run .*train_qwen.py vae --output"):
        train_transformer(options(root / "t", folder), some)
    threads = torch.get_num_threads()
    train_vae(options(root / "v", folder), some)
    train_transformer(options(root / "t", folder), some)
    torch.set_num_threads(threads)
    return folder


def test_the_recipe_leaves_a_diffusers_folder_below_5_mb(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 5_000_000
    record = json.loads(folder.with_suffix(".json").read_text())
    assert (record["family"], record["training"]["step"], record["autoencoder"]["step"]) == ("elit-qwen-image", 2, 2)
    assert json.loads((folder / "transformer" / "elit.json").read_text())["group_size"] == 4
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert [len(config[name]) for name in ("latents_mean", "latents_std")] == [4, 4]


def test_every_name_is_a_prompt_of_its_own_and_as_long(folder: Path) -> None:
    texts, empty = read_prompts(folder)
    assert len(texts) == len(NAMES)
    assert empty.shape[1] < texts.shape[1]
    assert all((texts[i] - texts[j]).abs().max() > 0.1 for i in range(10) for j in range(i))


@pytest.mark.wide
def test_it_is_exported_and_graded_by_its_prompts(folder: Path, tmp_path: Path) -> None:
    bundle = elastic_export.export(folder, output=tmp_path / "b", max_sequence_length=16, batch="1-40", verify="none")
    assert bundle.manifest.model.sample_shape == (4, 16, 16)
    protocol = Protocol(samples=20, steps=1, sampler="euler", guidance=(2.0,), prompt=PROMPT)
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        figures = evaluate(pipe, load_judge(), bundle.manifest.axes[0], [4, 64], protocol, batch=20)
    assert [row["budget"] for row in figures["quality"]] == [{"latents": 4}, {"latents": 64}]
    assert figures["evaluation"]["protocol"]["prompt"] == PROMPT
    assert all(np.isfinite(row["frechet_distance"]) for row in figures["quality"])
    with pytest.raises(UsageError, match="or --prompt"):
        check(bundle, Protocol(samples=20))
    with pytest.raises(UsageError, match="where the digit's name goes"):
        check(bundle, Protocol(samples=20, prompt="a seven"))
