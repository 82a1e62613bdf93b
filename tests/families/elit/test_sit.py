import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.elit.backbone import ElitParams, rename_key  # noqa: E402
from elastic_export.families.elit.sit import FAMILY, Elit  # noqa: E402
from elastic_export.families.elit.sit import flops as elit_flops  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.layers import randomize  # noqa: E402
from elastic_runtime import Budget, ModelError  # noqa: E402

SMALL = ElitParams(
    input_size=8, patch_size=2, in_channels=2, hidden_size=16, depth=4, num_heads=2,
    num_classes=3, group_size=2, head_blocks=1, tail_blocks=1,
)  # fmt: skip


def test_another_split_is_another_function(golden: Path, recorded: Any, feeds: Any, forward: Any) -> None:
    request = Request("elit-sit", golden / "elit-a.pt", golden / "elit-a.json", overrides={"head_blocks": 1})
    model = load(request)
    assert model.params.head_blocks == 1
    assert np.abs(forward(model.module, feeds("a", 2)) - recorded("a")["out_latents_8"]).max() > 1e-3


# The published figures (arXiv 2603.12245), GFLOPs at batch 1: budget -> head, core, tail 8-16-4 and 4-20-4 of XL.
SPLITS = {8: "8-16-4", 4: "4-20-4"}
TABLE = {
    (256, 8): (118.3, 126.5, 143.1, 176.6, 210.7, 245.4),
    (256, 4): (86.5, 96.8, 117.5, 159.4, 202.0, 245.4),
    (512, 8): (516.0, 549.6, 618.4, 763.4, 918.0, 1082.3),
    (512, 4): (374.5, 416.4, 502.5, 683.6, 876.9, 1082.3),
}
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
FIGURES = [(size, head, share, gflops) for (size, head), row in TABLE.items() for share, gflops in zip(SHARES, row, strict=True)]


@pytest.mark.parametrize(("size", "head", "share", "gflops"), FIGURES)
def test_flops_are_the_published_ones(size: int, head: int, share: float, gflops: float) -> None:
    params = replace(FAMILY.presets[f"elit-sit-xl-{size}"], head_blocks=head)
    # The table is rounded to 0.05 GFLOPs.
    assert elit_flops(params, round(share * params.tokens)) / 1e9 == pytest.approx(gflops, rel=1e-3, abs=0.051)


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
@pytest.mark.parametrize("pixels", [256, 512])
def test_presets_are_their_sit_and_a_little_more(size: str, millions: float, pixels: int) -> None:
    """Plain SiT has 33, 130, 458 and 675 M parameters; Read and Write add about 20 D^2 and the 4096 latent positions."""
    params = FAMILY.presets[f"elit-sit-{size}-{pixels}"]
    with torch.device("meta"):
        module = Elit(params)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert 1.0 < count / (millions * 1e6) < 1.25
    assert (params.tokens, params.groups, params.group_latents) == {256: (256, 16, 16), 512: (1024, 16, 64)}[pixels]
    assert (params.head_blocks, params.tail_blocks) == (8, 4 if size in ("xl", "l") else 2)


