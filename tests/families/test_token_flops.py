import pytest

from elastic_runtime import Caching, Plan, UsageError
from elastic_runtime.ralu.cost import flux_flops, plan_flops, sd3_flops
from elastic_runtime.ralu.plan import PRESETS

FLUX = {
    "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True,
    "in_channels": 64, "out_channels": None, "pooled_projection_dim": 768, "joint_attention_dim": 4096,
}  # fmt: skip


def test_the_figures_of_flux_1_dev_at_1024_px() -> None:
    assert flux_flops(FLUX, 4096, 512) / 1e12 == pytest.approx(74.38, rel=1e-4)
    figures = {50: 3719, 18: 844 * 1.59, 10: 493 * 1.51}
    for steps, wanted in figures.items():
        assert plan_flops("flux", FLUX, Plan.full(steps), 64, 64, 512) / 1e12 == pytest.approx(wanted, rel=0.01)
    for name, wanted in {"4x": 844, "7x": 493}.items():
        assert plan_flops("flux", FLUX, PRESETS[name], 64, 64, 512) / 1e12 == pytest.approx(wanted, rel=0.001)


def test_skipped_steps_cost_nothing() -> None:
    plan = PRESETS["4x"]
    skip = Caching.every(plan, 2).skip
    whole, cached = (plan_flops("flux", FLUX, plan, 64, 64, 512, skipped) for skipped in (frozenset[int](), skip))
    tokens = plan.step_tokens(64, 64)
    assert whole - cached == sum(flux_flops(FLUX, tokens[step], 512) for step in skip)


@pytest.mark.parametrize("kind", ["flux", "schnell", "sd3", "sd3.5"])
def test_the_count_is_torch_s_own(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="counts with torch")
    diffusers = pytest.importorskip("diffusers", reason="counts diffusers' models")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    image, text = 16, 7
    if kind in ("flux", "schnell"):
        config = FLUX | {
            "attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 3, "in_channels": 16,
            "pooled_projection_dim": 24, "joint_attention_dim": 40, "guidance_embeds": kind == "flux",
        }  # fmt: skip
        model = diffusers.FluxTransformer2DModel(**config, axes_dims_rope=(8, 12, 12))
        ids = {"img_ids": torch.zeros(image, 3), "txt_ids": torch.zeros(text, 3)}
        ids |= {"guidance": torch.ones(1)} if kind == "flux" else {}
        hidden, wanted = torch.zeros(1, image, 16), flux_flops(config, image, text)
    else:
        config = {
            "attention_head_dim": 8, "num_attention_heads": 4, "num_layers": 3, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "pooled_projection_dim": 24, "joint_attention_dim": 40, "caption_projection_dim": 32,
            "dual_attention_layers": (0, 1) if kind == "sd3.5" else (),
        }  # fmt: skip
        model = diffusers.SD3Transformer2DModel(**config, sample_size=8, pos_embed_max_size=8)
        ids, hidden, wanted = {}, torch.zeros(1, 4, 8, 8), sd3_flops(config, image, text)
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            hidden_states=hidden, encoder_hidden_states=torch.zeros(1, text, 40), pooled_projections=torch.zeros(1, 24),
            timestep=torch.ones(1), **ids,
        )  # fmt: skip
    assert wanted == counter.get_total_flops()


def test_a_family_without_plans_is_refused() -> None:
    with pytest.raises(UsageError, match="no count of FLOPs for 'elt'; there are flux, sd3"):
        plan_flops("elt", {}, PRESETS["4x"], 8, 8, 1)
