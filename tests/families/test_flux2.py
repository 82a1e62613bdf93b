"""FLUX.2 as a graph over tokens with places: diffusers' own class and pipelines, its VAE, FLOPs, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinInpaintPipeline, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elastic_export
from elastic_export.capture.folders import capture_folder
from elastic_export.families import flux2
from elastic_export.families.flux2 import Flux2
from elastic_runtime import BudgetError, Bundle, ElasticPipeline, ModelError, Plan, Request, Span, UsageError, open_session
from elastic_runtime.contract.manifest import Patches, Text, Vae
from elastic_runtime.denoising.tokens import place, text_places
from elastic_runtime.drawing.beside import fitted
from elastic_runtime.ralu.patches import raster

ONE = Span(1, 1)
PATCHES = Patches(size=1, positions="img_ids", layout="sequence")
TEXT = 3 * folders.WIDTH
Arrays = dict[str, np.ndarray]
KINDS: dict[str, dict[str, Any]] = {"klein": {}, "dev": {"guidance_embeds": True}}


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
        prediction = Flux2(transformer)(**tensors(feeds)).numpy()
    assert np.abs(prediction - wanted).max() <= 1e-6 * np.abs(wanted).max()


Made = dict[str, tuple[Any, Bundle]]
SCHEDULER = {"use_dynamic_shifting": True, "shift": 3.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By name: diffusers' pipeline of a folder without text encoders, and the bundle that was exported from it. The distilled one is the
    base with another word in its index, and so in its manifest."""
    root, pairs = tmp_path_factory.mktemp("flux2"), {}
    for name, kind in (("base", "klein"), ("dev", "dev")):
        transformer, scheduler = folders.flux2(**KINDS[kind]), FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        folder = folders.write(root / name, transformer)
        scheduler.save_pretrained(folder / "scheduler")
        parts: dict[str, Any] = {
            "scheduler": scheduler, "vae": folders.packed_vae(), "text_encoder": None, "tokenizer": None, "transformer": transformer,
        }  # fmt: skip
        verify = "ends" if name == "base" else "none"
        wide = {"tokens": "4-800", "components": "transformer,vae,encoder"}  # with room for references
        bundle = elastic_export.export(folder, output=root / f"{name}-b", size="16-96", batch="1-4", verify=verify, **wide)
        pairs[name] = (Flux2Pipeline if kind == "dev" else Flux2KleinPipeline)(**parts), bundle
        if name == "base":
            distilled = folders.as_distilled(bundle, folder, root / "distilled-b", Span(16, 96), Span(1, 4))
            pairs["distilled"] = Flux2KleinPipeline(**parts, is_distilled=True), distilled
    for pipeline, _ in pairs.values():
        pipeline.set_progress_bar_config(disable=True)
    return pairs


def check_untraced(bundle: Bundle, transformer: Flux2Transformer2DModel) -> None:
    guided = bundle.manifest.model.patches.guidance_embeds  # type: ignore[union-attr]
    with open_session(bundle) as session:
        for batch, size, text in ((1, (2, 2), 1), (3, (5, 9), 19), (2, (12, 12), 512)):
            feeds = fed(batch, size, text, guided)
            wanted = theirs(transformer, feeds)
            assert np.abs(session.run(feeds)["prediction"] - wanted).max() <= 5e-6 * np.abs(wanted).max(), (size, text)


@pytest.mark.parametrize("name", ["base", "dev"])
def test_untraced_sizes_through_onnx_runtime(made: Made, name: str) -> None:
    pipeline, bundle = made[name]
    check_untraced(bundle, pipeline.transformer)


@pytest.mark.wide
def test_untraced_sizes_at_opset_20(tmp_path: Path) -> None:
    transformer = folders.flux2(guidance_embeds=True)
    folders.write(tmp_path / "f", transformer, decoder=False)
    check_untraced(
        elastic_export.export(tmp_path / "f", output=tmp_path / "b", size="4-12", batch="1-3", opset=20, verify="none"), transformer
    )


CASES: dict[str, dict[str, Any]] = {
    "base": {"guidance_scale": 4.0},
    "distilled": {},
    "dev": {"guidance_scale": 2.5},
}


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 4), (24, 44, 3), (48, 20, 1)])
@pytest.mark.parametrize("name", CASES)
def test_whole_runs_are_those_of_diffusers_pipelines(made: Made, name: str, height: int, width: int, steps: int) -> None:
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


