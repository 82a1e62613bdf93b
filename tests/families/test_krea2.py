"""Krea 2 as a graph over tokens with places, and its text fusion as one of its own: diffusers' own class and pipeline, FLOPs, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elastic_export
from elastic_export.capture.folders import capture_folder
from elastic_export.families import krea2
from elastic_export.families.krea2 import Krea2, TextFusion
from elastic_runtime import Bundle, ElasticPipeline, Span, UsageError, open_session
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.tokens import place, text_places
from elastic_runtime.ralu.patches import pack, raster

PATCHES = Patches(size=2, positions="img_ids")
LAYERS = 3
SCHEDULER = {"use_dynamic_shifting": True, "max_image_seq_len": 6400}
Arrays = dict[str, np.ndarray]


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fed(batch: int, size: tuple[int, int], text: int) -> tuple[Arrays, np.ndarray]:
    """Inputs for a picture of `size` (rows, columns), with half places among its tokens', but for the text; and that text, tapped."""
    places = np.array(raster(1, *size)[0])
    places[::3] -= 0.5
    feeds = {
        "hidden_states": random(0, batch, size[0] * size[1], 16),
        "timestep": np.linspace(0.1, 0.9, batch, dtype=np.float32),
        "img_ids": place(places, size, text, PATCHES),
        "txt_ids": text_places(text, size, PATCHES),
    }
    return feeds, random(1, batch, text, LAYERS, folders.WIDTH)


