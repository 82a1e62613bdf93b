"""Qwen-Image as a graph over tokens with places: recorded outputs, diffusers' own class, FLOPs, and what is refused."""

import json
import logging
import shutil
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
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elastic_export
from elastic_export.capture.folders import capture_folder
from elastic_export.families import qwen_image
from elastic_export.families.qwen_image import QwenImage
from elastic_runtime import ElasticPipeline, ModelError, Span, open_session
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.tokens import place, text_places
from elastic_runtime.ralu.patches import pack, raster, unpack

ONE = Span(1, 1)
PATCHES = Patches(size=2, positions="img_ids", layout="centred")
SIZE = (8, 8)  # of the recorded picture, in tokens
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "qwen-image-a"


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Arrays:
    with np.load(folder / "io.npz") as arrays:
        return dict(arrays)


def placed(arrays: Arrays, size: tuple[int, int]) -> Arrays:
    """Those of the recorded inputs that the contract has, with the places of a picture of `size`."""
    feeds = {name: arrays[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
    text = feeds["encoder_hidden_states"].shape[1]
    return feeds | {"img_ids": place(raster(1, *size)[0], size, text, PATCHES), "txt_ids": text_places(text, size, PATCHES)}


def forward(module: Any, feeds: Arrays) -> np.ndarray:
    with torch.inference_mode():
        output: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    return output


def original(folder: Path) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).eval()


def test_golden_outputs_in_torch(folder: Path, recorded: Arrays) -> None:
    assert np.abs(forward(QwenImage(original(folder)), placed(recorded, SIZE)) - recorded["out_nomask"]).max() <= 5e-6


@pytest.mark.parametrize("opset", narrow([23, 20]))
def test_golden_outputs_and_other_sizes_through_onnx_runtime(folder: Path, recorded: Arrays, opset: int, tmp_path: Path) -> None:
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="16-32", batch="1-3", opset=opset, verify="none")
    theirs = original(folder)
    with open_session(bundle) as session:
        assert np.abs(session.run(placed(recorded, SIZE))["prediction"] - recorded["out_nomask"]).max() <= 5e-6
        generator = np.random.default_rng(0)
        for batch, size, text in ((1, (4, 4), 1), (3, (5, 9), 19), (2, (16, 16), 512)):
            arrays = {
                "hidden_states": generator.standard_normal((batch, size[0] * size[1], 16)),
                "encoder_hidden_states": generator.standard_normal((batch, text, 24)),
                "timestep": generator.uniform(0, 1, batch),
            }  # fmt: skip
            feeds = {name: array.astype(np.float32) for name, array in arrays.items()}
            with torch.inference_mode():
                given = {name: torch.from_numpy(array) for name, array in feeds.items()}
                wanted = theirs(**given, img_shapes=[[(1, *size)]] * batch, return_dict=False)[0].numpy()
            assert np.abs(session.run(placed(feeds, size))["prediction"] - wanted).max() <= 5e-6, (size, text)


