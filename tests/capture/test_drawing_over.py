"""Pictures drawn over, whole and where a mask says, are those of diffusers' own pipelines: the same picture, noise, steps and strength."""

import logging
from typing import Any

import numpy as np
import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="diffusers' pipelines need torch")
pytest.importorskip("diffusers", reason="the pipelines are diffusers'")
pytest.importorskip("onnxruntime", reason="ours draw through ONNX Runtime")

import diffusers  # noqa: E402
import folders  # noqa: E402
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: E402
from PIL import Image  # noqa: E402

import elastic_export  # noqa: E402
from elastic_runtime import ElasticPipeline  # noqa: E402
from elastic_runtime.ralu.patches import pack  # noqa: E402

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
KINDS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "flux": (folders.flux, folders.vae, DYNAMIC | {"shift": 3.0}, "Flux"),
    "sd3": (
        # its inpainting pipeline blends latents of transformers of 16 channels alone
        lambda: folders.sd3(in_channels=16, out_channels=16), lambda: folders.vae(latent_channels=16), {"shift": 3.0}, "StableDiffusion3",
    ),
    "qwen": (folders.qwen_image, folders.frame_vae, DYNAMIC | {"shift_terminal": 0.02}, "QwenImage"),
}  # fmt: skip
TEXT = {"flux": 6, "sd3": 18, "qwen": 5}  # tokens
SIDE, WIDE = 24, 32
CASES = [(5, 0.3), (5, 0.6), (4, 1.0), (3, 0.05)]  # steps and strength


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    colours = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours).convert(mode)


@pytest.fixture(scope="module", params=narrow(KINDS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our pipeline, and what makes diffusers' of a kind from the same parts."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    make, vae, config, name = KINDS[request.param]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    root = tmp_path_factory.mktemp(request.param)
    folder = folders.write(root / "m", make())
    scheduler.save_pretrained(folder / "scheduler")
    vae().save_pretrained(folder / "vae")
    bundle = elastic_export.export(
        folder, output=root / "b", size="16-32", batch="1-2", components="transformer,vae,encoder", verify="none"
    )  # fmt: skip
    encoders = {
        "flux": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        "sd3": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        "qwen": ("text_encoder", "tokenizer"),
    }[request.param]

    def theirs(kind: str) -> Any:
        pipeline = getattr(diffusers, f"{name}{kind}Pipeline")
        made = pipeline(transformer=make(), vae=vae().eval(), scheduler=scheduler, **dict.fromkeys(encoders))
        made.set_progress_bar_config(disable=True)
        return made

    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as ours:
        yield request.param, ours, theirs


def embeddings(name: str) -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    hidden = source.standard_normal((1, TEXT[name], folders.WIDTH)).astype(np.float32)
    return {"prompt_embeds": hidden} | (
        {}
        if name == "qwen"
        else {"pooled_prompt_embeds": source.standard_normal((1, (2 if name == "sd3" else 1) * folders.POOLED)).astype(np.float32)}
    )


def drawn_noise(ours: ElasticPipeline) -> np.ndarray:
    """What diffusers draws of seed 7."""
    shape = 1, ours.bundle.manifest.model.sample_shape[0], SIDE // 2, WIDE // 2
    return torch.randn(shape, generator=torch.manual_seed(7)).numpy()


def drawn(both: Any, kind: str, steps: int, strength: float, image: Image.Image, mask: Image.Image | None = None) -> tuple[Any, Any]:
    """Latents of both, as tokens."""
    name, ours, theirs = both
    embeds = embeddings(name)
    given = {key: torch.from_numpy(value) for key, value in embeds.items()}
    if name == "qwen":
        given["prompt_embeds_mask"] = torch.ones(given["prompt_embeds"].shape[:2], dtype=torch.int64)
    scales = {"guidance_scale": 1.0} if name == "sd3" else {"true_cfg_scale": 1.0} if name == "qwen" else {"guidance_scale": 3.5}
    masks = {"mask_image": mask} if mask else {}
    common: dict[str, Any] = {"image": image, "strength": strength, "height": SIDE, "width": WIDE, "num_inference_steps": steps} | masks
    wanted = theirs(kind)(
        **given, **common, **scales, generator=torch.manual_seed(7), output_type="latent"
    ).images  # fmt: skip
    noise = drawn_noise(ours)
    scale = 3.5 if name == "flux" else 1.0
    result = ours(**embeds, **common, plan="full", guidance_scale=scale, noise=noise, output_type="latent")
    left = max(steps - int(max(steps - steps * strength, 0)), 1)
    assert len(result.steps) == left
    wanted = wanted.numpy()
    return pack(result.images, 2), pack(wanted, 2) if wanted.ndim == 4 else wanted


@pytest.fixture(autouse=True)
def _mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers draws latents from what its encoder gives; ours are the mean of it."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.parametrize(("steps", "strength"), CASES)
def test_image_to_image_is_diffusers_own(both: Any, steps: int, strength: float) -> None:
    latents, wanted = drawn(both, "Img2Img", steps, strength, picture(SIDE, WIDE))
    assert np.abs(latents - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_picture_of_another_size_is_made_to_fit_as_there(both: Any) -> None:
    latents, wanted = drawn(both, "Img2Img", 4, 0.5, picture(50, 20))
    assert np.abs(latents - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.6), (4, 1.0)])
def test_inpainting_is_diffusers_own(both: Any, steps: int, strength: float) -> None:
    mask = np.zeros((SIDE, WIDE), np.uint8)
    mask[4:17, 9:30] = 255
    mask[0:2, 0:2] = 127  # just below half white
    latents, wanted = drawn(both, "Inpaint", steps, strength, picture(SIDE, WIDE), Image.fromarray(mask))
    assert np.abs(latents - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert not np.allclose(latents, drawn(both, "Img2Img", steps, strength, picture(SIDE, WIDE))[0], atol=1e-3)


def test_the_pictures_are_theirs_too(both: Any) -> None:
    name, ours, theirs = both
    given = {key: torch.from_numpy(value) for key, value in embeddings(name).items()}
    if name == "qwen":
        given["prompt_embeds_mask"] = torch.ones(given["prompt_embeds"].shape[:2], dtype=torch.int64)
    scales = {"guidance_scale": 1.0} if name == "sd3" else {"true_cfg_scale": 1.0} if name == "qwen" else {"guidance_scale": 3.5}
    common: dict[str, Any] = {"image": picture(SIDE, WIDE), "strength": 0.5, "height": SIDE, "width": WIDE, "num_inference_steps": 4}
    wanted = theirs("Img2Img")(**given, **common, **scales, generator=torch.manual_seed(7), output_type="np").images
    noise = drawn_noise(ours)
    pictures = ours(**embeddings(name), **common, guidance_scale=3.5 if name == "flux" else 1.0, noise=noise, output_type="np").images
    assert np.abs(pictures - wanted).max() <= 1 / 255
