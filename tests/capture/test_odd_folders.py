"""Folders that are not quite those of FLUX and SD3: drawn as they say, or refused in a sentence before anything is exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the folders are torch's")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")

import folders  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from diffusers.models.embeddings import Timesteps  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.capture.folders import capture_folder  # noqa: E402
from elastic_export.families.layers import Sinusoids  # noqa: E402
from elastic_export.foreign.folder import Folder  # noqa: E402
from elastic_export.foreign.text_encoders import load_encoder  # noqa: E402
from elastic_runtime import BudgetError, ElasticPipeline, ModelError, Plan, Span  # noqa: E402
from elastic_targets.weights import held_in  # noqa: E402

ONE = Span(1, 2)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "m", folders.flux(), text=True)


def test_a_transformer_that_draws_over_a_picture_is_refused(tmp_path: Path) -> None:
    for what, make in (("flux", lambda: folders.flux(in_channels=24, out_channels=16)), ("sd3", lambda: folders.sd3(in_channels=8))):
        folder = folders.write(tmp_path / what, make(), decoder=False)
        with pytest.raises(ModelError, match=r"takes \d+ channels and gives \d+: it draws over a picture"):
            capture_folder(folder, None, None, ONE, digest=False)


def test_a_pipeline_of_another_name_and_a_folder_without_a_vae_are_noted(flux: Path, tmp_path: Path) -> None:
    edit(flux / "model_index.json", _class_name="FluxKontextPipeline")
    notes = capture_folder(flux, None, None, ONE, digest=False).notes
    assert any("FluxKontextPipeline: what that draws besides prompts" in note for note in notes)
    bare = folders.write(tmp_path / "bare", folders.flux(), decoder=False)
    assert any("--size counts those of the latent" in note for note in capture_folder(bare, None, Span(8, 16), ONE, digest=False).notes)


def test_a_vae_of_one_block_draws(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.flux(), text=True, decoder=False)
    torch.manual_seed(0)
    flat = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    flat.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    bundle = elastic_export.export(folder, output=tmp_path / "b", size="8-16", batch="1-2")
    assert bundle.manifest.model.vae is not None
    assert bundle.manifest.model.vae.upscale == 1
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        assert pipe("a cat", plan=Plan.full(1), height=16, width=16, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("size", "pixels"), [([32, 24], 32), (32, 32), (0, 128 * 2)])
def test_the_usual_side_of_a_vae_is_a_number_or_a_pair(size: Any, pixels: int, flux: Path) -> None:
    edit(flux / "vae" / "config.json", sample_size=size)
    assert capture_folder(flux, ("vae",), None, ONE, digest=False).manifest.model.sample_shape == (4, pixels // 2, pixels // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": None}, "scaling_factor is a number above 0 and shift_factor one, got None"),
        ({"scaling_factor": 0}, "scaling_factor is a number above 0"),
        ({"shift_factor": "0.1"}, "scaling_factor is a number above 0 and shift_factor one, got 0.5 and 0.1"),
        ({"block_out_channels": None}, "block_out_channels is a list of widths, got None"),
        ({"sample_size": None}, "vae/config.json does not describe a AutoencoderKL"),
        ({"sample_size": "x"}, "vae/config.json does not describe a AutoencoderKL"),
        ({"latent_channels": 16}, "decodes 16 channels, but the model draws 4"),
    ],
)
def test_a_vae_whose_facts_are_none_is_refused(change: dict[str, Any], message: str, flux: Path) -> None:
    edit(flux / "vae" / "config.json", **change)
    with pytest.raises(ModelError, match=message):
        capture_folder(flux, None, None, ONE, digest=False)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": "2"}, {"axes_dims_rope": "x"}, {"num_layers": -1}, {"attention_head_dim": None}, {"_class_name": 7},
        {"num_layers": 10**9}, {"joint_attention_dim": 0},
    ],
)  # fmt: skip
def test_a_transformers_config_that_is_none_is_a_sentence(change: dict[str, Any], flux: Path) -> None:
    edit(flux / "transformer" / "config.json", **change)
    with pytest.raises(ModelError):
        capture_folder(flux, ("transformer",), None, ONE, digest=False)


def test_t5_stays_exact_in_half_precision_where_transformers_keeps_it(flux: Path) -> None:
    encoder = load_encoder(Folder.open(flux), "text_encoder_2")
    assert encoder.exact
    assert all(name.endswith(".wo") for name in encoder.exact)
    half = held_in(encoder, torch.float16)
    kinds = {name: value.dtype for name, value in half.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".wo." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".wo." not in name} == {torch.float16}
    ids = torch.tensor([[3, 4, 1, 0, 0, 0]])
    (ours,), (exact,) = half(ids), encoder(ids)
    own = folders.t5().half()
    for name in encoder.exact:
        module = own.get_submodule(name.removeprefix("encoder."))
        module.float()
    wanted = own(ids).last_hidden_state.float()
    assert torch.allclose(ours, wanted, atol=2e-3)
    assert torch.allclose(ours, exact, atol=2e-2)


@pytest.mark.parametrize("make", [lambda times: times, lambda times: times * 1000, lambda times: times * 30000])
def test_sinusoids_are_diffusers_own_to_the_bit(make: Callable[[Any], Any]) -> None:
    times = make(torch.linspace(0, 1, 57))
    assert torch.equal(Sinusoids()(times), Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(times))


@pytest.mark.parametrize(("component", "name"), [("text_encoder", "num_hidden_layers"), ("text_encoder_2", "num_layers")])
def test_layers_without_end_are_refused(component: str, name: str, flux: Path) -> None:
    edit(flux / component / "config.json", **{name: 2**31})
    with pytest.raises(ModelError, match=rf"does not describe a \w+: {name} is 2147483648"):
        capture_folder(flux, None, None, ONE, digest=False)


def test_a_side_beyond_any_picture_is_refused(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.sd3(), decoder=False)
    edit(folder / "transformer" / "config.json", sample_size=2**40, pos_embed_max_size=12)
    with pytest.raises((ModelError, BudgetError)):
        capture_folder(folder, None, None, ONE, digest=False)