def theirs(transformer: Krea2Transformer2DModel, feeds: Arrays, tapped: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.inference_mode():
        answer: np.ndarray = transformer(
            hidden_states=torch.from_numpy(feeds["hidden_states"]),
            encoder_hidden_states=torch.from_numpy(tapped),
            timestep=torch.from_numpy(feeds["timestep"]),
            position_ids=torch.from_numpy(np.concatenate([feeds["txt_ids"], feeds["img_ids"]])),
            encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
            return_dict=False,
        )[0].numpy()
    return answer


def test_it_predicts_what_diffusers_does() -> None:
    feeds, tapped = fed(2, (5, 3), 7)
    wanted = theirs(folders.krea2(), feeds, tapped)
    with torch.inference_mode():
        text = TextFusion(folders.krea2())(torch.from_numpy(tapped))
        given = {name: torch.from_numpy(array) for name, array in feeds.items()}
        prediction = Krea2(folders.krea2())(encoder_hidden_states=text, **given).numpy()
    assert np.abs(prediction - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("opset", narrow([23, 20]))
def test_untraced_sizes_through_onnx_runtime(opset: int, tmp_path: Path) -> None:
    transformer = folders.krea2()
    folders.write(tmp_path / "f", transformer, decoder=False)
    bundle = elastic_export.export(tmp_path / "f", output=tmp_path / "b", size="8-16", batch="1-3", opset=opset, verify="none")
    with open_session(bundle) as session, open_session(bundle, "text_fusion") as fusion:
        for batch, size, text in ((1, (2, 2), 1), (3, (5, 9), 19), (2, (8, 8), 512)):
            feeds, tapped = fed(batch, size, text)
            wanted = theirs(transformer, feeds, tapped)
            fused = fusion.run({"tapped": tapped})["fused"]
            prediction = session.run(feeds | {"encoder_hidden_states": fused})["prediction"]
            assert np.abs(prediction - wanted).max() <= 5e-6 * np.abs(wanted).max(), (size, text)


def test_flops_are_those_of_torchs_counter() -> None:
    transformer, (feeds, tapped) = folders.krea2(), fed(1, (4, 3), 5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        theirs(transformer, feeds, tapped)
    config = dict(transformer.config)
    assert krea2.flops(config, 12, 5) + krea2.fusion_flops(config, 5) == counter.get_total_flops()


def test_the_published_model_takes_what_was_counted() -> None:
    """128.99 TFLOPs a step at 1024 px with 512 tokens of text, the fusion among them; here that is computed once a picture."""
    config = {
        "attention_head_dim": 128, "num_attention_heads": 48, "num_key_value_heads": 12, "intermediate_size": 16384, "num_layers": 28,
        "in_channels": 64, "timestep_embed_dim": 256, "text_hidden_dim": 2560, "num_text_layers": 12, "text_num_attention_heads": 20,
        "text_num_key_value_heads": 20, "text_intermediate_size": 6912, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2,
    }  # fmt: skip
    whole = krea2.flops(config, 4096, 512) + krea2.fusion_flops(config, 512)
    assert whole / 1e12 == pytest.approx(128.99, abs=0.01)
    assert krea2.fusion_flops(config, 512) / whole < 0.02


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Any, Bundle]]:
    """By whether it is distilled: diffusers' pipeline of a folder without text encoder, and the bundle that was exported from it."""
    root, transformer, scheduler = tmp_path_factory.mktemp("krea2"), folders.krea2(), FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    folder = folders.write(root / "f", transformer)
    scheduler.save_pretrained(folder / "scheduler")
    parts: dict[str, Any] = {
        "scheduler": scheduler, "vae": folders.frame_vae(), "text_encoder": None, "tokenizer": None, "transformer": transformer,
    }  # fmt: skip
    bundle = elastic_export.export(folder, output=root / "b", size="16-32", batch="1-4", verify="ends")
    pairs = {
        False: (Krea2Pipeline(**parts, is_distilled=False), bundle),
        True: (Krea2Pipeline(**parts, is_distilled=True), folders.as_distilled(bundle, folder, root / "d", Span(16, 32), Span(1, 4))),
    }
    for pipeline, _ in pairs.values():
        pipeline.set_progress_bar_config(disable=True)
    return pairs


@pytest.mark.parametrize(("distilled", "height", "width", "steps"), [(False, 32, 32, 3), (False, 24, 32, 2), (True, 28, 16, 3)])
def test_whole_runs_are_those_of_diffusers_pipeline(
    made: dict[bool, tuple[Any, Bundle]], distilled: bool, height: int, width: int, steps: int
) -> None:
    """Two pictures; the negative text is shorter, which their pipeline pads to one length; without guidance where it is distilled."""
    pipeline, bundle = made[distilled]
    scale = 0.0 if distilled else 2.5
    embeds, negative = random(2, 2, 6, LAYERS, folders.WIDTH), random(4, 2, 3, LAYERS, folders.WIDTH)
    padded, mask = np.pad(negative, ((0, 0), (0, 3), (0, 0), (0, 0))), np.arange(6)[None].repeat(2, axis=0) < 3
    noise = random(3, 2, 4, height // 2, width // 2)
    known = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
    latents: list[torch.Tensor] = []
    with torch.inference_mode():
        wanted = pipeline(
            prompt_embeds=torch.from_numpy(embeds),
            prompt_embeds_mask=torch.ones(2, 6, dtype=torch.bool),
            negative_prompt_embeds=None if distilled else torch.from_numpy(padded),
            negative_prompt_embeds_mask=None if distilled else torch.from_numpy(mask),
            **known,
            latents=torch.from_numpy(pack(noise, 2)),
            output_type="np",
            callback_on_step_end=lambda pipe, index, time, arrays: latents.append(arrays["latents"].clone()) or {},
        ).images
    ours: dict[str, Any] = known | {"prompt_embeds": embeds, "plan": "full", "noise": noise}
    ours |= {} if distilled else {"negative_prompt_embeds": negative}
    with ElasticPipeline.from_pretrained(bundle.folder, "ort", threads=1) as pipe:
        drawn = pipe(**ours, output_type="latent")
        assert np.abs(pipe(**ours, output_type="np").images - wanted).max() < 1 / 255 / 4
    last = latents[-1].numpy()
    assert np.abs(pack(drawn.images, 2) - last).max() <= 1e-5 * np.abs(last).max()
    times = [step.time for step in drawn.steps] + [drawn.steps[-1].next_time]
    np.testing.assert_allclose(times, pipeline.scheduler.sigmas.numpy(), atol=1e-6)


def test_padding_in_the_middle_of_a_text_is_as_if_it_were_not_there() -> None:
    """diffusers pads between a prompt and its template's end, and masks that; here no padding is given."""
    feeds, tapped = fed(1, (3, 3), 5)
    padded = np.insert(tapped, [3, 3, 3, 3], 7.0, axis=1)  # four tokens of anything after the third
    mask = np.insert(np.ones((1, 5), bool), [3, 3, 3, 3], False, axis=1)
    longer = feeds | {"txt_ids": text_places(9, (3, 3), PATCHES)}
    wanted, prediction = (theirs(folders.krea2(), *given) for given in ((longer, padded, mask), (feeds, tapped)))
    assert np.abs(prediction - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_a_folder_says_what_the_runtime_must_know(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.krea2())
    captured = capture_folder(tmp_path / "f", None, Span(16, 32), Span(1, 2))
    model, graphs = captured.manifest.model, captured.manifest.graphs
    assert (model.family, model.patches, model.guidance_off) == ("krea2", PATCHES, 0)
    assert model.text is not None
    assert (model.text.length, model.text.width, model.text.pooled, model.text.layers) == (512, folders.WIDTH, 0, LAYERS)
    assert [spec.shape for spec in graphs["text_fusion"].inputs] == [("B", "T", LAYERS, folders.WIDTH)]
    assert graphs["text_fusion"].dimensions == {"B": Span(1, 2), "T": Span(1, 512)}
    assert "encoder_hidden_states" in {spec.name for spec in graphs["denoiser"].inputs}


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 6, folders.WIDTH), "4 dimensions"), ((1, 6, 2, folders.WIDTH), r"must be \(B, T, 3, 16\), got \(1, 6, 2, 16\)"),
     ((1, 6, 3, 8), r"must be \(B, T, 3, 16\), got \(1, 6, 3, 8\)"), ((1, 600, 3, folders.WIDTH), "600: cut or pad it")],
)  # fmt: skip
def test_embeddings_of_another_model_are_refused(made: dict[bool, tuple[Any, Bundle]], shape: tuple[int, ...], message: str) -> None:
    with ElasticPipeline.from_pretrained(made[True][1].folder, "ort", threads=1) as pipe, pytest.raises(UsageError, match=message):
        pipe(prompt_embeds=np.zeros(shape, np.float32), guidance_scale=0.0, plan="full", num_inference_steps=1)


def test_texts_are_fused_a_branch_at_a_time_whatever_the_denoiser_takes(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.krea2())
    graphs = {graph.name: graph for graph in capture_folder(tmp_path / "f", ("transformer",), Span(16, 32), Span(2, 4)).graphs}
    assert (graphs["denoiser"].batch, graphs["text_fusion"].batch) == (Span(2, 4), Span(1, 4))
