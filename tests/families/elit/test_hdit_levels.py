"""The interface in the public HDiT: where latents stand, what they cost, what checkpoints tell, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.elit import interface  # noqa: E402
from elastic_export.families.elit.hdit_levels import (  # noqa: E402
    FAMILY,
    ElitHditLevels,
    ElitHditLevelsParams,
    activation_values,
    flops,
    rename_key,
    sources,
)
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.hdit import model as hdit  # noqa: E402
from elastic_export.families.layers import randomize  # noqa: E402
from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_runtime import Budget, ModelError  # noqa: E402
from elastic_targets.weights import held_in  # noqa: E402

WINDOW = {"type": "shifted-window", "d_head": 8, "window_size": 2}
GLOBAL = {"type": "global", "d_head": 16}
SMALL = ElitHditLevelsParams(
    input_channels=2, input_size=(16, 24), patch_size=(2, 2), depths=(1, 4), widths=(16, 32), d_ffs=(24, 48),
    self_attns=(WINDOW, GLOBAL), mapping_depth=1, mapping_width=8, mapping_d_ff=24, num_classes=3, sigma_data=0.5,
    group_size=2, head_blocks=1, tail_blocks=1,
)  # fmt: skip


def words(params: ElitHditLevelsParams, latents: int) -> int:
    """FLOPs, term by term as HDiT's layers are, of one outer level and the innermost one."""
    (h, w), (ph, pw), m = params.input_size, params.patch_size, params.mapping_width
    (outer, inner), (n, t) = params.widths, (h * w // ph // pw, h * w // ph // pw // 4)

    def layer(tokens: int, keys: int, width: int, hidden: int) -> int:
        return 2 * m * width + 3 * tokens * width * hidden + 4 * tokens * width**2 + 2 * tokens * keys * width

    sides = params.head_blocks + params.tail_blocks
    total = 2 * n * ph * pw * params.input_channels * outer + 2 * m**2 + params.mapping_depth * 3 * m * params.mapping_d_ff
    total += 2 * params.depths[0] * layer(n, params.self_attns[0]["window_size"] ** 2, outer, params.d_ffs[0]) + 2 * t * 4 * outer * inner
    total += sides * layer(t, t, inner, params.d_ffs[1]) + (params.depths[1] - sides) * layer(latents, latents, inner, params.d_ffs[1])
    return 2 * total + interface.flops(params.interface)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"head_blocks": 0, "tail_blocks": 0}, {"head_blocks": 2, "group_size": 1}])
def test_flops_are_what_torch_multiplies(changes: dict[str, Any]) -> None:
    """But for the constant of no augmentation, which is a sum here, and Read's queries, which are counted for each window."""
    params = replace(SMALL, **changes)
    module, windows = ElitHditLevels(params), params.windows
    for kept in range(1, windows.places + 1):
        arrays = FAMILY.feeds(params, Budget(latents=kept * windows.count), 1)
        # its counter knows the plain kernel's two products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        count = flops(params, kept * windows.count)
        assert count == words(params, kept * windows.count) == FAMILY.cost(params, Budget(latents=kept * windows.count), 1).flops
        again = 2 * (windows.tokens - windows.places) * 32**2
        assert count - again == counter.get_total_flops() + 2 * params.mapping_width**2


def test_the_full_budget_costs_a_plain_one_and_the_interface() -> None:
    assert flops(SMALL, 24) - interface.flops(SMALL.interface) == hdit.flops(SMALL)
    read_and_write = replace(SMALL.interface, condition=32)
    assert interface.flops(read_and_write) - interface.flops(SMALL.interface) == 2 * 7 * (32 - 8) * 32, "the condition is 8 wide"


def test_activations_of_every_level_are_counted() -> None:
    for params in (SMALL, replace(SMALL, head_blocks=0, tail_blocks=0)):
        few, many = activation_values(params, 6), activation_values(params, 24)
        assert 0 < few <= many
    flat = replace(SMALL, input_size=(8, 12), depths=(4,), widths=(32,), d_ffs=(48,), self_attns=(GLOBAL,), head_blocks=0, tail_blocks=0)
    assert activation_values(flat, 24) == hdit.level_values(flat, 0, 24) + 2 * 24 * 32


