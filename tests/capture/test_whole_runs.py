"""Pictures along plan `full` are those of diffusers' own pipelines: the same noise, prompts, steps and guidance."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="diffusers' pipelines need torch")
pytest.importorskip("diffusers", reason="the pipelines are diffusers'")
pytest.importorskip("onnxruntime", reason="ours draw through ONNX Runtime")

import diffusers  # noqa: E402
import folders  # noqa: E402
from transformers import AutoTokenizer, CLIPTextModelWithProjection  # noqa: E402

import elastic_export  # noqa: E402
from elastic_runtime import BudgetError, ElasticPipeline, Request  # noqa: E402
from elastic_runtime.ralu.patches import pack  # noqa: E402

LENGTH = 6  # tokens that T5's tokenizer makes here
SCHEDULERS: dict[str, dict[str, Any]] = {
    "dev": {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    "sd3": {"shift": 3.0},
    "schnell": {"shift": 1.0},
    "sd3 without T5": {"shift": 3.0},
}


def written(name: str, root: Path) -> Path:
    """A folder of the kind, with its scheduler."""
    make = {"dev": folders.flux, "schnell": lambda: folders.flux(guidance_embeds=False)}.get(name, folders.sd3)
    folder = folders.write(root / "m", make(), text=True)
    diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name]).save_pretrained(folder / "scheduler")
    if name.endswith("without T5"):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    return folder


def original(name: str, folder: Path) -> Any:
    """Diffusers' pipeline of the folder."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    parts: dict[str, Any] = {"scheduler": scheduler, "vae": folders.vae().eval()}
    tokenizers = {each.name: AutoTokenizer.from_pretrained(each) for each in folder.glob("tokenizer*")}
    if name in ("dev", "schnell"):
        transformer = folders.flux(guidance_embeds=name == "dev")
        return diffusers.FluxPipeline(
            transformer=transformer, text_encoder=folders.clip(), text_encoder_2=folders.t5(), **parts, **tokenizers
        )
    with_t5 = not name.endswith("without T5")
    return diffusers.StableDiffusion3Pipeline(
        transformer=folders.sd3(), text_encoder=folders.clip(CLIPTextModelWithProjection),
        text_encoder_2=folders.clip(CLIPTextModelWithProjection), text_encoder_3=folders.t5() if with_t5 else None, **parts,
        **(tokenizers if with_t5 else tokenizers | {"tokenizer_3": None}),
    )  # fmt: skip


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("four steps", {"steps": 4}),
    ("one step", {"steps": 1}),
    ("28 steps", {"steps": 28}),
    ("wide", {"height": 24, "width": 32}),
    ("two prompts", {"prompts": ("a cat", "cat"), "steps": 3}),
    ("no guidance", {"guidance": 0.0}),
    ("guided away", {"negative": ("seven",), "guidance": 4.0}),
)


@pytest.mark.parametrize("name", narrow(SCHEDULERS, 2))
def test_pictures_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    folder = written(name, tmp_path)
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="24-32", batch="1-4")
    theirs = original(name, folder)
    theirs.set_progress_bar_config(disable=True)
    is_flux = name in ("dev", "schnell")
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as ours:
        for what, case in CASES:
            prompts = case.get("prompts", ("a cat",))
            height, width = case.get("height", 32), case.get("width", 32)
            steps, scale, negative = case.get("steps", 4), case.get("guidance", 3.5), case.get("negative")
            noise = np.random.default_rng(1).standard_normal((len(prompts), 4, height // 2, width // 2)).astype(np.float32)
            start = torch.from_numpy(pack(noise, 2).astype(np.float32) if is_flux else noise)
            more: dict[str, Any] = {"negative_prompt": list(negative)} if negative else {}
            true = {"true_cfg_scale": scale} if is_flux and negative else {}
            scales = {} if name == "schnell" else {"guidance_scale": scale}
            # Without its T5 SD3 takes as many zeros as it would take tokens, which is not for the caller to say.
            length = {} if name.endswith("without T5") else {"max_sequence_length": LENGTH}
            wanted = theirs(
                list(prompts), height=height, width=width, num_inference_steps=steps, latents=start, output_type="np", **length, **scales,
                **more, **true,
            ).images  # fmt: skip
            pictures = ours.draw(
                Request(
                    prompt=prompts, height=height, width=width, plan="full", num_inference_steps=steps, noise=noise, output_type="np",
                    negative_prompt=negative, **scales, **true,
                )
            ).images  # fmt: skip
            assert np.abs(pictures - wanted).max() < 2e-5, (what, float(np.abs(pictures - wanted).max()))


@pytest.mark.parametrize(("name", "length"), narrow([("schnell", 4), ("sd3", 5), ("sd3 without T5", 9)]))
def test_text_of_another_length_is_diffusers_too(name: str, length: int, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="24-32", batch="1-4", max_sequence_length=length, verify="ends")
    text = bundle.manifest.model.text
    assert text is not None
    assert text.length == length + (0 if name == "schnell" else 12)
    theirs = original(name, folder)
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 4, 16, 16)).astype(np.float32)
    start = torch.from_numpy(pack(noise, 2).astype(np.float32) if name == "schnell" else noise)
    scales = {} if name == "schnell" else {"guidance_scale": 3.5}
    wanted = theirs(
        ["cat"], height=32, width=32, num_inference_steps=2, latents=start, output_type="np", max_sequence_length=length, **scales
    ).images
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as ours:
        request = Request(prompt=("cat",), height=32, width=32, plan="full", num_inference_steps=2, noise=noise, output_type="np", **scales)
        assert np.abs(ours.draw(request).images - wanted).max() < 2e-5


@pytest.mark.parametrize("length", [0, 513])
def test_text_of_no_length_or_too_much_is_refused_before_the_export(length: int, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=f"--max-sequence-length is 1 to 512 tokens, got {length}"):
        elastic_export.export(written("schnell", tmp_path), output=tmp_path / "b", size="24-32", max_sequence_length=length)
    assert not (tmp_path / "b").exists()