def test_a_new_model_predicts_nothing_and_a_randomized_one_something_that_repeats(forward: Any) -> None:
    arrays = FAMILY.feeds(SMALL, Budget(latents=8), 2)
    module = Elit(SMALL)
    other = copy.deepcopy(module)
    assert not forward(module, arrays).any(), "the final layer starts at zero"
    randomize(module, seed=3)
    first = forward(module, arrays)
    assert first.any()
    assert np.isfinite(first).all()
    randomize(other, seed=3)
    np.testing.assert_array_equal(forward(other, arrays), first)
    assert all(parameter.std() > 0 for parameter in module.parameters() if parameter.numel() > 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "input_size 8 is not a multiple of patch_size 3"),
        ({"group_size": 3}, "4x4 tokens does not divide into groups of 3x3"),
        ({"num_heads": 3}, "hidden_size 16 must be a multiple of num_heads 3"),
        ({"head_blocks": 3}, "head_blocks 3 \\+ tail_blocks 1 must leave a core in depth 4"),
        ({"head_blocks": -1}, "must leave a core"),
        ({"latent_positions": 8}, "latent_positions 8 is fewer than the 16 tokens"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_public_names_become_ours() -> None:
    assert rename_key("projectors.0.0.weight") is None
    assert rename_key("blocks.3.adaLN_modulation.1.bias") == "blocks.3.modulation.linear.bias"
    assert rename_key("input_token_editor.adapters.0.learned_query_embed") == "read.learned_query_embed"
    assert rename_key("input_token_editor.adapters.0.fit_layer.latents_attend_to_patches.0.q_norm.scale") == "read.attention.q_norm.scale"
    assert rename_key("output_token_editor.adapters.0.write_ff.0.fc1.weight") == "write.mlp.fc1.weight"


def weights() -> dict[str, Any]:
    with torch.device("meta"):
        return dict(Elit(SMALL).state_dict())


def test_shapes_and_args_tell_the_sizes() -> None:
    sources = FAMILY.sources(weights(), {"encoder_depth": 1, "elit_group_size": 2, "num_classes": 3, "qk_norm": False, "model": "custom"})
    config = {"num_heads": 2, "tail_blocks": 1}
    assert agree(FAMILY, sources | {"config": config}, {}) == replace(SMALL)


@pytest.mark.parametrize(
    ("args", "config", "message"),
    [
        (
            {"encoder_depth": 2},
            {"head_blocks": 1},
            "head_blocks is 2 by the checkpoint's args but 1 by config.*Override with --head-blocks",
        ),
        ({"elit_group_size": 4}, {}, "group_size is 2 by the checkpoint's shapes but 4 by the checkpoint's args"),
        ({"num_classes": 1000}, {}, "num_classes is 3 by the checkpoint's shapes but 1000 by the checkpoint's args"),
        ({"model": "ELIT-SiT-XL/2"}, {}, "hidden_size is 16 by .*shapes but 1152 by .*args|depth is 4 by .*shapes but 28 by .*args"),
        ({}, {"hidden_size": 32}, "hidden_size is 16 by the checkpoint's shapes but 32 by config"),
        ({}, {"colour": 3}, "config has an unknown field 'colour'; elit-sit has input_size"),
        ({}, {}, "nothing tells num_heads, head_blocks, tail_blocks; give --config"),
        ({"qk_norm": True}, {}, "trained with qk_norm=True"),
        ({"prediction": "x"}, {}, "prediction='x'; only prediction='v' is supported"),
        ({"path_type": "cosine"}, {}, "path_type='cosine'"),
        ({}, {"num_heads": "2", "head_blocks": 1, "tail_blocks": 1}, "num_heads must be a whole number, got '2'"),
        ({}, {"num_heads": 2.5, "head_blocks": 1, "tail_blocks": 1}, "num_heads must be a whole number, got 2.5"),
        ({}, {"num_heads": True, "head_blocks": 1, "tail_blocks": 1}, "num_heads must be"),
        ({}, {"num_heads": None, "head_blocks": 1, "tail_blocks": 1}, "num_heads must be"),
        ({}, {"hidden_size": "16"}, "hidden_size is 16 by the checkpoint's shapes but '16' by config"),
    ],
)
def test_sources_that_disagree_are_named_with_both_values(args: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        agree(FAMILY, FAMILY.sources(weights(), args) | {"config": config}, {})


def test_an_override_ends_the_disagreement() -> None:
    sources = FAMILY.sources(weights(), {"encoder_depth": 2})
    config = {"head_blocks": 1, "num_heads": 2, "tail_blocks": 1}
    assert agree(FAMILY, sources | {"config": config}, {"head_blocks": 0}).head_blocks == 0


def test_the_published_size_tells_what_shapes_do_not() -> None:
    preset = FAMILY.presets["elit-sit-s-256"]
    shapes = {name: value for name, value in asdict(preset).items() if name not in ("num_heads", "head_blocks", "tail_blocks")}
    assert agree(FAMILY, {"shapes": shapes}, {}) == preset
    assert agree(FAMILY, {"shapes": shapes, "args": {"head_blocks": 4}}, {}).head_blocks == 4


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "pos_embed", "read.pos_embed", "y_embedder.embedding_table.weight"])
@pytest.mark.parametrize("shape", [(), (7,)])
def test_a_weight_of_an_impossible_rank_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        agree(FAMILY, FAMILY.sources(weights() | {name: torch.zeros(shape)}, {}), {})


def test_feeds_are_the_same_at_every_budget_but_for_the_axis() -> None:
    one, two = (FAMILY.feeds(SMALL, Budget(latents=latents), 2) for latents in (4, 16))
    assert one.keys() == two.keys() == {spec.name for spec in FAMILY.inputs(SMALL)}
    for name in one.keys() - {"latent_ids"}:
        np.testing.assert_array_equal(one[name], two[name])
    assert (len(one["latent_ids"]), len(two["latent_ids"])) == (1, 4)
    assert one["class_labels"][-1] == SMALL.num_classes, "the null label is proven too"