def test_a_latent_stands_on_the_cell_at_its_place() -> None:
    """On a grid of 4 x 6 cells with windows of 2 x 2: a window's second latent has its second cell's place, never the next window's."""
    module = ElitHditLevels(SMALL)
    raster = module.hdit.cells[1][0].positions.unflatten(0, (4, 6))
    for kept in (1, 2, 4):
        (even, odd) = module.places(kept)
        assert even is odd
        wanted = [raster[2 * row + place // 2, 2 * column + place % 2] for row in range(2) for column in range(3) for place in range(kept)]
        assert torch.equal(even.positions, torch.stack(wanted))


def test_other_places_are_another_function(model: Any, feeds: Any, forward: Any) -> None:
    golden = model("hdit-levels-a")
    right = forward(golden.module, feeds("hdit-levels-a", 3))
    wrong = ElitHditLevels(golden.params)
    wrong.load_state_dict(golden.module.state_dict())
    wrong.places.positions = golden.module.hdit.cells[1][0].positions.unflatten(0, (4, 16))  # the first cells, window or not
    assert np.abs(forward(wrong.eval(), feeds("hdit-levels-a", 3)) - right).max() > 0.1


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_a_rectangle_is_drawn_at_every_budget(kept: int, forward: Any) -> None:
    module = ElitHditLevels(SMALL)
    randomize(module, seed=0)
    arrays = FAMILY.feeds(SMALL, Budget(latents=6 * kept), 2)
    assert forward(module, arrays).shape == (2, 2, 16, 24)
    assert [*FAMILY.axes(SMALL)[0].values] == [6, 12, 18, 24]
    assert [spec.name for spec in FAMILY.inputs(SMALL)] == ["sample", "timestep", "class_labels", "latent_ids"]
    assert FAMILY.facts(SMALL) == hdit.facts(SMALL)


def test_what_makes_angles_stays_exact_in_half_precision() -> None:
    half = held_in(ElitHditLevels(SMALL), torch.float16)
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"freqs", "weight"}
    assert half.places.positions.dtype == torch.float32
    arrays = {name: torch.from_numpy(array) for name, array in FAMILY.feeds(SMALL, Budget(latents=12), 2).items()}
    with torch.inference_mode():
        assert half(**arrays).dtype == torch.float32


def test_public_names_become_ours() -> None:
    assert rename_key("mid_level.0.ff.up_proj.weight") == "hdit.mid_level.0.ff.up_proj.weight"
    assert rename_key("aug_emb.weight") is None
    assert rename_key("input_token_editor.adapters.0.fit_layer.adaLN_modulation.1.weight") == "read.modulation.linear.weight"


def test_shapes_and_a_config_tell_the_sizes(golden: Path) -> None:
    weights = read_checkpoint(golden / "elit-hdit-levels-a.pt").weights
    config = json.loads((golden / "elit-hdit-levels-a.json").read_text())
    needed = {name: config[name] for name in ("input_channels", "input_size", "patch_size", "self_attns")}
    params = agree(FAMILY, sources(weights, {}) | {"config": needed}, {})
    assert (params.group_size, params.head_blocks, params.tail_blocks, params.depths) == (4, 0, 0, (1, 3))
    with pytest.raises(ModelError, match="group_size is 4 by the interface's shapes but 2 by config"):
        agree(FAMILY, sources(weights, {}) | {"config": needed | {"group_size": 2}}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"self_attns": (GLOBAL | {"d_head": 8}, WINDOW)},
            "the innermost level must have attention of type global, since latents have no grid",
        ),
        ({"self_attns": (WINDOW, {"type": "none"})}, "got 'none'"),
        ({"head_blocks": 3}, "head_blocks 3 + tail_blocks 1 must leave a core in the innermost level, which has 4 layers"),
        ({"tail_blocks": -1}, "head_blocks 1 + tail_blocks -1 must leave a core"),
        ({"group_size": 4}, "a grid of 4x6 tokens does not divide into groups of 4x4"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("hdit", "elit-hdit-levels-a", "has an elastic interface .*, and hdit has none: export it as elit-hdit-levels"),
        ("elit-hdit-levels", "hdit-a", "has no interface .*, so it is not an elit-hdit-levels: export it as hdit"),
        ("elit-hdit-levels", "elit-hdit-a", "this is not an HDiT checkpoint: it lacks patch_in.proj.weight"),
        ("elit-hdit", "elit-hdit-levels-a", "this is not an ELIT checkpoint: it lacks x_embedder.proj.weight"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused_by_name(golden: Path, family: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(Request(family, golden / f"{name}.pt"))


def test_a_table_of_latent_positions_is_refused(golden: Path, tmp_path: Path) -> None:
    """A backbone with rotary positions has none."""
    config = golden / "elit-hdit-levels-a.json"
    weights = dict(read_checkpoint(config.with_suffix(".pt")).weights)
    torch.save(weights | {"input_token_editor.adapters.0.latent_pos_embed": torch.zeros(64, 64)}, tmp_path / "more.pt")
    with pytest.raises(ModelError, match="latent_pos_embed"):
        load(Request("elit-hdit-levels", tmp_path / "more.pt", config))
