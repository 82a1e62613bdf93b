import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from backbones import Backbone, changed  # noqa: E402

from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.layers import randomize  # noqa: E402
from elastic_export.families.uvit import FAMILY, PRESETS, UVit, UVitParams, flops, sources  # noqa: E402
from elastic_runtime import Budget, Bundle, ModelError, open_session  # noqa: E402
from elastic_runtime.contract.schedule import ScaledLinearBeta, VpSde  # noqa: E402

SMALL = UVitParams(img_size=8, patch_size=2, in_chans=4, embed_dim=16, depth=4, num_heads=2, num_classes=4)


def forward(module: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        result: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
    return result


@pytest.mark.parametrize("name", ["uvit-a", "uvit-b"])
def test_recorded_outputs_in_torch(backbone: Callable[[str], Backbone], name: str) -> None:
    recorded = backbone(name)
    model = load(Request("uvit", recorded.checkpoint, recorded.config))
    assert not model.ignored
    assert recorded.error(forward(model.module, recorded.feeds)) <= 5e-6


@pytest.mark.parametrize(("name", "opset"), [("uvit-a", 23), ("uvit-b", 20)])
def test_recorded_outputs_through_onnx_runtime(
    backbone: Callable[[str], Backbone], backbone_bundle: Callable[[str, int], Bundle], name: str, opset: int
) -> None:
    recorded, bundle = backbone(name), backbone_bundle(name, opset)
    assert (bundle.manifest.axes, len(bundle.manifest.cost)) == ((), 1)
    with open_session(bundle) as session:
        assert recorded.error(session.run(recorded.feeds)["prediction"]) <= 5e-6
        single = {name: array[:1] for name, array in recorded.feeds.items()}
        assert np.abs(session.run(single)["prediction"] - recorded.output[:1]).max() <= 2e-5


@pytest.mark.parametrize("changes", [{}, {"conv": False, "num_classes": -1}, {"mlp_time_embed": True, "qkv_bias": True}, {"skip": False}])
def test_flops_are_what_torch_multiplies(changes: dict[str, Any]) -> None:
    """The public code decodes the tokens before the patches, too, and drops what comes of them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    params = replace(SMALL, **changes)
    arrays = FAMILY.feeds(params, Budget(), 1)
    # its counter knows the plain kernel's two products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        UVit(params)(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    assert flops(params) - 2 * params.extras * 16 * 16 == counter.get_total_flops()
    assert FAMILY.cost(params, Budget(), 1).flops == flops(params)


@pytest.mark.parametrize(("name", "millions"), [("uvit-l-256", 287), ("uvit-h-256", 501), ("uvit-l-512", 287), ("uvit-h-512", 501)])
def test_presets_have_the_published_parameters(name: str, millions: int) -> None:
    """U-ViT's table 8."""
    params = PRESETS[name]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in UVit(params).parameters())
    assert round(count / 1e6) == millions
    assert (params.patches, params.classes, params.extras) == (256, 1000, 2)


def test_a_stretch_of_blocks_can_be_taken_out() -> None:
    module = UVit(SMALL)
    randomize(module, seed=0)
    x = torch.randn(2, SMALL.tokens, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = module.run(x, range(5), [])
        skips: list[Any] = []
        head = module.run(x, range(1), skips)
        core = module.run(head, range(1, 4), skips)
        assert len(skips) == 1, "what the head left waits for the tail"
        assert torch.equal(module.run(core, range(4, 5), skips), whole)


def test_each_schedule_is_that_of_its_training() -> None:
    facts = {name: FAMILY.facts(params)["schedule"] for name, params in PRESETS.items()}
    assert facts["uvit-h-256"] == facts["uvit-h-512"] == ScaledLinearBeta()
    assert facts["uvit-l-256"] == facts["uvit-l-512"] == VpSde()
    assert FAMILY.feeds(SMALL, Budget(), 3)["timestep"].max() > 500
    description = FAMILY.facts(SMALL)
    assert (description["prediction"], description["num_classes"], description["null_label"]) == ("epsilon", 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "img_size 8 is not a multiple of patch_size 3"),
        ({"num_heads": 3}, "embed_dim 16 must be a multiple of num_heads 3"),
        ({"depth": 5}, "depth 5 must be even"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_classes": 1}, "num_classes 1 must be 2 or more, the last for no label, or -1"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"conv": "yes"}, "conv must be true or false, got 'yes'"),
        ({"schedule": "cosine"}, "schedule must be discrete or vpsde, got 'cosine'"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def weights(params: UVitParams = SMALL) -> dict[str, Any]:
    with torch.device("meta"):
        return dict(UVit(params).state_dict())


@pytest.mark.parametrize(
    "params", [SMALL, replace(SMALL, num_classes=-1, conv=False, qkv_bias=True, mlp_time_embed=True, skip=False, mlp_ratio=2.0)]
)
def test_shapes_tell_all_but_the_heads_and_the_schedule(params: UVitParams) -> None:
    origins = sources(weights(params), {})
    assert agree(FAMILY, origins | {"config": {"num_heads": 2}}, {}) == params
    with pytest.raises(ModelError, match="nothing tells num_heads; give --config"):
        agree(FAMILY, origins, {})
    with pytest.raises(ModelError, match=r"depth is 4 by the checkpoint's shapes but 6 by config"):
        agree(FAMILY, origins | {"config": {"depth": 6}}, {})
    near = params.mlp_ratio + 0.4 / params.embed_dim  # of one and of two widths it makes as many hidden values
    assert agree(FAMILY, origins | {"config": {"num_heads": 2, "mlp_ratio": near}}, {}) == params
    for ratio in (params.mlp_ratio + 1, float("nan"), "wide"):
        with pytest.raises(ModelError, match="mlp_ratio is .* by"):
            agree(FAMILY, origins | {"config": {"num_heads": 2, "mlp_ratio": ratio}}, {})


def test_the_published_size_tells_what_shapes_do_not() -> None:
    for preset in PRESETS.values():
        shapes = {name: value for name, value in asdict(preset).items() if name not in ("num_heads", "schedule")}
        assert agree(FAMILY, {"shapes": shapes}, {}) == preset
    pixels = {name: value for name, value in asdict(replace(SMALL, in_chans=3)).items() if name != "schedule"}
    assert agree(FAMILY, {"shapes": pixels}, {}).schedule == "vpsde"
    assert agree(FAMILY, {"shapes": pixels | {"schedule": "discrete"}}, {}).schedule == "discrete"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": None}, "this is not a U-ViT checkpoint: it lacks pos_embed"),
        ({"pos_embed": (7,)}, r"its pos_embed has shape (7,), not 3 dimensions"),
        ({"pos_embed": (1, 17, 16)}, "leaves 15 patches, which make no square"),
        ({"context_embed.weight": (16, 768)}, "draws from texts"),
        ({"input_token_editor.adapters.0.pos_embed": (4, 16)}, "has an elastic interface"),
    ],
)
def test_other_checkpoints_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        sources(changed(weights(), changes), {})
