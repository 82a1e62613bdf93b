import msgspec
import pytest
from fake_flux import manifest

pytest.importorskip("torch", reason="the families need torch")

from elastic_export.families.family import priced
from elastic_export.families.flux import FAMILY as FLUX_FAMILY
from elastic_runtime import Axis, Budget, Caching, Plan
from elastic_runtime.choosing.cost import plan_flops
from elastic_runtime.ralu.plan import PRESETS

FLUX = {
    "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True,
    "in_channels": 64, "out_channels": None, "pooled_projection_dim": 768, "joint_attention_dim": 4096,
}  # fmt: skip


# As a bundle of FLUX.1-dev at 1024 px has them: three rows of a count that is exactly quadratic.
AXIS = Axis(name="tokens", min=1024, max=4096, step=1, default=4096, input="hidden_states", carrier="shape", dimension="S")
COST = tuple(priced(Budget(tokens=count), FLUX_FAMILY.flops(FLUX, count, 512), 1, 1) for count in (1024, 2560, 4096))
MANIFEST = msgspec.structs.replace(manifest(), axes=(AXIS,), cost=COST)


def test_the_figures_of_flux_1_dev_at_1024_px() -> None:
    assert FLUX_FAMILY.flops(FLUX, 4096, 512) / 1e12 == pytest.approx(74.38, rel=1e-4)
    figures = {50: 3719, 18: 844 * 1.59, 10: 493 * 1.51}
    for steps, wanted in figures.items():
        assert plan_flops(MANIFEST, Plan.full(steps), (64, 64)) / 1e12 == pytest.approx(wanted, rel=0.01)
    for name, wanted in {"4x": 844, "7x": 493}.items():
        assert plan_flops(MANIFEST, PRESETS[name], (64, 64)) / 1e12 == pytest.approx(wanted, rel=0.001)


def test_skipped_steps_cost_nothing() -> None:
    plan = PRESETS["4x"]
    skip = Caching.every(plan, 2).skip
    whole, cached = (plan_flops(MANIFEST, plan, (64, 64), skipped) for skipped in (frozenset[int](), skip))
    tokens = plan.step_tokens(64, 64)
    assert whole - cached == sum(FLUX_FAMILY.flops(FLUX, tokens[step], 512) for step in skip)
