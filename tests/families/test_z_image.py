"""Z-Image as a graph over tokens with places and pad tokens: diffusers' own class and pipeline, FLOPs, and what is refused."""

import json
from collections.abc import Iterator
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
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elastic_export
from elastic_export.capture.folders import capture_folder
from elastic_export.families import z_image
from elastic_export.families.z_image import ZImage
from elastic_runtime import Budget, Bundle, ElasticPipeline, ModelError, Session, Span, open_session
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.denoising.tokens import Conditions, TokenDenoiser
from elastic_runtime.ralu.patches import pack, raster
from elastic_targets.weights import cast, held_in

ONE = Span(1, 1)
PATCHES = Patches(size=2, positions="img_ids", layout="after_text", multiple=32)
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def tensors(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def padded(texts: list[np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """Texts of several lengths as the runtime takes them."""
    most = max(map(len, texts))
    embeds = np.stack([np.pad(text, ((0, most - len(text)), (0, 0))) for text in texts])
    mask = np.array([[int(i < len(text)) for i in range(most)] for text in texts])
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folders.write(tmp_path_factory.mktemp("z") / "tiny-z", folders.z_image())
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return elastic_export.export(folder, output=tmp_path_factory.mktemp("b") / "b", size="16-32", batch="1-4", verify="ends")


@pytest.fixture(scope="module")
def theirs() -> ZImagePipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = ZImagePipeline(scheduler, folders.vae(), None, None, folders.z_image())  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(bundle: Bundle) -> Iterator[ElasticPipeline]:
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        yield pipe


def test_the_class_is_diffusers_at_sizes_and_texts_of_any_length(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    """Pads of the image and of the text, texts of several lengths in a batch, whether or not they fill up to one."""
    older = elastic_export.export(
        folder, output=tmp_path / "b", size="16-32", batch="1-3", opset=20, components="transformer", verify="none"
    )
    for exported in (bundle, older):
        with open_session(exported) as session:
            check(session)


def check(session: Session) -> None:
    transformer, denoiser = folders.z_image(), TokenDenoiser(session, PATCHES)
    for (rows, columns), lengths in (((1, 1), [1]), ((5, 7), [9]), ((8, 8), [32, 33]), ((3, 6), [40, 7, 64]), ((4, 8), [512])):
        latents, texts = normal(len(lengths), 4, 2 * rows, 2 * columns), [normal(length, folders.WIDTH) for length in lengths]
        with torch.inference_mode():
            frames = [frame[:, None] for frame in tensors(list(latents))]
            answers = transformer(frames, torch.full((len(lengths),), 0.7), tensors(texts), return_dict=False)[0]
            wanted = -torch.stack(answers)[:, :, 0].numpy()
        places = raster(len(lengths), rows, columns)
        got = denoiser.guided(pack(latents, 2), places, (rows, columns), 0.3, Conditions.of(texts), None, Guidance())
        assert np.abs(got - pack(wanted, 2)).max() <= 5e-6, (rows, columns, lengths)


@pytest.mark.parametrize(
    ("size", "lengths", "negative", "words", "mine"),
    [
        ((32, 32), [5], [3], {"guidance_scale": 5.0}, {}),
        ((20, 28), [40], [3], {"guidance_scale": 0.5}, {}),
        ((32, 16), [33], [], {"guidance_scale": 0.0}, {}),
        ((24, 20), [5, 40], [32, 33], {"guidance_scale": 4.0}, {}),
        ((24, 28), [5, 40], [9, 1], {"guidance_scale": 4.0, "cfg_normalization": True}, {}),
        ((32, 28), [7], [7], {"guidance_scale": 4.0, "cfg_normalization": 0.5}, {}),
        ((28, 20), [7], [50], {"guidance_scale": 4.0, "cfg_truncation": 0.4}, {"guidance_interval": (0.6, 1.0)}),
    ],
)  # fmt: skip
def test_whole_runs_are_those_of_diffusers_pipeline(
    ours: ElasticPipeline,
    theirs: ZImagePipeline,
    size: tuple[int, int],
    lengths: list[int],
    negative: list[int],
    words: dict[str, Any],
    mine: dict[str, Any],
) -> None:
    """From the same latents and embeddings, static shift 3: final latents to 1e-5 of the largest, pictures to less than a grey level."""
    height, width = size
    texts, weak = ([normal(length, folders.WIDTH) for length in each] for each in (lengths, negative))
    noise = normal(len(lengths), 4, height // 2, width // 2)
    known = {name: value for name, value in words.items() if name != "cfg_truncation"} | mine
    given = padded(texts) | (padded(weak, "negative_") if weak else {})
    for output, tolerance in (("latent", 1e-5), ("np", 1 / 255 / 10)):
        both: dict[str, Any] = {"num_inference_steps": 4, "height": height, "width": width, "output_type": output}
        with torch.inference_mode():
            embeds = {"prompt_embeds": tensors(texts), "negative_prompt_embeds": tensors(weak)}
            wanted = np.asarray(theirs(**embeds, **words, **both, latents=torch.from_numpy(noise)).images)
        got = np.asarray(ours(**given, **known, **both, plan="full", noise=noise).images)
        assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def test_sigmas_are_the_pipeline_s(ours: ElasticPipeline, theirs: ZImagePipeline) -> None:
    embeds, noise = normal(1, 4, folders.WIDTH), normal(1, 4, 8, 8)
    steps = ours(prompt_embeds=embeds, guidance_scale=0, plan="full", num_inference_steps=7, height=16, width=16, noise=noise).steps
    with torch.inference_mode():
        given = {"prompt_embeds": tensors(list(embeds)), "latents": torch.from_numpy(noise), "output_type": "latent"}
        theirs(**given, guidance_scale=0.0, num_inference_steps=7, height=16, width=16)
    np.testing.assert_allclose([step.time for step in steps] + [0.0], theirs.scheduler.sigmas.numpy(), atol=1e-7)


def test_stages_of_a_plan_are_filled_up_too(ours: ElasticPipeline) -> None:
    """28 tokens of the mixed stage become 32, and 16 of the first: the model knows no other numbers."""
    texts = padded([normal(5, folders.WIDTH), normal(40, folders.WIDTH)])
    result = ours(**texts, guidance_scale=0, plan="4x", height=32, width=32, seeds=3, output_type="np")
    assert np.isfinite(result.images).all()
    assert [step.budget for step in result.steps] == [Budget(tokens=32)] * 11 + [Budget(tokens=64)] * 7
    assert result.facts["tokens"] == (32, 32, 64)
    alone = ours(prompt_embeds=texts["prompt_embeds"][1:], guidance_scale=0, plan="4x", height=32, width=32, seeds=4, output_type="np")
    assert np.abs(alone.images[0] - result.images[1]).max() < 1e-4, "a picture is the same beside texts of other lengths"


def test_a_folder_says_what_the_runtime_must_know(bundle: Bundle) -> None:
    model, graph = bundle.manifest.model, bundle.manifest.graphs["denoiser"]
    assert (model.family, model.patches, model.guidance_off, model.sample_shape) == ("z-image", PATCHES, 0, (4, 16, 16))
    assert model.text is not None
    assert (model.text.length, model.text.width, model.text.pooled) == (512, folders.WIDTH, 0)
    names = ["hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "img_pad", "txt_pad"]
    assert [spec.name for spec in graph.inputs] == names
    assert graph.dimensions == {"B": Span(1, 4), "S": Span(32, 64), "T": Span(32, 512)}
    assert list(bundle.manifest.axes[0].values) == [32, 64]


def test_the_count_of_flops_is_torch_s_own() -> None:
    config, module = dict(folders.z_image(n_refiner_layers=2).config), ZImage(folders.z_image(n_refiner_layers=2))
    zeros = [(1, 64, 16), (1, 32, folders.WIDTH), (1,), (64, 3), (32, 3), (1, 64), (1, 32)]
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*(torch.zeros(shape) for shape in zeros))
    assert counter.get_total_flops() == z_image.flops(config, 64, 32)
    published = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "in_channels": 16, "cap_feat_dim": 2560}
    assert z_image.flops(published, 4096, 128) / 1e12 == pytest.approx(56.58, rel=1e-4)


def test_branches_that_overflow_in_half_precision_do_not_here() -> None:
    """Their last layers take and give a 64th, and sums stay in float32; diffusers' own class has no numbers left."""

    def loud() -> Any:
        transformer = folders.z_image()
        for block in transformer.layers:
            block.feed_forward.w1.weight *= 600
            block.feed_forward.w3.weight *= 600
            block.attention.to_v.weight *= 3000
            block.attention.to_out[0].weight *= 300
        return transformer

    latents, text = normal(1, 4, 16, 16), normal(32, folders.WIDTH)
    with torch.inference_mode():
        plain = cast(loud(), torch.float16)(
            [torch.from_numpy(latents[0])[:, None].half()], torch.full((1,), 0.7), [torch.from_numpy(text).half()]
        )
        assert not torch.isfinite(plain.sample[0]).all()
        arrays = [pack(latents, 2), text[None], np.full(1, 0.3), np.pad(raster(1, 8, 8)[0], ((0, 0), (1, 0))), np.zeros((32, 3))]
        feeds = [torch.from_numpy(array).float() for array in (*arrays, np.zeros((1, 64)), np.zeros((1, 32)))]
        exact, half = ZImage(loud())(*feeds), held_in(ZImage(loud()), torch.float16)(*feeds)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"siglip_feat_dim": 8}, "transformer has siglip_feat_dim, as Z-Image-Omni has .* is not supported: export Z-Image"),
        ({"all_patch_size": [4], "all_f_patch_size": [1]}, r"no patches of 2 x 2 in one frame \(2-1\), .* it has 4-1"),
        ({"axes_dims": [4, 6, 8]}, "does not describe a ZImageTransformer2DModel"),
    ],
)
def test_variants_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = folders.write(tmp_path / "f", folders.z_image(), decoder=False) / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        capture_folder(tmp_path / "f", None, Span(16, 32), ONE)


def test_tokens_come_in_multiples(folder: Path) -> None:
    captured = capture_folder(folder, None, Span(16, 96), ONE, max_sequence_length=40)
    assert captured.graphs[0].dimensions == {"B": ONE, "S": Span(32, 576), "T": Span(32, 64)}
    assert [point["tokens"] for point in captured.graphs[0].stages] == [160, 192, 288, 576]
    assert captured.manifest.model.sample_shape == (4, 48, 48)
