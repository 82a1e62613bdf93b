"""ELIT-U-ViT: which blocks join which, what it costs, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.elit import interface, sit  # noqa: E402
from elastic_export.families.elit.backbone import ElitParams, rename_key  # noqa: E402
from elastic_export.families.elit.uvit import FAMILY, ElitUvit, ElitUvitParams, activation_values, flops  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_runtime import Budget, ModelError  # noqa: E402

SMALL = ElitUvitParams(
    input_size=8, patch_size=2, in_channels=2, hidden_size=16, depth=7, num_heads=2,
    num_classes=3, group_size=2, head_blocks=1, tail_blocks=1,
)  # fmt: skip
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
# GFLOPs of XL at batch 1: without an interface, then by the share of latents.
TABLE = {256: (254.90, 92.7, 103.8, 126.0, 170.9, 216.6, 263.1), 512: (1119.70, 399.3, 444.2, 536.4, 729.9, 935.4, 1152.9)}
# The paper's TFLOPs of a training iteration: without an interface, with it at the full budget, and over all budgets.
PUBLISHED = {256: (196, 202, 204), 512: (861, 886, 858)}


@pytest.mark.parametrize(("depth", "pairs"), [(28, 13), (8, 3), (7, 3), (3, 1)])
def test_a_block_sends_to_its_mirror_and_the_middle_has_none(depth: int, pairs: int) -> None:
    params = replace(SMALL, depth=depth)
    mirrors = [(i, depth - 1 - i) for i in range(depth) if i + 1 < depth - 1 - i]
    assert len(mirrors) == pairs
    assert [*params.senders] == [sender for sender, _ in mirrors]
    assert [*params.receivers] == sorted(receiver for _, receiver in mirrors)


@pytest.mark.parametrize("pixels", [256, 512])
def test_flops_are_those_of_the_table(pixels: int) -> None:
    params = FAMILY.presets[f"elit-uvit-xl-{pixels}"]
    counts = [flops(params, params.tokens) - interface.flops(params.interface), *(flops(params, int(s * params.tokens)) for s in SHARES)]
    assert [value / 1e9 for value in counts] == pytest.approx(TABLE[pixels], rel=1e-3)


@pytest.mark.parametrize("pixels", [256, 512])
def test_training_costs_what_the_paper_says(pixels: int) -> None:
    """Three forward passes of a batch of 256, or 384 over all budgets, on sixteen channels."""
    params = replace(FAMILY.presets[f"elit-uvit-xl-{pixels}"], in_channels=16)
    levels = [flops(params, latents) for latents in range(params.groups, params.tokens + 1, params.groups)]
    plain = levels[-1] - interface.flops(params.interface)
    costs = (3 * 256 * plain, 3 * 256 * levels[-1], 3 * 384 * sum(levels) / len(levels))
    assert [value / 1e12 for value in costs] == pytest.approx(PUBLISHED[pixels], rel=2e-3)


def test_presets_are_their_sits_and_the_skips() -> None:
    for name, params in FAMILY.presets.items():
        plain = sit.FAMILY.presets[name.replace("uvit", "sit")]
        split = {"head_blocks": params.head_blocks, "tail_blocks": params.tail_blocks}
        assert asdict(params) == asdict(replace(plain, **split))
    params = FAMILY.presets["elit-uvit-b-256"]
    with torch.device("meta"):
        one, two = ElitUvit(params), sit.Elit(ElitParams(**asdict(params)))
    more = sum(p.numel() for p in one.parameters()) - sum(p.numel() for p in two.parameters())
    assert more == len(params.senders) * (2 * params.hidden_size + 1) * params.hidden_size


def test_activations_that_wait_for_their_mirrors_are_counted() -> None:
    params = FAMILY.presets["elit-uvit-xl-256"]
    plain = ElitParams(**asdict(params))
    for latents in (16, 256):
        waiting = params.hidden_size * (4 * params.tokens + 9 * latents)
        assert sit.activation_values(plain, latents) < activation_values(params, latents) <= sit.activation_values(plain, latents) + waiting


def test_an_elit_sit_with_open_skips_computes_the_same(golden: Path, model: Any, forward: Any, tmp_path: Path) -> None:
    """As `weight = [I | 0]` and `bias = 0` make one of its checkpoint, for fine-tuning."""
    plain = model("c")
    weights = dict(read_checkpoint(golden / "elit-c.pt").weights)
    width = plain.params.hidden_size
    for receiver in ElitUvitParams(**asdict(plain.params)).receivers:
        weights[f"blocks.{receiver}.skip_linear.weight"] = torch.eye(width, 2 * width)
        weights[f"blocks.{receiver}.skip_linear.bias"] = torch.zeros(width)
    torch.save({"ema": weights}, tmp_path / "uvit.pt")
    config = {**asdict(plain.params), "family": "elit-uvit"}
    (tmp_path / "uvit.json").write_text(json.dumps(config))
    made = load(Request("elit-uvit", tmp_path / "uvit.pt", tmp_path / "uvit.json"))
    for kept in (1, 3, 16):
        arrays = FAMILY.feeds(plain.params, Budget(latents=kept * plain.params.groups), 2)
        np.testing.assert_allclose(forward(made.module, arrays), forward(plain.module, arrays), rtol=0, atol=2e-6)


def test_a_new_model_passes_its_skips_by() -> None:
    new = ElitUvit(SMALL)
    for skip in new.skips.values():
        assert torch.equal(skip.weight, torch.eye(16, 32))
        assert not skip.bias.any()


def test_skips_are_part_of_the_function(model: Any, feeds: Any, forward: Any) -> None:
    golden = model("uvit-a")
    with_skips = forward(golden.module, feeds("uvit-a", 3))
    plain = sit.Elit(ElitParams(**asdict(golden.params)))
    plain.load_state_dict({name: value for name, value in golden.module.state_dict().items() if not name.startswith("skips.")})
    assert np.abs(forward(plain, feeds("uvit-a", 3)) - with_skips).max() > 0.5


def test_public_names_become_ours() -> None:
    assert rename_key("blocks.5.skip_linear.weight") == "skips.5.weight"
    assert rename_key("skips.5.bias") == "skips.5.bias"


def test_unequal_head_and_tail_and_too_few_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="head_blocks 1 must equal tail_blocks 2: a skip joins tokens to tokens or latents to latents"):
        replace(SMALL, tail_blocks=2)
    with pytest.raises(ValueError, match="depth 2 leaves no skip: give 3 blocks or more, or take elit-sit"):
        replace(SMALL, depth=2, head_blocks=0, tail_blocks=0)
    # The public trainer's default, which its factories pair with four tail blocks.
    known = {"checkpoint's args": {"head_blocks": 8, "hidden_size": 1152, "depth": 28}}
    sizes = {"input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "group_size": 4}
    with pytest.raises(ModelError, match="elit-uvit: head_blocks 8 must equal tail_blocks 4"):
        agree(FAMILY, known | {"shapes": sizes}, {})


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("elit-sit", "uvit-a", r"has skips \(blocks.N.skip_linear\), so it is an elit-uvit, not an elit-sit: export it as elit-uvit"),
        ("elit-uvit", "a", r"has no skips \(blocks.N.skip_linear\), so it is an elit-sit, not an elit-uvit: export it as elit-sit"),
        ("elit-sit", "hdit-a", r"has merge and split \(merges, splits\), so it is an elit-hdit, not an elit-sit"),
        ("elit-hdit", "a", r"has no merge and split \(merges, splits\), so it is an elit-sit, not an elit-hdit: export it as elit-sit"),
        ("elit-hdit", "uvit-a", "so it is an elit-uvit, not an elit-hdit: export it as elit-uvit"),
        ("elit-uvit", "hdit-b", "so it is an elit-hdit, not an elit-uvit: export it as elit-hdit"),
    ],
)
def test_a_checkpoint_of_another_backbone_is_refused_by_name(golden: Path, family: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(Request(family, golden / f"elit-{name}.pt"))


def test_skips_and_merges_at_once_are_refused(golden: Path) -> None:
    weights = dict(read_checkpoint(golden / "elit-uvit-a.pt").weights) | {"merges.0.proj.weight": torch.zeros(96, 192)}
    for family in (sit.FAMILY, FAMILY):
        with pytest.raises(ModelError, match=r"has skips .* and merge and split .* at once"):
            family.sources(weights, {})
