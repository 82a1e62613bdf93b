"""The interface in the public U-ViT: what it costs, what its checkpoints tell, and what is refused."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families import uvit  # noqa: E402
from elastic_export.families.elit import interface  # noqa: E402
from elastic_export.families.elit.uvit_tokens import (  # noqa: E402
    FAMILY,
    ElitUvitTokens,
    ElitUvitTokensParams,
    activation_values,
    flops,
    rename_key,
    sources,
)
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.layers import randomize  # noqa: E402
from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_runtime import Budget, ModelError  # noqa: E402

SMALL = ElitUvitTokensParams(
    img_size=8, patch_size=2, in_chans=4, embed_dim=16, depth=4, num_heads=2, num_classes=4, group_size=2, head_blocks=1, tail_blocks=1
)
HUGE = ElitUvitTokensParams(**asdict(uvit.PRESETS["uvit-h-256"]), group_size=4, head_blocks=4, tail_blocks=4)


def words(params: ElitUvitTokensParams, latents: int) -> int:
    """FLOPs, term by term as U-ViT's layers are."""
    width, ratio, patches = params.embed_dim, params.mlp_ratio, params.img_size**2 // params.patch_size**2
    values, extras = params.patch_size**2 * params.in_chans, 2 if params.num_classes > 0 else 1
    total = 2 * patches * values * width + 2 * (extras + patches) * width * values
    total += 16 * width**2 if params.mlp_time_embed else 0
    total += 2 * params.img_size**2 * 9 * params.in_chans**2 if params.conv else 0
    for index in range(params.depth + 1):
        outside = index < params.head_blocks or index >= params.depth + 1 - params.tail_blocks
        tokens = extras + (patches if outside else latents)
        total += 2 * tokens * (4 + 2 * ratio) * width**2 + 4 * tokens**2 * width
        total += 4 * tokens * width**2 if index > params.depth // 2 and params.skip else 0
    return total + interface.flops(params.interface)


@pytest.mark.parametrize("changes", [{}, {"conv": False, "num_classes": -1}, {"mlp_time_embed": True, "depth": 8}, {"skip": False}])
def test_flops_are_what_torch_multiplies(changes: dict[str, Any]) -> None:
    """Read's queries are counted for each window, and the decoder's for the extra tokens, too: neither is computed."""
    params = replace(SMALL, **changes)
    module, windows = ElitUvitTokens(params), params.windows
    for kept in (1, 2, 4):
        arrays = FAMILY.feeds(params, Budget(latents=kept * windows.count), 1)
        # its counter knows the plain kernel's two products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        count = flops(params, kept * windows.count)
        assert count == words(params, kept * windows.count) == FAMILY.cost(params, Budget(latents=kept * windows.count), 1).flops
        again = 2 * (windows.tokens - windows.places) * params.embed_dim**2 + 2 * params.extras * 16 * 16
        assert count - again == counter.get_total_flops()


def test_fewer_latents_cost_less() -> None:
    levels = [flops(HUGE, latents) for latents in range(16, 257, 16)]
    assert levels == sorted(levels)
    assert [words(HUGE, latents) for latents in (16, 128, 256)] == [flops(HUGE, latents) for latents in (16, 128, 256)]
    assert levels[-1] - interface.flops(HUGE.interface) == uvit.flops(uvit.PRESETS["uvit-h-256"])
    assert levels[0] < 0.45 * levels[-1]


def test_activations_that_wait_for_their_mirrors_are_counted() -> None:
    waiting = HUGE.embed_dim * 4 * HUGE.tokens
    for latents in (16, 256):
        alone = activation_values(replace(HUGE, skip=False), latents)
        assert alone + waiting <= activation_values(HUGE, latents) <= alone + waiting + HUGE.embed_dim * 10 * (2 + latents)


def test_head_and_tail_may_be_empty_or_all_but_the_middle() -> None:
    whole = Budget(latents=16)
    for blocks, core in ((0, range(5)), (2, range(2, 3))):
        params = replace(SMALL, head_blocks=blocks, tail_blocks=blocks)
        assert params.core == core
        module = ElitUvitTokens(params)
        randomize(module, seed=0)
        arrays = {name: torch.from_numpy(array) for name, array in FAMILY.feeds(params, whole, 2).items()}
        with torch.inference_mode():
            assert module(**arrays).shape == (2, 4, 8, 8)
        assert activation_values(params, 4) < activation_values(params, 16)


