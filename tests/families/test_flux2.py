"""FLUX.2 as a graph over tokens with places: diffusers' own class and pipelines, its VAE, FLOPs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

import elastic_export
from elastic_export.families.flux2 import Flux2
from elastic_runtime import Bundle, ElasticPipeline, Span, open_session
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.tokens import place, text_places
from elastic_runtime.ralu.patches import raster

ONE = Span(1, 1)
PATCHES = Patches(size=1, positions="img_ids", layout="sequence")
TEXT = 3 * folders.WIDTH
Arrays = dict[str, np.ndarray]
KINDS = {"klein": {}, "dev": {"guidance_embeds": True}}


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fed(batch: int, size: tuple[int, int], text: int, guided: bool) -> Arrays:
    """Inputs for a picture of `size` (rows, columns), with half places among its tokens'."""
    places = np.array(raster(1, *size)[0])
    places[::3] -= 0.5
    feeds = {
        "hidden_states": random(0, batch, size[0] * size[1], 16),
        "encoder_hidden_states": random(1, batch, text, TEXT),
        "timestep": np.linspace(0.1, 0.9, batch, dtype=np.float32),
        "img_ids": place(places, size, text, PATCHES),
        "txt_ids": text_places(text, size, PATCHES),
    }
    return feeds | ({"guidance": np.linspace(1.5, 4.0, batch, dtype=np.float32)} if guided else {})


def tensors(feeds: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def theirs(transformer: Flux2Transformer2DModel, feeds: Arrays) -> np.ndarray:
    with torch.inference_mode():
        answer: np.ndarray = transformer(**tensors(feeds), return_dict=False)[0].numpy()
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_it_predicts_what_diffusers_does(kind: str) -> None:
    transformer = folders.flux2(**KINDS[kind])
    feeds = fed(2, (5, 3), 7, kind == "dev")
    wanted = theirs(transformer, feeds)
    with torch.inference_mode():
        found = Flux2(transformer)(**tensors(feeds)).numpy()
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", [23, 20])
def test_untraced_sizes_through_onnx_runtime(kind: str, opset: int, tmp_path: Path) -> None:
    transformer = folders.flux2(**KINDS[kind])
    folders.write(tmp_path / "f", transformer, decoder=False)
    bundle = elastic_export.export(tmp_path / "f", output=tmp_path / "b", size="4-8", batch="1-3", opset=opset, verify="none")
    with open_session(bundle) as session:
        for batch, size, text in ((1, (2, 2), 1), (3, (5, 9), 19), (2, (8, 8), 512)):
            feeds = fed(batch, size, text, kind == "dev")
            wanted = theirs(transformer, feeds)
            assert np.abs(session.run(feeds)["prediction"] - wanted).max() <= 5e-6 * np.abs(wanted).max(), (size, text)


SCHEDULER = {"use_dynamic_shifting": True, "shift": 3.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Bundle]]:
    """By name: diffusers' pipeline of a folder without text encoders, and the bundle that was exported from it."""
    found = {}
    for name, kind, distilled in (("base", "klein", False), ("distilled", "klein", True), ("dev", "dev", False)):
        root = tmp_path_factory.mktemp(name)
        transformer = folders.flux2(**KINDS[kind])
        folder = folders.write(root / "f", transformer)
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        scheduler.save_pretrained(folder / "scheduler")
        listed = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(listed | ({"is_distilled": distilled} if kind == "klein" else {})))
        parts: dict[str, Any] = {
            "scheduler": scheduler, "vae": folders.packed_vae(), "text_encoder": None, "tokenizer": None, "transformer": transformer,
        }  # fmt: skip
        pipeline = Flux2Pipeline(**parts) if kind == "dev" else Flux2KleinPipeline(**parts, is_distilled=distilled)
        pipeline.set_progress_bar_config(disable=True)
        found[name] = pipeline, elastic_export.export(folder, output=root / "b", size="16-48", batch="1-4", verify="ends")
    return found


CASES = {
    "base": {"guidance_scale": 4.0},
    "distilled": {},
    "dev": {"guidance_scale": 2.5},
}


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 4), (24, 44, 3), (48, 20, 1)])
@pytest.mark.parametrize("name", CASES)
def test_whole_runs_are_those_of_diffusers_pipelines(
    made: dict[str, tuple[Any, Bundle]], name: str, height: int, width: int, steps: int
) -> None:
    """Two pictures of texts of their own; negative embeddings of another length where there is guidance."""
    pipeline, bundle = made[name]
    embeds, noise = random(2, 2, 6, TEXT), random(3, 2, 16, height // 4, width // 4)
    negative = {"negative_prompt_embeds": random(4, 2, 3, TEXT)} if name == "base" else {}
    known = {"height": height, "width": width, "num_inference_steps": steps} | CASES[name]
    latents: list[torch.Tensor] = []
    with torch.inference_mode():
        wanted = pipeline(
            prompt_embeds=torch.from_numpy(embeds), **tensors(negative), **known, latents=torch.from_numpy(noise), output_type="np",
            callback_on_step_end=lambda pipe, index, time, arrays: latents.append(arrays["latents"].clone()) or {},
        ).images  # fmt: skip
    ours: dict[str, Any] = known | negative | {"prompt_embeds": embeds, "plan": "full", "noise": noise}
    with ElasticPipeline.from_pretrained(bundle.folder, "ort", threads=1) as pipe:
        drawn = pipe(**ours, output_type="latent")
        assert np.abs(pipe(**ours, output_type="np").images - wanted).max() < 1 / 255 / 4
    last = latents[-1].numpy().transpose(0, 2, 1).reshape(noise.shape)
    assert np.abs(drawn.images - last).max() <= 1e-5 * np.abs(last).max()
    times = [step.time for step in drawn.steps] + [drawn.steps[-1].next_time]
    np.testing.assert_allclose(times, pipeline.scheduler.sigmas.numpy(), atol=1e-6)
    assert drawn.facts["guidance"] == (4.0 if name == "base" else 1.0)
