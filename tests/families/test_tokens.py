"""FLUX and SD3 as graphs take tokens and positions, against diffusers' own forward passes."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")

import folders
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic_export.families import flux, sd3
from elastic_export.families.flux import Flux
from elastic_export.families.layers import Constants, Sinusoids
from elastic_export.families.sd3 import Positions, Sd3
from elastic_export.families.tokens import Rope
from elastic_export.foreign.folder import Folder
from elastic_runtime import ModelError


def places(count: int, side: int) -> Tensor:
    """Rows and columns with halves among them."""
    return torch.randint(0, 2 * side - 1, (count, 2), generator=torch.Generator().manual_seed(0)) / 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) as tokens of 2 x 2 latent pixels, (c, ph, pw)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_flux_predicts_what_diffusers_does(guided: bool, tmp_path: Path) -> None:
    own = folders.flux(guidance_embeds=guided)
    folders.write(tmp_path / "f", own, decoder=False, max_shard_size="50KB")
    assert len(Folder.open(tmp_path / "f").component("transformer").weight_files()) > 1
    ours = Flux(Folder.open(tmp_path / "f").component("transformer").load(FluxTransformer2DModel))
    feeds: dict[str, Any] = {
        "hidden_states": normal(2, 19, 16), "encoder_hidden_states": normal(2, 5, folders.WIDTH),
        "pooled_projections": normal(2, folders.POOLED), "timestep": torch.tensor([0.9371, 0.2]),
        "img_ids": torch.nn.functional.pad(places(19, 64), (1, 0)), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    feeds |= {"guidance": torch.tensor([3.5, 1.0])} if guided else {}
    assert (ours(**feeds) - own(**feeds, return_dict=False)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, folders.SD35], ids=["sd3", "sd3.5"])
def test_sd3_predicts_what_diffusers_does(changes: dict[str, Any], tmp_path: Path) -> None:
    own = folders.sd3(**changes)
    folders.write(tmp_path / "f", own, decoder=False)
    latents, text, pooled, sigma = (
        normal(2, 4, 12, 20),
        normal(2, 5, folders.WIDTH),
        normal(2, 2 * folders.POOLED),
        torch.tensor([0.9, 0.2]),
    )
    wanted = own(latents, text, pooled, sigma * 1000, return_dict=False)[0]
    ours = Sd3(Folder.open(tmp_path / "f").component("transformer").load(SD3Transformer2DModel))
    rows, columns = torch.meshgrid(torch.arange(6) + 3.0, torch.arange(10) + 1.0, indexing="ij")  # centred among 12 x 12 places
    got = ours(packed(latents), text, pooled, sigma, torch.stack([rows, columns], dim=-1).flatten(0, 1))
    assert (got - packed(wanted)).abs().max() < 1e-5


def test_places_between_those_of_the_table_are_the_finer_tables_places() -> None:
    finer = get_2d_sincos_pos_embed(32, 24, base_size=8)
    rows, columns = torch.meshgrid(torch.arange(24) / 2, torch.arange(24) / 2, indexing="ij")
    got = Positions(32, 8 / 12)(torch.stack([rows, columns], dim=-1).flatten(0, 1))
    assert (got - finer).abs().max() < 1e-6


def test_a_table_that_is_not_analytic_is_refused() -> None:
    model = folders.sd3()
    model.pos_embed.pos_embed[0, 3] += 0.1
    with pytest.raises(ModelError, match=r"not the analytic sin-cos table .off by 1.0e-01."):
        Sd3(model)


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux().half(), decoder=False, variant="fp16")
    loaded = Folder.open(tmp_path / "f").component("transformer").load(FluxTransformer2DModel)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_half_precision_weights_keep_time_and_angles_exact() -> None:
    """In half precision, a timestep of 937 and a position of 100.5 would be off by enough to see."""
    whole, half = Flux(folders.flux(guidance_embeds=False)), Flux(folders.flux(guidance_embeds=False)).half()
    ids = torch.tensor([[0, 100.5, 63.5]])
    assert torch.equal(whole.rope(ids)[0], half.rope(ids)[0])
    seen = []
    half.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    half(normal(1, 1, 16), normal(1, 1, 16), normal(1, 8), torch.tensor([0.93712]), ids, torch.zeros(1, 3))
    assert seen[0].item() == pytest.approx(937.12, abs=1e-4)


FLUX_DEV = {
    "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True,
    "in_channels": 64, "out_channels": None, "pooled_projection_dim": 768, "joint_attention_dim": 4096,
}  # fmt: skip


def test_the_flops_of_flux_1_dev_at_1024_px() -> None:
    assert flux.FAMILY.flops(FLUX_DEV, 4096, 512) / 1e12 == pytest.approx(74.38, rel=1e-4)


@pytest.mark.parametrize("kind", ["flux", "schnell", "sd3", "sd3.5"])
def test_the_count_of_flops_is_torch_s_own(kind: str) -> None:
    image, text = 16, 7
    if kind in ("flux", "schnell"):
        config = FLUX_DEV | {
            "attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 3, "in_channels": 16,
            "pooled_projection_dim": 24, "joint_attention_dim": 40, "guidance_embeds": kind == "flux",
        }  # fmt: skip
        model = FluxTransformer2DModel(**config, axes_dims_rope=(8, 12, 12))
        ids = {"img_ids": torch.zeros(image, 3), "txt_ids": torch.zeros(text, 3)}
        ids |= {"guidance": torch.ones(1)} if kind == "flux" else {}
        hidden, wanted = torch.zeros(1, image, 16), flux.FAMILY.flops(config, image, text)
    else:
        config = {
            "attention_head_dim": 8, "num_attention_heads": 4, "num_layers": 3, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "pooled_projection_dim": 24, "joint_attention_dim": 40, "caption_projection_dim": 32,
            "dual_attention_layers": (0, 1) if kind == "sd3.5" else (),
        }  # fmt: skip
        model = SD3Transformer2DModel(**config, sample_size=8, pos_embed_max_size=8)
        ids, hidden, wanted = {}, torch.zeros(1, 4, 8, 8), sd3.FAMILY.flops(config, image, text)
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            hidden_states=hidden, encoder_hidden_states=torch.zeros(1, text, 40), pooled_projections=torch.zeros(1, 24),
            timestep=torch.ones(1), **ids,
        )  # fmt: skip
    assert wanted == counter.get_total_flops()


def test_constants_follow_to_a_device_and_never_to_another_precision() -> None:
    for module in (Rope((4, 6, 6), 10000.0), Positions(32, 0.5), Sinusoids()):
        assert isinstance(module, Constants)
        for narrow in (module.half(), module.double()):
            values = narrow.frequencies if isinstance(narrow.frequencies, list) else [narrow.frequencies]
            assert {value.dtype for value in values} == {torch.float32}
        moved = module.to("meta").frequencies
        assert all(value.is_meta for value in (moved if isinstance(moved, list) else [moved]))
