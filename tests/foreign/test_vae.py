"""The encoder graph of a VAE: diffusers' own latents, at sizes that were never traced, beside the decoder and only where asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders  # noqa: E402
from diffusers import Flux2KleinPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.foreign.vae import load_vae  # noqa: E402
from elastic_runtime import InferenceError, ModelError, Span, open_session  # noqa: E402

KINDS = {"flux": (folders.flux, folders.vae), "qwen": (folders.qwen_image, folders.frame_vae)}


@pytest.fixture(scope="module", params=KINDS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    make, vae = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    folder = folders.write(root / "m", make())
    components = "vae,encoder"
    return elastic_export.export(folder, output=root / "b", size="16-32", batch="1-2", components=components, verify="ends"), vae().eval()


@pytest.mark.parametrize("size", [(16, 16), (20, 32), (26, 18)])
def test_latents_are_those_of_diffusers(bundle: Any, size: tuple[int, int]) -> None:
    made, vae = bundle
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, *size)).astype(np.float32)
    given = torch.from_numpy(image)
    framed = type(vae).__name__ == "AutoencoderKLQwenImage"
    with torch.inference_mode():
        latent = vae.encode(given[:, :, None] if framed else given).latent_dist.mode()
    if framed:
        mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
        latent = (latent[:, :, 0] - mean) / std
    with open_session(made, "encoder", "ort", threads=1) as session:
        latents = session.run({"image": image})["latent"]
    assert np.abs(latents - latent.numpy()).max() <= 1e-5 * np.abs(latent.numpy()).max()


def test_it_is_described_and_proven_like_the_others(bundle: Any) -> None:
    graph = bundle[0].manifest.graphs["encoder"]
    assert [(spec.name, spec.shape) for spec in (*graph.inputs, *graph.outputs)] == [
        ("image", ("B", 3, "2*h", "2*w")), ("latent", ("B", 4, "h", "w")),
    ]  # fmt: skip
    assert graph.dimensions == {"B": Span(1, 2), "h": Span(4, 16), "w": Span(4, 16)}
    assert graph.artifacts[0].verified
    assert all(row.passed for row in graph.artifacts[0].verified)
    with open_session(bundle[0], "encoder", "ort", threads=1) as session:
        with pytest.raises(
            InferenceError, match=r"image must have shape \(B, 3, 2\*h, 2\*w\) with equal letters equal, got \(1, 3, 17, 16\)"
        ):
            session.run({"image": np.zeros((1, 3, 17, 16), np.float32)})
        with pytest.raises(InferenceError, match="this graph takes h of 4-16, got 20"):
            session.run({"image": np.zeros((1, 3, 40, 16), np.float32)})


def test_it_is_made_where_it_is_asked_for_and_with_the_rest_of_its_vae(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.flux())
    with pytest.raises(ModelError, match="the encoder goes with the rest of its VAE: --components transformer,vae,encoder"):
        elastic_export.export(folder, output=tmp_path / "b", components="transformer,encoder")
    with pytest.raises(ModelError, match="--components are transformer, vae, text, encoder, got nothing"):
        elastic_export.export(folder, output=tmp_path / "b", components="nothing")


def test_an_encoder_whose_weights_are_missing_is_refused_and_a_decoder_s_need_not_be_there(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.flux())
    (file,) = (folder / "vae").glob("*.safetensors")
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if not name.startswith(("decoder.", "post_quant_conv."))}, file)
    image = torch.rand(1, 3, 16, 16, generator=torch.manual_seed(0))
    assert torch.equal(load_vae(folder / "vae", "encoder")(image), folders.vae().eval().encode(image).latent_dist.mode())
    save_file({name: value for name, value in whole.items() if not name.startswith(("encoder.", "quant_conv."))}, file)
    with pytest.raises(ModelError, match=r"vae does not fit .*: it lacks .*encoder"):
        load_vae(folder / "vae", "encoder")


def test_flux_2_s_latents_are_packed_and_normalised_as_its_pipeline_has_them(tmp_path: Path) -> None:
    vae = folders.packed_vae()
    vae.save_pretrained(tmp_path / "vae")
    image = torch.rand(2, 3, 16, 24, generator=torch.manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        packed = Flux2KleinPipeline._patchify_latents(vae.encode(image).latent_dist.mode())
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        wanted = (packed - vae.bn.running_mean[:, None, None]) / std[:, None, None]
        latents = load_vae(tmp_path / "vae", "encoder")(image)
        assert latents.shape == (2, 16, 4, 6)
        torch.testing.assert_close(latents, wanted, atol=1e-6, rtol=1e-5)
        again = load_vae(tmp_path / "vae")(latents)  # what it gives is what the decoder takes
        torch.testing.assert_close(again, vae.decode(vae.encode(image).latent_dist.mode(), return_dict=False)[0], atol=1e-5, rtol=1e-4)
