"""From prompts that a language model reads to pictures: whole folders, exported, are diffusers' own pipelines."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
import language_models  # noqa: E402

import elastic_export  # noqa: E402
from elastic_runtime import ElasticPipeline  # noqa: E402
from elastic_runtime.ralu.patches import pack  # noqa: E402

LENGTH = 56  # text tokens
FEW = [1, 2, 3]  # layers, where the published models have dozens
DYNAMIC = {"use_dynamic_shifting": True}
PROMPTS = ("a red cat and a dog in the snow", "cat")
NEGATIVE = ("", "photographed at night")


@dataclass(frozen=True)
class Case:
    """A family's folder and pipeline. patch: of latents that the pipeline takes packed; 0: as they are. scales: the words for guidance of
    4, theirs and ours. negative: whether the pipeline takes any other negative prompt than the empty one. listed: in its index.
    reads: what its pipeline has for a tokenizer."""

    transformer: Callable[[], Any]
    reader: Callable[[], Any]
    vae: Callable[[], Any]
    pipeline: str
    scheduler: dict[str, Any]
    scales: tuple[dict[str, float], dict[str, float]]
    channels: int = 4
    down: int = 2
    patch: int = 2
    negative: bool = True
    listed: dict[str, Any] | None = None
    tokenizer: Callable[[], Any] = language_models.tokenizer
    reads: Callable[[], Any] = language_models.tokenizer


CASES = {
    "qwen-image": Case(
        folders.qwen_image, language_models.qwen25_vl, folders.frame_vae, "QwenImagePipeline", DYNAMIC | {"shift_terminal": 0.02},
        ({"true_cfg_scale": 4.0}, {"guidance_scale": 4.0}),
    ),
    "flux2-klein": Case(
        folders.flux2, language_models.qwen3, folders.packed_vae, "Flux2KleinPipeline", DYNAMIC,
        ({"guidance_scale": 4.0},) * 2, channels=16, down=4, patch=0, negative=False, listed={"text_encoder_select_layers": FEW},
    ),
    "flux2-dev": Case(
        partial(folders.flux2, guidance_embeds=True), language_models.mistral, folders.packed_vae, "Flux2Pipeline", DYNAMIC,
        ({"guidance_scale": 4.0},) * 2, channels=16, down=4, patch=0, negative=False, listed={"text_encoder_select_layers": FEW},
        tokenizer=language_models.marked_tokenizer, reads=language_models.processor,
    ),
    "z-image": Case(
        folders.z_image, language_models.qwen3, folders.vae, "ZImagePipeline", {"shift": 3.0}, ({"guidance_scale": 3.0},) * 2, patch=0
    ),
    "krea2": Case(
        folders.krea2, language_models.qwen3_vl, folders.frame_vae, "Krea2Pipeline", DYNAMIC, ({"guidance_scale": 3.0},) * 2,
        listed={"text_encoder_select_layers": FEW},
    ),
}  # fmt: skip


def written(case: Case, root: Path) -> tuple[Path, Any]:
    """A folder of the family, and diffusers' pipeline of the same parts."""
    transformer, reader = case.transformer(), case.reader()
    folder = folders.write(root / "m", transformer)
    language_models.write(folder, reader, reads=case.tokenizer())
    index = json.loads((folder / "model_index.json").read_text()) | (case.listed or {})
    index |= {"text_encoder": ["transformers", type(reader).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**case.scheduler)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {"scheduler": scheduler, "vae": case.vae(), "text_encoder": reader, "tokenizer": case.reads()}
    chosen = case.listed if case.pipeline == "Krea2Pipeline" else {}
    theirs = getattr(diffusers, case.pipeline)(**parts, transformer=transformer, **(chosen or {}))
    theirs.set_progress_bar_config(disable=True)
    return folder, theirs


@pytest.mark.parametrize("name", narrow(CASES, 2))
def test_prompts_become_the_pictures_of_diffusers_pipeline(name: str, tmp_path: Path) -> None:
    """Prompts of several lengths in one batch, guided away from others of several lengths, from none, or not guided."""
    case = CASES[name]
    folder, theirs = written(case, tmp_path)
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="32", batch="1-2", verify="none", max_sequence_length=LENGTH)
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}
    more: dict[str, Any] = {"max_sequence_length": LENGTH} | ({"text_encoder_out_layers": FEW} if name.startswith("flux2") else {})
    noise = np.random.default_rng(0).standard_normal((2, case.channels, 32 // case.down, 32 // case.down)).astype(np.float32)
    off = 1.0 if name in ("qwen-image", "flux2-klein", "flux2-dev") else 0.0
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        for prompts, negative, led in ((PROMPTS, NEGATIVE, True), (PROMPTS[:1], ("",), True), (PROMPTS, None, False)):
            start, latents = noise[: len(prompts)], []
            words, own = ({word: scale if led else off for word, scale in each.items()} for each in case.scales)
            given: dict[str, Any] = {"negative_prompt": list(negative)} if negative and case.negative else {}
            with torch.inference_mode():
                wanted = theirs(
                    prompt=list(prompts), **given, **size, **words, **more, output_type="np",
                    latents=torch.from_numpy(pack(start, case.patch).astype(np.float32) if case.patch else start),
                    callback_on_step_end=lambda pipe, index, time, arrays, seen=latents: seen.append(arrays["latents"].clone()) or {},
                ).images  # fmt: skip
            given = {"negative_prompt": list(negative)} if negative and case.negative else {}
            asked: dict[str, Any] = {"prompt": list(prompts), "plan": "full", "noise": start} | size | own | given
            drawn, last = pipe(**asked, output_type="latent").images, latents[-1].numpy()
            if case.patch:
                drawn = pack(drawn, case.patch)
            elif last.ndim == 3:  # tokens of one latent pixel
                drawn = drawn.reshape(*drawn.shape[:2], -1).transpose(0, 2, 1)
            assert np.abs(drawn - last).max() <= 1e-5 * np.abs(last).max(), (prompts, led)
            assert np.abs(pipe(**asked, output_type="np").images - wanted).max() < 1 / 255 / 4, (prompts, led)