def test_the_graph_has_no_labels_where_there_are_no_classes() -> None:
    names = [spec.name for spec in FAMILY.inputs(SMALL)]
    assert names == ["sample", "timestep", "class_labels", "latent_ids"]
    assert [spec.name for spec in FAMILY.inputs(replace(SMALL, num_classes=-1))] == ["sample", "timestep", "latent_ids"]
    assert [*FAMILY.axes(HUGE)[0].values] == list(range(16, 257, 16))
    assert FAMILY.facts(HUGE) == uvit.facts(HUGE)


def test_extra_tokens_pass_the_interface_by(model: Any, feeds: Any, forward: Any) -> None:
    """What Read is told is their sum, without positions: with its condition closed, they act through the blocks alone."""
    golden = model("uvit-tokens-a")
    seen: list[tuple[Any, ...]] = []
    hook = golden.module.read.register_forward_hook(lambda module, given, out: seen.append((*given, out[1])))
    arrays = feeds("uvit-tokens-a", 3)
    forward(golden.module, arrays)
    hook.remove()
    ((x, c, latents),) = seen
    assert (x.shape, c.shape, latents.shape) == ((2, 64, 32), (2, 32), (2, 4, 16, 32))
    time = golden.module.uvit.sinusoids(torch.from_numpy(arrays["timestep"]))
    label = golden.module.uvit.label_emb(torch.from_numpy(arrays["class_labels"]))
    assert torch.equal(c, time + label)


def test_public_names_become_ours() -> None:
    assert rename_key("in_blocks.0.norm1.weight") == "uvit.in_blocks.0.norm1.weight"
    assert rename_key("input_token_editor.adapters.0.latent_pos_embed") == "read.latent_pos_embed"
    assert rename_key("output_token_editor.adapters.0.write_ff.0.fc1.weight") == "write.mlp.fc1.weight"


def test_shapes_tell_all_but_the_heads_and_the_split(golden: Path) -> None:
    weights = read_checkpoint(golden / "elit-uvit-tokens-a.pt").weights
    config = {"num_heads": 4, "head_blocks": 2, "tail_blocks": 2}
    params = agree(FAMILY, sources(weights, {}) | {"config": config}, {})
    assert (params.group_size, params.latent_positions, params.depth, params.patches) == (4, 4096, 6, 64)
    with pytest.raises(ModelError, match="nothing tells num_heads, head_blocks, tail_blocks; give --config"):
        agree(FAMILY, sources(weights, {}), {})
    with pytest.raises(ModelError, match="group_size is 4 by the checkpoint's shapes but 2 by config"):
        agree(FAMILY, sources(weights, {}) | {"config": config | {"group_size": 2}}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail_blocks": 2}, "head_blocks 1 must equal tail_blocks 2: a skip joins tokens to tokens or latents to latents"),
        ({"head_blocks": 3, "tail_blocks": 3}, "head_blocks and tail_blocks 3 must be 0 to 2: of 5 blocks the middle one runs on latents"),
        ({"head_blocks": -1, "tail_blocks": -1}, "head_blocks and tail_blocks -1 must be 0 to 2"),
        ({"group_size": 3}, "a grid of 4x4 tokens does not divide into groups of 3x3"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"latent_positions": 8}, "latent_positions 8 is fewer than the 16 tokens"),
        ({"depth": 5}, "depth 5 must be even"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("uvit", "elit-uvit-tokens-a", "has an elastic interface .*, and uvit has none: export it as elit-uvit-tokens"),
        ("elit-uvit-tokens", "uvit-a", "has no interface .*, so it is not an elit-uvit-tokens: export it as uvit"),
        ("elit-uvit-tokens", "elit-uvit-a", "this is not a U-ViT checkpoint: it lacks patch_embed.proj.weight"),
        ("elit-uvit", "elit-uvit-tokens-a", "this is not an ELIT checkpoint: it lacks x_embedder.proj.weight"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused_by_name(golden: Path, family: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(Request(family, golden / f"{name}.pt"))


def test_a_table_of_no_two_dimensions_is_named(golden: Path) -> None:
    key = "input_token_editor.adapters.0.pos_embed"
    weights = dict(read_checkpoint(golden / "elit-uvit-tokens-a.pt").weights) | {key: torch.zeros(16)}
    with pytest.raises(ModelError, match=r"its read.pos_embed has shape \(16,\), not 2 whole dimensions"):
        sources(weights, {})


def test_feeds_have_times_in_the_schedules_unit() -> None:
    arrays = FAMILY.feeds(SMALL, Budget(latents=8), 3)
    assert arrays["timestep"].max() > 500
    np.testing.assert_array_equal(arrays["latent_ids"], [0, 1])
