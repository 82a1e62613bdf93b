import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from backbones import Backbone, changed  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.hdit.cells import Cells, gathered, spread  # noqa: E402
from elastic_export.families.hdit.model import FAMILY, PRESETS, Hdit, HditParams, flops, sources  # noqa: E402
from elastic_runtime import Budget, Bundle, ModelError, open_session  # noqa: E402
from elastic_runtime.contract.schedule import Edm  # noqa: E402
from elastic_targets.weights import held_in  # noqa: E402

NEIGHBORHOOD = {"type": "neighborhood", "d_head": 8, "kernel_size": 3}
WINDOW = {"type": "shifted-window", "d_head": 8, "window_size": 2}
GLOBAL = {"type": "global", "d_head": 16}
SMALL = HditParams(
    input_channels=2, input_size=(8, 16), patch_size=(2, 2), depths=(1, 2), widths=(16, 32), d_ffs=(24, 48),
    self_attns=(NEIGHBORHOOD, GLOBAL), mapping_depth=1, mapping_width=8, mapping_d_ff=24, num_classes=3, sigma_data=0.5,
)  # fmt: skip


def forward(module: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        result: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
    return result


@pytest.mark.parametrize("name", ["hdit-a", "hdit-b"])
def test_recorded_outputs_in_torch(backbone: Callable[[str], Backbone], name: str) -> None:
    recorded = backbone(name)
    model = load(Request("hdit", recorded.checkpoint, recorded.config))
    assert model.ignored == ("aug_emb.weight",)
    assert recorded.error(forward(model.module, recorded.feeds)) <= 2e-5


@pytest.mark.parametrize(("name", "opset"), narrow([("hdit-a", 23), ("hdit-b", 20)]))
def test_recorded_outputs_through_onnx_runtime(
    backbone: Callable[[str], Backbone], backbone_bundle: Callable[[str, int], Bundle], name: str, opset: int
) -> None:
    recorded, bundle = backbone(name), backbone_bundle(name, opset)
    assert (bundle.manifest.axes, len(bundle.manifest.cost)) == ((), 1)
    assert bundle.manifest.provenance.ignored_weights == ("aug_emb.weight",)
    with open_session(bundle) as session:
        assert recorded.error(session.run(recorded.feeds)["prediction"]) <= 2e-5
        twice = {name: np.concatenate([array, array[::-1]]) for name, array in recorded.feeds.items()}
        assert recorded.error(session.run(twice)["prediction"][3:1:-1]) <= 2e-5


@pytest.mark.wide
def test_half_precision_is_proven_by_its_export(backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    """With windows, of which ONNX Runtime is particular in half precision: see `Cells.ordered`."""
    recorded = backbone("hdit-b")
    arguments = {"checkpoint": recorded.checkpoint, "config": recorded.config, "precision": "fp16", "opset": 20}
    bundle = elastic_export.export("hdit", output=tmp_path / "bundle", **arguments)
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    assert artifact.verified
    assert all(row.passed for row in artifact.verified)


@pytest.mark.parametrize("name", ["hdit-a", "hdit-b"])
def test_flops_are_the_public_counters(backbone: Callable[[str], Backbone], name: str) -> None:
    recorded = backbone(name)
    params = load(Request("hdit", recorded.checkpoint, recorded.config)).params
    assert flops(params) == 2 * recorded.macs == FAMILY.cost(params, Budget(), 1).flops


@pytest.mark.parametrize("outer", [GLOBAL, WINDOW, {"type": "none"}, NEIGHBORHOOD])
def test_flops_are_what_torch_multiplies(outer: dict[str, Any]) -> None:
    """But for the constant of no augmentation, which is a sum here, and for what a neighbourhood's mask hides, which is multiplied."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    params = replace(SMALL, self_attns=(outer, GLOBAL))
    arrays = FAMILY.feeds(params, Budget(), 1)
    # its counter knows the plain kernel's two products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Hdit(params)(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    hidden = 2 * 4 * 32 * (32 - 9) * 16 if outer == NEIGHBORHOOD else 0
    assert flops(params) + hidden == counter.get_total_flops() + 2 * params.mapping_width**2


@pytest.mark.parametrize(("shape", "size"), [((4, 6), 3), ((5, 4), 4), ((7, 7), 7)])
def test_neighbours_are_the_nearest_cells_inside(shape: tuple[int, int], size: int) -> None:
    seen = Cells(shape, "neighborhood", size).mask
    assert seen is not None
    grid = seen.reshape(*shape, *shape).numpy()
    assert (grid.sum(axis=(2, 3)) == size**2).all()
    for row, column in np.ndindex(*shape):
        rows, columns = (
            range(start, start + size)
            for start in (min(max(at - size // 2, 0), side - size) for at, side in zip((row, column), shape, strict=True))
        )
        assert grid[row, column][np.ix_(rows, columns)].all()


def test_shifted_windows_do_not_see_around_the_edge() -> None:
    cells = Cells((4, 4), "shifted-window", 2, heads=3, shifted=True)
    assert cells.mask is not None
    raster = torch.arange(16.0).reshape(1, 16, 1)
    assert cells.ordered(raster)[0, :8, 0].tolist() == [15, 12, 3, 0, 13, 14, 1, 2], "the first window is made of the four corners"
    assert cells.mask.shape == (1, 3 * 4, 4, 4)
    assert torch.equal(cells.mask[0, 0], torch.eye(4, dtype=torch.bool)), "each corner sees itself"
    assert torch.equal(cells.mask[0, 0], cells.mask[0, 4])
    assert cells.mask[0, 3].all()
    plain = Cells((4, 4), "shifted-window", 2, heads=3)
    assert plain.mask is None
    assert plain.ordered(raster)[0, :4, 0].tolist() == [0, 1, 4, 5]
    for each in (cells, plain, Cells((4, 4), "global")):
        assert torch.equal(each.restored(each.ordered(raster)), raster)
    assert torch.equal(cells.positions, cells.ordered(Cells((4, 4), "global").positions[None])[0])


def test_positions_are_the_centres_of_equal_cells() -> None:
    wide = Cells((2, 4), "global").positions
    assert wide[:, 1].tolist() == [-0.75, -0.25, 0.25, 0.75] * 2
    assert wide[:, 0].tolist() == [-0.25] * 4 + [0.25] * 4
    inner = Cells((1, 2), "global").positions
    assert torch.equal(inner, gathered(wide[None], (2, 4), (2, 2)).unflatten(2, (4, 2)).mean(dim=2)[0]), "a merge takes the mean of four"


def test_cells_come_together_and_apart_again() -> None:
    x = torch.arange(24.0).reshape(1, 24, 1)
    joined = gathered(x, (4, 6), (2, 3))
    assert joined[0].tolist()[:2] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert torch.equal(spread(joined, (4, 6), (2, 3)), x)


def test_a_stretch_of_the_innermost_level_can_be_taken_out() -> None:
    module = Hdit(SMALL)
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(2, 8, 32, generator=generator), torch.randn(2, 8, generator=generator)
    with torch.inference_mode():
        whole = module.run(module.mid_level, x, cond, module.cells[1])
        part = module.run(module.mid_level[1:], module.run(module.mid_level[:1], x, cond, module.cells[1]), cond, module.cells[1], first=1)
    assert torch.equal(whole, part)


def test_what_makes_angles_stays_exact_in_half_precision() -> None:
    half = held_in(Hdit(SMALL), torch.float16)
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"freqs", "weight"}
    assert {name.split(".")[0] for name in kept if name.endswith("weight")} == {"time_emb"}
    arrays = {name: torch.from_numpy(array) for name, array in FAMILY.feeds(SMALL, Budget(), 2).items()}
    with torch.inference_mode():
        assert half(**arrays).dtype == torch.float32


def test_the_presets_are_the_public_configs() -> None:
    for params in PRESETS.values():
        assert [params.grid(level) for level in range(3)] == [(64, 64), (32, 32), (16, 16)]
        assert FAMILY.facts(params)["schedule"] == Edm(sigma_min=0.01, sigma_max=160.0, sigma_data=0.5)
    assert [params.keys(0) for params in PRESETS.values()] == [49, 64]
    assert FAMILY.facts(SMALL) == {
        "prediction": "edm",
        "schedule": Edm(sigma_min=0.01, sigma_max=160.0, sigma_data=0.5),
        "sample_shape": (2, 8, 16),
        "num_classes": 3,
        "null_label": 3,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (8, 18)}, r"input_size [8, 18] must be multiples of [4, 4]"),
        ({"input_size": 8}, "input_size must be a list of two whole numbers, got 8"),
        ({"depths": (1,)}, "widths must be a list of whole numbers, one a level, got (16, 32)"),
        ({"self_attns": (GLOBAL,)}, "self_attns must be a list of objects, one a level"),
        ({"widths": (16, 0)}, "widths must be at least 1"),
        ({"mapping_width": 7}, "mapping_width even"),
        ({"self_attns": (NEIGHBORHOOD, {"type": "linear"})}, "self_attns[1] has type 'linear'; it is one of global, neighborhood,"),
        ({"self_attns": (NEIGHBORHOOD, GLOBAL | {"kernel_size": 7})}, "self_attns[1] of type global takes d_head, whole, got"),
        ({"self_attns": ({"type": "neighborhood", "d_head": 8}, GLOBAL)}, "takes d_head and kernel_size, whole, got"),
        ({"self_attns": (NEIGHBORHOOD, GLOBAL | {"d_head": 12})}, "d_head 12 of level 1 must divide its width 32, and be a multiple of 8"),
        ({"self_attns": (NEIGHBORHOOD | {"kernel_size": 5}, GLOBAL)}, "kernel_size 5 is larger than the 4x8 grid of level 0"),
        ({"self_attns": (WINDOW | {"window_size": 3}, GLOBAL)}, "window_size 3 must be even and divide the 4x8 grid of level 0"),
        ({"sigma_min": 0.0}, "needs 0 < sigma_min < sigma_max"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SMALL, **changes)


def weights(params: HditParams = SMALL) -> dict[str, Any]:
    with torch.device("meta"):
        return dict(Hdit(params).state_dict())


CONFIG = {
    "input_channels": 2, "input_size": [8, 16], "patch_size": [2, 2], "self_attns": [NEIGHBORHOOD, GLOBAL], "sigma_data": 0.5,
}  # fmt: skip


def test_shapes_and_a_config_tell_the_sizes() -> None:
    assert agree(FAMILY, sources(weights(), {}) | {"config": CONFIG}, {}) == SMALL
    beside = {"model": CONFIG | {"type": "image_transformer_v2", "dropout_rate": None, "d_ffs": None}, "dataset": {"type": "imagefolder"}}
    assert agree(FAMILY, sources(weights(), beside), {}) == SMALL, "a training checkpoint has its config beside"
    with pytest.raises(ModelError, match="nothing tells input_channels, input_size, patch_size, self_attns; give --config"):
        agree(FAMILY, sources(weights(), {}), {})
    with pytest.raises(ModelError, match=r"depths is \(1, 2\) by the checkpoint's shapes but \(1, 3\) by config"):
        agree(FAMILY, sources(weights(), {}) | {"config": CONFIG | {"depths": [1, 3]}}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_in_proj.weight": None}, "this is not an HDiT checkpoint: it lacks time_in_proj.weight"),
        ({"patch_in.proj.weight": (7,)}, "its patch_in.proj.weight has shape (7,), not 2 dimensions"),
        ({"down_levels.1.0.self_attn.scale": (2,)}, "a level of it has no ff.up_proj.weight"),
        ({"mapping_cond_in_proj.weight": (8, 3)}, "conditioned on more than classes"),
        ({"input_token_editor.adapters.0.pos_embed": (4, 16)}, "has an elastic interface"),
    ],
)
def test_other_checkpoints_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        sources(changed(weights(), changes), {})


def test_attention_of_another_kind_is_found_by_its_weights(backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    recorded = backbone("hdit-a")
    config = json.loads(recorded.config.read_text())
    config["self_attns"][0] = {"type": "none"}
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has unknown .*self_attn"):
        load(Request("hdit", recorded.checkpoint, tmp_path / "other.json"))
