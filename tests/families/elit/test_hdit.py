"""ELIT-HDiT: which latents become one token, what it costs, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from elastic_export.families.elit import interface  # noqa: E402
from elastic_export.families.elit.backbone import rename_key  # noqa: E402
from elastic_export.families.elit.hdit import FAMILY, ElitHdit, ElitHditParams, Merge, Split, activation_values, block_sources, flops  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_runtime import ModelError  # noqa: E402

SMALL = ElitHditParams(
    input_size=8, patch_size=2, in_channels=2, hidden_size=16, depth=6, num_heads=2,
    num_classes=3, group_size=2, head_blocks=1, tail_blocks=1, merge_block=2, split_block=4,
)  # fmt: skip
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
# GFLOPs of XL at batch 1: without an interface, then by the share of latents.
TABLE = {256: (236.97, 86.9, 97.3, 118.1, 160.1, 202.5, 245.2), 512: (1009.37, 375.2, 417.1, 502.2, 676.6, 856.7, 1042.6)}
# The paper's TFLOPs of a training iteration: without an interface, with it at the full budget, and over all budgets.
PUBLISHED = {256: (182, 188, 191), 512: (776, 801, 791)}


def test_latents_of_one_place_in_neighbouring_groups_become_a_token() -> None:
    """Each latent holds its group; on a grid of 2 x 4 groups the quarters of the left block are the groups 0, 1, 4 and 5."""
    merge = Merge(1, 2, 4)
    merge.proj = torch.nn.Identity()
    z = torch.arange(8.0).repeat_interleave(3).reshape(1, 24, 1) + torch.tensor([0.0, 0.1, 0.2]).repeat(8).reshape(1, 24, 1)
    merged = merge(z)
    assert merged.shape == (1, 6, 4)
    assert merged[0, 0].tolist() == [0, 1, 4, 5]
    assert merged[0, 1].tolist() == pytest.approx([0.1, 1.1, 4.1, 5.1])
    assert merged[0, 3].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("kept", [1, 3])
def test_a_split_undoes_a_merge(kept: int) -> None:
    merge, split = Merge(4, 4, 2), Split(4, 4, 2)
    merge.proj = split.proj = torch.nn.Identity()
    z = torch.randn(2, 8 * kept, 4)
    with torch.no_grad():
        assert torch.equal(split(merge(z), torch.zeros_like(z)), z / 2), "fac is 0.5"
        split.fac.fill_(1)
        assert torch.equal(split(merge(z), torch.zeros_like(z)), z)
        split.fac.fill_(0)
        assert torch.equal(split(merge(z), z + 1), z + 1), "the latents before the merge"


def test_the_order_of_groups_is_no_weight_and_no_half() -> None:
    with torch.device("meta"):
        module = ElitHdit(SMALL)
    assert not [name for name in module.state_dict() if "order" in name]
    merge = module.half().merge
    assert (merge.order.dtype, merge.order.tolist()) == (torch.int64, [0, 1, 2, 3])


def test_inner_blocks_are_twice_as_wide_and_keep_the_condition() -> None:
    module = ElitHdit(SMALL)
    assert [block.attn.qkv.in_features for block in module.blocks] == [16, 16, 32, 32, 16, 16]
    assert [block.attn.heads for block in module.blocks] == [2, 2, 4, 4, 2, 2]
    assert {block.modulation.linear.in_features for block in module.blocks} == {16}


@pytest.mark.parametrize("pixels", [256, 512])
def test_flops_are_those_of_the_table(pixels: int) -> None:
    params = FAMILY.presets[f"elit-hdit-xl-{pixels}"]
    counts = [flops(params, params.tokens) - interface.flops(params.interface), *(flops(params, int(s * params.tokens)) for s in SHARES)]
    assert [value / 1e9 for value in counts] == pytest.approx(TABLE[pixels], rel=1e-3)


@pytest.mark.parametrize("pixels", [256, 512])
def test_training_costs_what_the_paper_says(pixels: int) -> None:
    """Three forward passes of a batch of 256, or 384 over all budgets, on sixteen channels."""
    params = replace(FAMILY.presets[f"elit-hdit-xl-{pixels}"], in_channels=16)
    levels = [flops(params, latents) for latents in range(params.groups, params.tokens + 1, params.groups)]
    plain = levels[-1] - interface.flops(params.interface)
    costs = (3 * 256 * plain, 3 * 256 * levels[-1], 3 * 384 * sum(levels) / len(levels))
    assert [value / 1e12 for value in costs] == pytest.approx(PUBLISHED[pixels], rel=2e-3)


def test_presets_merge_in_the_middle_of_the_core() -> None:
    for name, params in FAMILY.presets.items():
        assert params.merge_block - params.core.start == params.core.stop - params.split_block == params.head_blocks, name
        assert params.groups == 16
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ElitHdit(FAMILY.presets["elit-hdit-xl-256"]).parameters())
    assert count == pytest.approx(1.390e9, rel=5e-3), "1.4B in the paper"


def test_activations_of_inner_blocks_are_counted() -> None:
    for params in (SMALL, replace(SMALL, merge_block=1, split_block=5), replace(SMALL, head_blocks=0, tail_blocks=0)):
        few, many = activation_values(params, 4), activation_values(params, 16)
        assert 0 < few <= many
        assert many >= 2 * params.tokens * params.hidden_size + 16 * params.hidden_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_block": 0}, "merge_block 0 and split_block 4 must lie in the core, in this order: its blocks are 1 to 4"),
        ({"merge_block": 4}, "merge_block 4 and split_block 4 must lie in the core"),
        ({"split_block": 6}, "merge_block 2 and split_block 6 must lie in the core.*split_block may be 5"),
        ({"input_size": 12}, "a grid of 3x3 groups cannot be merged two by two: choose a group_size that leaves even sides"),
        ({"group_size": 4}, "a grid of 1x1 groups cannot be merged"),
    ],
)
def test_a_merge_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_public_names_become_ours() -> None:
    assert rename_key("merges.0.proj.weight") == "merge.proj.weight"
    assert rename_key("splits.0.fac") == "split.fac"


@pytest.mark.parametrize(("name", "merge", "split"), [("hdit-a", 2, 6), ("hdit-b", 1, 4)])
def test_shapes_tell_where_merge_and_split_stand(golden: Path, name: str, merge: int, split: int) -> None:
    checkpoint = read_checkpoint(golden / f"elit-{name}.pt")
    sources = block_sources(checkpoint.weights, checkpoint.args)
    params = agree(FAMILY, sources | {"config": {"num_heads": 2, "tail_blocks": 1}}, {})
    assert (params.merge_block, params.split_block) == (merge, split)
    with pytest.raises(ModelError, match=f"merge_block is {merge} by the checkpoint's shapes but 3 by config"):
        agree(FAMILY, sources | {"config": {"num_heads": 2, "tail_blocks": 1, "merge_block": 3}}, {})


def test_inner_blocks_that_are_not_in_a_row_are_refused(golden: Path) -> None:
    weights = dict(read_checkpoint(golden / "elit-hdit-a.pt").weights)
    bias = "blocks.3.attn.proj.bias"
    with pytest.raises(ModelError, match="should be 64 wide, twice hidden_size; so wide are 2, 4, 5"):
        block_sources(weights | {bias: torch.zeros(32)}, {})
    with pytest.raises(ModelError, match="so wide are none"):
        block_sources({name: value for name, value in weights.items() if "attn.proj" not in name}, {})