def test_whole_runs_are_those_of_diffusers_pipeline(folder: Path, recorded: Arrays, tmp_path: Path) -> None:
    """Embeddings of two lengths, guidance with rescaling, sigmas down to `shift_terminal`; and no decoder, so latents come out."""
    steps = json.loads((folder / "case.json").read_text())["run"]
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="16", batch="1", verify="none")
    seen = []
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        result = pipe(
            prompt_embeds=recorded["run_positive"], negative_prompt_embeds=recorded["run_negative"], guidance_scale=steps["scale"],
            plan="full", num_inference_steps=steps["steps"], noise=unpack(recorded["run_start"], *SIZE, 2), output_type="latent",
            callback_on_step_end=lambda pipe, index, time, arrays: seen.append(arrays["latents"]),
        )  # fmt: skip
    times = [step.time for step in result.steps] + [result.steps[-1].next_time]
    np.testing.assert_allclose(times, recorded["run_sigmas"], atol=1e-7)
    for got, wanted in zip(seen, recorded["run_latents"], strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(pack(result.images, 2) - recorded["run_latents"][-1]).max() <= 1e-5 * np.abs(recorded["run_latents"][-1]).max()


def test_a_folder_says_what_the_runtime_must_know(folder: Path) -> None:
    captured = capture_folder(folder, None, Span(16, 32), ONE)
    model = captured.manifest.model
    assert (model.family, model.patches, model.guidance_rescale, model.sample_shape) == ("qwen-image", PATCHES, "norm", (4, 32, 32))
    assert model.text is not None
    assert (model.text.length, model.text.width, model.text.pooled) == (512, 24, 0)
    assert model.config["scheduler"]["shift_terminal"] == 0.02
    names = ["hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids"]
    assert [spec.name for spec in captured.graphs[0].inputs] == names
    assert captured.graphs[0].dimensions == {"B": ONE, "S": Span(16, 256), "T": Span(1, 512)}


def test_the_count_of_flops_is_torch_s_own(folder: Path) -> None:
    config = dict(original(folder).config)
    module = QwenImage(original(folder))
    feeds = {
        "hidden_states": torch.zeros(1, 15, 16), "encoder_hidden_states": torch.zeros(1, 7, 24), "timestep": torch.ones(1),
        "img_ids": torch.zeros(15, 3), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**feeds)
    assert counter.get_total_flops() == qwen_image.flops(config, 15, 7)
    assert qwen_image.flops(qwen(), 4096, 128) / 1e12 == pytest.approx(70.58, rel=1e-4)


def qwen() -> dict[str, Any]:
    return {
        "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 60, "in_channels": 64, "out_channels": 16, "patch_size": 2,
        "joint_attention_dim": 3584,
    }  # fmt: skip


@pytest.mark.parametrize("variant", qwen_image.VARIANTS)
def test_variants_are_refused_by_name(folder: Path, variant: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "transformer" / "config.json").read_text()) | {variant: True}
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"transformer has {variant}, .* are not supported: export Qwen-Image itself"):
        capture_folder(copy, None, Span(16, 32), ONE)


def test_a_model_that_draws_over_a_picture_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.qwen_image(in_channels=32), decoder=False)
    with pytest.raises(ModelError, match="takes 32 channels and gives 16: it draws over a picture"):
        capture_folder(tmp_path / "f", None, Span(16, 32), ONE)


def test_pictures_are_those_of_diffusers_pipeline(tmp_path: Path) -> None:
    """A folder with Qwen-Image's own VAE, whose text encoder is left out: embeddings in, pictures out, square and wide."""
    transformer, vae = folders.qwen_image(), folders.frame_vae()
    folder = folders.write(tmp_path / "f", transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    scheduler.save_pretrained(folder / "scheduler")
    theirs = QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)  # type: ignore[arg-type]
    theirs.set_progress_bar_config(disable=True)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # which misses a mask
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="24-32", batch="1-2", verify="ends")
    generator = np.random.default_rng(0)
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        for height, width in ((32, 32), (24, 32)):
            embeds = {name: generator.standard_normal((1, text, 16)).astype(np.float32) for name, text in (("", 5), ("negative_", 3))}
            given = {f"{name}prompt_embeds": torch.from_numpy(array) for name, array in embeds.items()}
            noise = generator.standard_normal((1, 4, height // 2, width // 2)).astype(np.float32)
            start = torch.from_numpy(pack(noise, 2))
            with torch.inference_mode():
                wanted = theirs(
                    **given, height=height, width=width, num_inference_steps=3, true_cfg_scale=4.0, latents=start, output_type="np"
                ).images  # fmt: skip
            pictures = pipe(
                **{f"{name}prompt_embeds": array for name, array in embeds.items()}, plan="full", num_inference_steps=3, height=height,
                width=width, noise=noise, output_type="np",
            ).images  # fmt: skip
            assert np.abs(pictures - wanted).max() < 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std is a number for each of 4 channels"),
        ({"latents_mean": [0.0]}, "latents_mean is a number for each of 4 channels"),
        ({"temperal_downsample": None}, "temperal_downsample is a list, one value for each halving"),
        ({"z_dim": 16}, "decodes 16 channels, but the model draws 4"),
        ({"_class_name": "AutoencoderKLWan"}, "is not a diffusers AutoencoderKL: it is a AutoencoderKLWan; there are AutoencoderKL, "),
    ],
)
def test_a_vae_that_does_not_fit_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.qwen_image())
    config = json.loads((folder / "vae" / "config.json").read_text()) | change
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        capture_folder(folder, None, Span(16, 32), ONE)
