"""A diffusers folder with ELIT put in, through the commands: exported at one size, verified, shown, drawn from a request."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

import folders
from conftest import Outcome
from PIL import Image

from elastic_runtime import Auto, Budget, Bundle, ElasticPipeline, PerStep, Request, Span

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a VAE; the interface is the recorded one, of 48 values and windows of 4 x 4 tokens."""
    path = folders.write(tmp_path_factory.mktemp("f") / "tiny", folders.qwen_image(num_attention_heads=3, num_layers=4))
    for name in ("elit.json", "elit.safetensors"):
        shutil.copy(golden / "elit-qwen-image-a" / "transformer" / name, path / "transformer" / name)
    return path


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Path]:
    """The bundle, made once. Tests must not change it."""
    output = tmp_path_factory.mktemp("b") / "b"

    def bundle(run: Run) -> Path:
        if not output.exists():
            done = run("onnx", folder, "-o", output, "--size", "32x48", "--latents", "12-96", "--max-sequence-length", "20", "-q")
            assert done.code == 0, done.err
        return output

    return bundle


def request(**how: Any) -> bytes:
    generator = np.random.default_rng(0)
    embeds = {f"{name}prompt_embeds": generator.standard_normal((1, n, 16)).astype(np.float32) for name, n in (("", 5), ("negative_", 3))}
    return Request(**embeds, num_inference_steps=2, seeds=3, **how).to_json()


def test_the_bundle_is_verified_and_shown(run: Run, made: Any) -> None:
    bundle = Bundle.open(made(run), hashes=True)
    assert bundle.manifest.graphs["denoiser"].dimensions == {"B": Span(1, 4), "J": Span(2, 16), "T": Span(1, 20)}
    assert bundle.manifest.graphs["decoder"].inputs[0].shape == ("B", 4, 16, 24)
    assert [row.budget["latents"] for row in bundle.manifest.cost] == list(range(12, 97, 6))
    verified = run("verify", bundle.folder)
    assert verified.code == 0, verified.err
    assert "latents=96" in verified.out
    shown = run("inspect", bundle.folder)
    assert shown.code == 0, shown.err
    assert "elit-qwen-image" in shown.out


@pytest.mark.parametrize(
    ("how", "latents", "weak"),
    [
        ({"policy": PerStep((Budget(latents=12), Budget(latents=96)), Budget(latents=12))}, [12, 96], 12),
        ({"budget": Budget(latents=48), "guidance_scale": 1.0}, [48, 48], None),
        ({"policy": Auto()}, None, None),
    ],
)
def test_pictures_are_drawn_from_a_request(
    run: Run, made: Any, tmp_path: Path, how: dict[str, Any], latents: list[int] | None, weak: int | None
) -> None:
    if "guidance_scale" in how:
        text = json.loads(request(**how))
        text.pop("negative_prompt_embeds")
        (tmp_path / "r.json").write_text(json.dumps(text))
    else:
        (tmp_path / "r.json").write_bytes(request(**how))
    done = run("generate", made(run), "-o", tmp_path / "a.png", "--request", tmp_path / "r.json", "--json", "-q")
    assert done.code == 0, done.err
    steps = json.loads(done.out)["steps"]
    if latents:
        assert [step["budget"]["latents"] for step in steps] == latents
        assert [(step["guidance_budget"] or {}).get("latents") for step in steps] == [weak, weak]
    (tmp_path / "again.json").write_text(done.out)
    again = run("generate", made(run), "-o", tmp_path / "b.png", "--request", tmp_path / "again.json", "-q")
    assert again.code == 0, again.err
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert first.width * 2 == first.height * 3
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_predictions_count_a_run_for_each_branch_whose_text_has_its_own_length(run: Run, made: Any) -> None:
    with ElasticPipeline.from_pretrained(made(run), "ort", threads=1) as pipe:
        apart = pipe.outlook(Request.from_json(request()))
        option = apart.fixed(Budget(latents=96), None)
        assert apart.runs(option, 0, True) == [(Budget(latents=96), 1)] * 2
        text = json.loads(request())
        text["negative_prompt_embeds"] = text["prompt_embeds"]
        beside = pipe.outlook(Request.from_json(json.dumps(text)))
        assert beside.runs(option, 0, True) == [(Budget(latents=96), 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32x36"], "sides of pictures must be multiples of 16 pixels for this model, whose windows are 4 x 4 tokens of 4 "
         "pixels, got 36: the nearest is 32"),
        (["--size", "16-32"], "draws pictures of one size, as its windows need: give --size 32"),
        (["--size", "axb"], "a single size is written 1024x768, height first"),
        (["--tokens", "16"], "has no axis 'tokens'; it has latents"),
        (["--head-blocks", "2"], "is a diffusers folder and has its own sizes and weights: --head-blocks does not go with it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(run: Run, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("onnx", folder, "-o", tmp_path / "b", "-q", *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())


def test_prompts_need_encoders(run: Run, made: Any, tmp_path: Path) -> None:
    done = run("generate", made(run), "-o", tmp_path / "a.png", "--prompt", "a cat", "-q")
    assert done.code == 2
    assert "has no text encoders in this bundle: give prompt_embeds" in " ".join(done.err.split())
    done = run("generate", made(run), "-o", tmp_path / "a.png", "--prompt", "a cat", "--plan", "full", "-q")
    assert done.code == 2
    assert "--plan does not fit tiny, which draws at budgets" in " ".join(done.err.replace("│", " ").split())