@pytest.mark.parametrize("sides", [[(64, 64)], [(64, 76), (80, 64)]], ids=["one", "two"])
@pytest.mark.parametrize("name", ["base", "distilled"])
def test_pictures_that_are_edited_after_references_are_those_of_diffusers(made: Made, name: str, sides: list[tuple[int, int]]) -> None:
    pipeline, bundle = made[name]
    colours = np.random.default_rng(5)
    pictures = [Image.fromarray(colours.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sides]
    embeds, noise = random(2, 2, 6, TEXT), random(3, 2, 16, 8, 6)
    negative = {"negative_prompt_embeds": random(4, 2, 3, TEXT)} if name == "base" else {}
    known = {"height": 32, "width": 24, "num_inference_steps": 3} | CASES[name]
    with torch.inference_mode():
        wanted = pipeline(
            image=pictures, prompt_embeds=torch.from_numpy(embeds), **tensors(negative), **known, latents=torch.from_numpy(noise),
            output_type="np",
        ).images  # fmt: skip
        encoded = [pipeline._encode_vae_image(pipeline.image_processor.preprocess(each), None)[0].numpy() for each in pictures]
    ours: dict[str, Any] = known | negative | {"prompt_embeds": embeds, "plan": "full", "noise": noise}
    with ElasticPipeline.from_pretrained(bundle.folder, "ort", threads=1) as pipe:
        drawn = pipe(**ours, image_latents=encoded, output_type="np")
        again = pipe.draw(Request.from_json(drawn.request.to_json()))
        alone = pipe(**ours, output_type="np")
    assert np.abs(drawn.images - wanted).max() < 1 / 255 / 4
    np.testing.assert_array_equal(drawn.images, again.images)
    assert np.abs(drawn.images - alone.images).max() > 1 / 255, "references act"
    beside = sum(width * height // 16 for width, height in sides)
    assert (drawn.facts["references"], drawn.facts["tokens"]) == (beside, (48 + beside,))
    assert {step.budget["tokens"] for step in drawn.steps} == {48 + beside}


@pytest.mark.parametrize(
    ("sides", "size"), [([(75, 70)], {}), ([(75, 70), (66, 64)], {"height": 32, "width": 24})], ids=["of its size", "two"]
)
@pytest.mark.parametrize("name", CASES)
def test_references_may_be_pictures_which_are_made_to_fit_and_encoded_as_there(
    made: Made, name: str, sides: list[tuple[int, int]], size: dict[str, int]
) -> None:
    pipeline, bundle = made[name]
    colours = np.random.default_rng(5)
    pictures = [Image.fromarray(colours.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sides]
    rows, columns = size.get("height", 68) // 4, size.get("width", 72) // 4
    embeds, noise = random(2, 2, 6, TEXT), random(3, 2, 16, rows, columns)
    negative = {"negative_prompt_embeds": random(4, 2, 3, TEXT)} if name == "base" else {}
    known = size | {"num_inference_steps": 3} | CASES[name]
    latents: list[torch.Tensor] = []
    with torch.inference_mode():
        wanted = pipeline(
            image=pictures, prompt_embeds=torch.from_numpy(embeds), **tensors(negative), **known, latents=torch.from_numpy(noise),
            output_type="np", callback_on_step_end=lambda pipe, index, time, arrays: latents.append(arrays["latents"].clone()) or {},
        ).images  # fmt: skip
    ours: dict[str, Any] = known | negative | {"prompt_embeds": embeds, "plan": "full", "noise": noise, "image": pictures}
    with ElasticPipeline.from_pretrained(bundle.folder, "ort", threads=1) as pipe:
        drawn = pipe(**ours, output_type="latent")
        assert np.abs(pipe(**ours, output_type="np").images - wanted).max() < 1 / 255
    last = latents[-1].numpy().transpose(0, 2, 1).reshape(noise.shape)
    assert np.abs(drawn.images - last).max() <= 1e-5 * np.abs(last).max()


def test_inpainting_with_the_picture_and_another_as_references_is_diffusers_own(made: Made) -> None:
    """Its pipeline takes the picture that is drawn over for the first reference, and a soft mask, which is a hard one on the grid of
    tokens."""
    plain, bundle = made["distilled"]
    pipeline = Flux2KleinInpaintPipeline(
        **{name: part for name, part in plain.components.items() if name != "is_distilled"}, is_distilled=True
    )
    pipeline.set_progress_bar_config(disable=True)
    colours, mask = np.random.default_rng(5), np.zeros((64, 68), np.uint8)
    picture, other = (
        Image.fromarray(colours.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in ((68, 64), (64, 64))
    )
    mask[8:44, 16:40] = 255
    embeds, seed = random(2, 1, 6, TEXT), 7
    known: dict[str, Any] = {"image": picture, "mask_image": Image.fromarray(mask), "strength": 0.6, "num_inference_steps": 5}
    latents: list[torch.Tensor] = []
    with torch.inference_mode():
        pipeline(
            **known, image_reference=other, prompt_embeds=torch.from_numpy(embeds), generator=torch.manual_seed(seed), guidance_scale=1.0,
            callback_on_step_end=lambda pipe, index, time, arrays: latents.append(arrays["latents"].clone()) or {},
        )  # fmt: skip
    noise = torch.randn((1, 16, 16, 17), generator=torch.manual_seed(seed)).numpy()
    with ElasticPipeline.from_pretrained(bundle.folder, "ort", threads=1) as pipe:
        drawn = pipe(**known, image_reference=[picture, other], prompt_embeds=embeds, noise=noise, output_type="latent")
    last = latents[-1].numpy().transpose(0, 2, 1).reshape(noise.shape)
    assert len(drawn.steps) == len(latents) == 3
    assert np.abs(drawn.images - last).max() <= 1e-5 * np.abs(last).max()


@pytest.mark.parametrize(("width", "height"), [(1500, 1100), (701, 1999), (97, 130)])
def test_a_reference_is_made_to_fit_as_by_diffusers_processor(width: int, height: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    large = picture if width * height <= 1024**2 else processor._resize_to_target_area(picture, 1024**2)
    wide, high = (side // 16 * 16 for side in large.size)
    wanted = processor.preprocess(large, height=high, width=wide, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(fitted(np.asarray(picture), 16), np.rint((wanted + 1) * 127.5))


def test_references_that_do_not_fit_are_named(made: Made) -> None:
    ours: dict[str, Any] = {"prompt_embeds": random(2, 1, 6, TEXT), "plan": "full", "height": 48, "width": 48}
    with ElasticPipeline.from_pretrained(made["distilled"][1].folder, "ort", threads=1) as pipe:
        for wrong, message in (
            (random(0, 8, 4, 4), r"image_latents are of shape \(16, h, w\), one for each reference picture, got \(8, 4, 4\)"),
            ([random(0, 16, 4)], r"got \(16, 4\)"),
            ([], r"image_latents are one array or several, got \[\]"),
            ("cat.png", "image_latents are one array or several|arrays of numbers"),
            ([np.full((16, 2, 2), np.nan)], "finite numbers"),
            (
                [random(0, 16, 30, 30)],
                r"takes 4-800 image tokens, and .* needs 1044, 900 of them of references, in a stage: .* and these --tokens",
            ),
        ):
            with pytest.raises(UsageError, match=message):
                pipe(**ours, image_latents=wrong)
    plain = capture_folder(made["dev"][1].folder.parent / "dev", None, Span(16, 48), ONE, spans={"tokens": Span(4, 11 * 144)})
    assert plain.manifest.axis("tokens").span == Span(4, 11 * 144)
    with pytest.raises(BudgetError, match="--tokens 4-1585 does not go with sides of 16-48 pixels"):
        capture_folder(made["dev"][1].folder.parent / "dev", None, Span(16, 48), ONE, spans={"tokens": Span(4, 11 * 144 + 1)})


def test_the_usual_guidance_is_that_of_the_pipelines(made: Made) -> None:
    """4, classifier-free or distilled; of a model distilled to few steps none, which diffusers leaves aside and here is refused."""
    embeds = {"prompt_embeds": random(2, 1, 4, TEXT), "height": 16, "width": 16, "plan": "full", "num_inference_steps": 1, "seeds": 0}
    negative = {"negative_prompt_embeds": random(3, 1, 4, TEXT)}
    with ElasticPipeline.from_pretrained(made["base"][1].folder, "ort", threads=1) as pipe:
        with pytest.raises(UsageError, match="classifier-free guidance leads away from negative_prompt_embeds: give them"):
            pipe(**embeds)
        usual = pipe(**embeds, **negative, output_type="latent")
        assert usual.facts["guidance"] == 4.0
    with ElasticPipeline.from_pretrained(made["dev"][1].folder, "ort", threads=1) as pipe:
        assert pipe(**embeds, output_type="latent").facts["embedded_guidance"] == 4.0
    with ElasticPipeline.from_pretrained(made["distilled"][1].folder, "ort", threads=1) as pipe:
        with pytest.raises(UsageError, match="was distilled to draw without guidance, and diffusers leaves guidance_scale aside"):
            pipe(**embeds, guidance_scale=4.0)
        led = pipe(**embeds, **negative, true_cfg_scale=4.0, output_type="latent")
    np.testing.assert_allclose(led.images, usual.images, atol=1e-5)  # the same weights


def test_patches_grow_among_cells_of_16_times_the_vae_s_pixels(made: Made) -> None:
    """A plan of three stages: previews of half the sides, edges by cell, places with halves."""
    plan = Plan((1, 1, 2), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)
    with ElasticPipeline.from_pretrained(made["distilled"][1].folder, "ort", threads=1) as pipe:
        drawn = pipe(prompt_embeds=random(2, 2, 4, TEXT), height=48, width=32, plan=plan, seeds=(0, 1), output_type="np")
        with pytest.raises(UsageError, match="height is a multiple of 8 px for this plan, got 20"):
            pipe(prompt_embeds=random(2, 1, 4, TEXT), height=20, width=32, plan=plan)
    assert drawn.images.shape == (2, 48, 32, 3)
    assert np.isfinite(drawn.images).all()
    assert [step.budget["tokens"] for step in drawn.steps] == [24, 45, 96, 96]


def test_a_folder_says_what_the_runtime_must_know(made: Made) -> None:
    for name, (_, bundle) in made.items():
        model = bundle.manifest.model
        assert model.patches == msgspec.structs.replace(PATCHES, guidance_embeds=name == "dev")
        assert (model.family, model.sample_shape, model.distilled) == ("flux2", (16, 24, 24), name == "distilled")
        assert model.vae == Vae(scaling_factor=1.0, shift_factor=0.0, upscale=4)
        assert model.text == Text(encoders=(), length=512, width=TEXT, pooled=0)
        assert model.config["scheduler"]["mu"] == "empirical"
        denoiser, decoder = (bundle.manifest.graphs[graph] for graph in ("denoiser", "decoder"))
        assert denoiser.dimensions == {"B": Span(1, 4), "S": Span(4, 800), "T": Span(1, 512)}
        assert {spec.name: spec.shape for spec in (*decoder.inputs, *decoder.outputs)} == {
            "latent": ("B", 16, "h", "w"), "image": ("B", 3, "4*h", "4*w"),
        }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_of_flops_is_torch_s_own(kind: str) -> None:
    transformer = folders.flux2(**KINDS[kind])
    module, config = Flux2(transformer), dict(transformer.config)
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**tensors(fed(1, (3, 5), 7, kind == "dev")))
    assert counter.get_total_flops() == flux2.flops(config, 15, 7)


@pytest.mark.parametrize(
    ("heads", "double", "single", "text", "guided", "teraflops"),
    [(24, 5, 20, 7680, False, 34.82), (32, 8, 24, 12288, False, 75.51), (48, 8, 48, 15360, True, 282.6)],
    ids=["klein-4b", "klein-9b", "dev"],
)
def test_flops_of_the_published_sizes(heads: int, double: int, single: int, text: int, guided: bool, teraflops: float) -> None:
    config = {
        "attention_head_dim": 128, "num_attention_heads": heads, "num_layers": double, "num_single_layers": single, "in_channels": 128,
        "out_channels": None, "joint_attention_dim": text, "guidance_embeds": guided, "mlp_ratio": 3.0, "timestep_guidance_channels": 256,
    }  # fmt: skip
    assert flux2.flops(config, 4096, 512) / 1e12 == pytest.approx(teraflops, rel=2e-4)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"patch_size": 2}, "has a patch_size of 2, and FLUX.2 takes latents that its VAE packed"),
        ("transformer", {"axes_dims_rope": [4, 6, 6]}, r"turns \[4, 6, 6\] values of a head by its places, and FLUX.2 has 4 such numbers"),
        ("transformer", {"axes_dims_rope": [4, 4, 4, 8]}, "that add up to attention_head_dim, 16"),
        ("transformer", {"in_channels": 32, "out_channels": 16}, "takes 32 channels and gives 16: it draws over a picture"),
        ("vae", {"patch_size": [4, 4]}, r"FLUX.2's pipelines pack 2 x 2 latent pixels, got patch_size \[4, 4\]"),
        ("vae", {"batch_norm_eps": "small"}, "batch_norm_eps is a number, 0 or more, got 'small'"),
        ("vae", {"batch_norm_eps": -1}, "batch_norm_eps is a number, 0 or more, got -1"),
        ("vae", {"latent_channels": 8}, "decodes 8 channels, but the model draws 16, which are 4 of the VAE's: it is another model's"),
        ("vae", {"block_out_channels": []}, r"does not describe|block_out_channels is a list of widths|as many"),
        ("vae", {"decoder_block_out_channels": [8, 8, 8]}, "block_out_channels and decoder_block_out_channels are as many"),
        ("vae", {"_class_name": "AutoencoderKL"}, "decodes 4 channels, but the model draws 16"),
        ("vae", {"_class_name": "AutoencoderKLWan"}, "there are AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(written: Path, part: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(written, tmp_path / "copy"))
    config = json.loads((copy / part / "config.json").read_text()) | change
    (copy / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        capture_folder(copy, None, Span(16, 32), ONE)


def test_a_vae_without_what_its_norm_has_seen_is_refused(written: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(written, tmp_path / "copy"))
    weights = load_file(file := copy / "vae" / "diffusion_pytorch_model.safetensors")
    del weights["bn.running_var"]
    save_file(weights, file)
    with pytest.raises(ModelError, match="lacks bn.running_var"):
        capture_folder(copy, None, Span(16, 32), ONE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("written") / "f", folders.flux2())
