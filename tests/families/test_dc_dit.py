"""DC-DiT: recorded outputs, the cap, and its routing against plain torch."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from dcdit import learn, untrained, upcycle  # noqa: E402
from elastic_export.capture.capture import capture  # noqa: E402
from elastic_export.capture.zoo import Model, Request, load  # noqa: E402
from elastic_export.exporting import export_capture  # noqa: E402
from elastic_export.families.dc_dit.chunk import count, nearest, select, smooth  # noqa: E402
from elastic_export.families.dc_dit.model import FAMILY, PRESETS, DcDit, DcDitParams, rename_key, sources  # noqa: E402
from elastic_export.families.dc_dit.model import flops as dc_dit_flops  # noqa: E402
from elastic_export.families.elt import Elt, EltParams  # noqa: E402
from elastic_export.families.elt import flops as elt_flops  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.layers import randomize  # noqa: E402
from elastic_runtime import Bundle, ModelError, Span, open_session  # noqa: E402
from elastic_runtime.contract.schedule import LinearBeta  # noqa: E402
from elastic_targets import target as room  # noqa: E402
from elastic_targets.weights import held_in  # noqa: E402

FRACTIONS = {"0.0": (0, 0), "0.3": (0.3, 0.3), "0.6": (0.6, 0.6), "0.9": (0.9, 0.9), "per_sample_0.2_0.5": (0.2, 0.5)}
SMALL = DcDitParams(
    input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=10, dechunk_kernel_sigma=1.0, enc_dec_dim_factor=1
)
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(golden: Path) -> Model:
    return load(Request("dc-dit", golden / "dcdit-a.pt", golden / "dcdit-a.json"))


@pytest.fixture(scope="module")
def recorded(golden: Path) -> Arrays:
    with np.load(golden / "dcdit-a.io.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def bundle(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    folder = tmp_path_factory.mktemp("bundles") / "dcdit"
    return export_capture(capture(model, {}, Span(1, 4)), "onnx", room("onnx").options(), folder, "elastic-export onnx dc-dit")


def feeds(arrays: Arrays, fractions: Any, slots: int) -> Arrays:
    drop = np.array(fractions, dtype=np.float32)
    return {"sample": arrays["x"], "timestep": arrays["t"], "class_labels": arrays["y"], "drop_fraction": drop, "slots": np.arange(slots)}


def forward(module: Any, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        prediction, kept, _ = module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    return prediction.numpy(), kept.numpy()


def made(params: DcDitParams) -> DcDit:
    """A module whose router keeps about half of the tokens, none by a hair."""
    torch.manual_seed(0)  # convolutions draw their own biases
    module = DcDit(params)
    randomize(module, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return module.eval().requires_grad_(False)


def test_every_recorded_fraction_is_tested(recorded: Arrays) -> None:
    assert {key.removeprefix("out_drop_") for key in recorded if key.startswith("out_drop_")} == FRACTIONS.keys()


@pytest.mark.parametrize("name", FRACTIONS)
def test_golden_sets_and_outputs_in_torch(name: str, model: Model, recorded: Arrays) -> None:
    arrays = feeds(recorded, FRACTIONS[name], 256)
    prediction, kept = forward(model.module, arrays)
    assert np.abs(prediction - recorded[f"out_drop_{name}"]).max() <= 2e-6
    wanted = recorded[f"kept_drop_{name}"].astype(bool)
    assert kept.tolist() == wanted.sum(1).tolist()
    with torch.inference_mode():
        *_, p = model.module.encode(*(torch.from_numpy(recorded[key]) for key in "xty"))
        _, positions = select(p, 256)
    assert np.abs(p.numpy() - recorded[f"keep_prob_drop_{name}"]).max() <= 2e-6
    for row, amount, mask in zip(positions, kept, wanted, strict=True):
        assert set(row[: int(amount)].tolist()) == set(np.flatnonzero(mask).tolist())


def test_golden_outputs_through_onnx_runtime_with_all_slots_and_with_just_enough(model: Model, recorded: Arrays, bundle: Bundle) -> None:
    axis = bundle.manifest.axis("tokens")
    assert (axis.span, axis.step, axis.default, axis.input, axis.carrier, axis.dimension) == (Span(16, 256), 4, 256, "slots", "length", "K")
    with open_session(bundle, threads=1) as session:
        for name, fractions in FRACTIONS.items():
            most = int(recorded[f"kept_drop_{name}"].sum(1).max())
            for slots in (256, max(-(-most // 4) * 4, axis.min)):
                got = session.run(feeds(recorded, fractions, slots))
                assert np.abs(got["prediction"] - recorded[f"out_drop_{name}"]).max() <= 1e-5, f"drop {name}, {slots} slots"
                assert got["kept"].tolist() == recorded[f"kept_drop_{name}"].sum(1).tolist()
                assert np.abs(got["probability"] - recorded[f"keep_prob_drop_{name}"]).max() <= 1e-5
        for slots in (16, 100):  # below the cap: against torch
            arrays = feeds(recorded, (0.0, 0.3), slots)
            prediction, kept = forward(model.module, arrays)
            got = session.run(arrays)
            assert np.abs(got["prediction"] - prediction).max() <= 1e-5
            assert got["kept"].tolist() == kept.tolist() == [136.0, 88.0]


def fraction_that_keeps(wanted: int, natural: int) -> np.float32:
    """A fraction whose tail drop leaves `wanted` of so many natural tokens."""
    fraction = np.float32(natural - wanted + 0.5) / np.float32(natural)
    assert natural - np.floor(np.float32(natural) * fraction) == wanted
    return np.float32(fraction)


@pytest.mark.parametrize("slots", [2, 16, 100, 124])
def test_below_the_cap_it_is_the_official_result_at_the_fraction_that_keeps_as_many(slots: int, model: Model, recorded: Arrays) -> None:
    prediction, kept = forward(model.module, feeds(recorded, (0, 0), slots))
    assert kept.tolist() == [136, 125], "kept tells the count before the cap"
    same, count = forward(model.module, feeds(recorded, [fraction_that_keeps(slots, int(n)) for n in kept], 256))
    assert count.tolist() == [slots, slots]
    assert np.abs(prediction - same).max() <= 2e-6


@settings(max_examples=12)
@given(st.integers(0, 2**16), st.floats(0, 0.95))
def test_hidden_slots_and_the_rest_of_the_batch_change_nothing(seed: int, fraction: float) -> None:
    module, generator = made(replace(SMALL, dechunk_kernel_sigma=2.0)), np.random.default_rng(seed)
    arrays = {
        "x": generator.standard_normal((2, 4, 8, 8)).astype(np.float32),
        "t": generator.integers(0, 1000, 2).astype(np.float32),
        "y": generator.integers(0, 11, 2),
    }
    whole, kept = forward(module, feeds(arrays, (fraction, 0), 64))
    tight, _ = forward(module, feeds(arrays, (fraction, 0), int(kept.max())))
    assert np.abs(whole - tight).max() <= 2e-5 * max(1, np.abs(whole).max())
    alone, _ = forward(module, feeds({name: array[:1] for name, array in arrays.items()}, (fraction,), int(kept[0])))
    assert np.abs(whole[:1] - alone).max() <= 2e-5 * max(1, np.abs(whole).max())


def test_the_count_is_taken_in_float32() -> None:
    p = torch.cat([torch.full((1, 90), 0.9), torch.full((1, 10), 0.1)], dim=1)
    # 90 * 0.7 is 63 in float32, which drops 63, and just below it in float64, which would drop 62
    assert count(p, torch.tensor([0.7])).tolist() == [27.0]


@settings(max_examples=30)
@given(st.integers(2, 128), st.integers(1, 60), st.integers(0, 12), st.integers(0, 2**16))
def test_the_nearest_search_is_exact_and_breaks_ties_by_raster_order(side: int, kept: int, hidden: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = side**2
    kept, hidden = min(kept, tokens), min(hidden, tokens - min(kept, tokens))
    positions = generator.permutation(tokens)[: kept + hidden]
    if seed % 2:  # a lattice has many ties
        positions[:kept] = np.sort(generator.permutation(np.arange(0, tokens, max(tokens // kept, 1))))[:kept]
    visible = np.arange(kept + hidden) < kept
    rows, columns = np.divmod(np.arange(tokens), side)
    grid = torch.from_numpy(np.stack([rows, columns], axis=1).astype(np.float32))
    indices = nearest(grid, grid[positions][None], torch.from_numpy(positions)[None], torch.from_numpy(visible)[None].float())[0]
    squares = (rows[:, None] - rows[positions[:kept]]) ** 2 + (columns[:, None] - columns[positions[:kept]]) ** 2
    wanted = positions[(squares * tokens + positions[:kept]).argmin(axis=1)]
    assert np.array_equal(positions[indices.numpy()], wanted)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_smoothing_is_the_written_formula_over_visible_slots(sigma: float) -> None:
    generator = np.random.default_rng(1)
    h, p = generator.standard_normal((1, 7, 3)), generator.uniform(0.5, 1, (1, 7))
    p[0, 0] = 1.0
    cells = generator.integers(0, 64, (1, 7, 2)).astype(np.float64)
    cells[0, 1] = cells[0, 0] + [0, 1]
    visible = np.array([[1, 1, 1, 1, 1, 0, 0]])
    clamped = p.clip(1e-4, 1 - 1e-4)
    wanted = []
    for i in range(5):
        weights = [np.exp(-((cells[0, i] - cells[0, j]) ** 2).sum() / (2 * sigma**2)) * clamped[0, j] for j in range(5)]
        mean = sum(w * h[0, j] for j, w in enumerate(weights)) / (sum(weights) + 1e-8)
        wanted.append(clamped[0, i] * h[0, i] + (1 - clamped[0, i]) * mean)
    got = smooth(*(torch.from_numpy(array).float() for array in (h, p, cells, visible)), sigma)
    assert np.abs(got[0, :5].numpy() - np.array(wanted)).max() < 1e-6


def test_the_core_is_dits_block_with_its_epsilon_at_512_pixels_too() -> None:
    """Weak tokens tell 1e-6 from 1e-5 under a LayerNorm's root."""
    module = made(SMALL)
    block = module.blocks[0]
    h, c = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * 1e-3, torch.ones(2, 32)
    norm = torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)
    parts = torch.nn.functional.linear(torch.nn.functional.silu(c), block.modulation.linear.weight, block.modulation.linear.bias)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts[:, None].chunk(6, -1)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.inference_mode():
        attention.in_proj_weight.copy_(block.attn.qkv.weight)
        attention.in_proj_bias.copy_(block.attn.qkv.bias)
        attention.out_proj.load_state_dict(block.attn.proj.state_dict())
        hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        x = norm(h) * (1 + scale_a) + shift_a
        wanted = h + gate_a * attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        inner = block.mlp.fc1(norm(wanted) * (1 + scale_m) + shift_m)
        wanted = wanted + gate_m * block.mlp.fc2(torch.nn.functional.gelu(inner, approximate="tanh"))
        got = block(h, c, ~hidden[:, None, None, :].expand(-1, 1, 5, -1))
    assert (got - wanted).abs().max() < 1e-6


def test_learning_sees_what_is_drawn_and_moves_the_router() -> None:
    module = made(SMALL).requires_grad_(True)
    sample, t, labels = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([5.0, 500.0, 990.0]),
        torch.arange(3),
    )
    drop = torch.full((3,), 0.3)
    prediction, p, natural = learn(module, sample, t, labels, drop)
    drawn, kept, probability = module(sample, t, labels, drop, torch.arange(64))
    assert (prediction - drawn).abs().max() < 1e-5
    assert torch.equal(kept, natural.float().sum(1) - torch.floor(natural.float().sum(1) * 0.3))
    assert torch.equal(p, probability)
    prediction.square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_half_precision_leaves_the_decisions_as_they_are() -> None:
    module = made(SMALL)
    arrays = feeds({"x": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32), "t": np.array([9.0, 700.0], np.float32),
                    "y": np.array([0, 10])}, (0, 0.3), 64)  # fmt: skip
    prediction, kept = forward(module, arrays)
    held = held_in(module, torch.float16)
    half, same = forward(held, arrays)
    assert (held.router.proj.weight.dtype, held.blocks[0].attn.qkv.weight.dtype) == (torch.float32, torch.float16)
    assert half.dtype == np.float32
    assert kept.tolist() == same.tolist()
    assert 0 < np.abs(half - prediction).max() <= 2e-2 * max(1, np.abs(prediction).max())


def test_flops_are_those_published() -> None:
    """TFLOPs of a picture of 250 steps, with the 242 natural tokens that they correspond to."""
    published = {("b", 0.2): 11.94, ("b", 0.5): 8.55, ("xl", 0.0): 62.99, ("xl", 0.2): 51.60, ("xl", 0.4): 40.26}
    for (size, fraction), tera in published.items():
        flops = dc_dit_flops(PRESETS[f"dc-dit-{size}-256"], round(242 * (1 - fraction)))
        assert 250 * flops / 1e12 == pytest.approx(tera, rel=0.01)
    for width, heads, blocks, tera in ((768, 12, 12, 11.46), (1152, 16, 28, 59.0)):
        plain = EltParams(32, 2, 4, width, heads, 1000, blocks, 1, 1, prediction="ddpm")
        assert 250 * elt_flops(plain, 1) / 1e12 == pytest.approx(tera, rel=0.01)


def test_presets_are_the_published_sizes() -> None:
    assert set(PRESETS) == {f"dc-dit-{size}-{pixels}" for size in ("s", "b", "l", "xl") for pixels in (256, 512)}
    for name, params in PRESETS.items():
        at_512 = name.endswith("512")
        assert (params.input_size, params.dechunk_kernel_sigma) == ((64, 2.0) if at_512 else (32, 1.0))
    assert FAMILY.axes(PRESETS["dc-dit-xl-512"])[0].span == Span(64, 4096)
    facts = FAMILY.facts(PRESETS["dc-dit-b-256"])
    assert (facts["prediction"], facts["schedule"], facts["learned_variance"], facts["guided_channels"]) == (
        "epsilon",
        LinearBeta(),
        True,
        3,
    )
    assert FAMILY.facts(replace(SMALL, in_channels=1))["guided_channels"] == 1
    assert FAMILY.facts(replace(SMALL, prediction="v"))["prediction"] == "v"


@given(st.integers(2, 130))
def test_every_size_has_an_axis_up_to_all_of_its_tokens(side: int) -> None:
    (axis,) = FAMILY.axes(replace(SMALL, input_size=side))
    assert axis.max == axis.default == side**2
    assert axis.min < 16 + axis.step


def test_a_preset_and_shapes_tell_what_a_public_checkpoint_leaves_out(golden: Path) -> None:
    weights = torch.load(golden / "dcdit-a.pt", weights_only=True)["ema"]
    origins = sources(weights, {"num_heads": 4, "dechunk_kernel_sigma": 1.0})
    params = agree(FAMILY, origins, {})
    assert (params.input_size, params.enc_dec_dim_factor, params.encoder, params.decoder, params.num_heads) == (16, 2, "c2", "c2", 4)
    assert {rename_key(key) for key in weights} == DcDit(params).state_dict().keys()
    with pytest.raises(ModelError, match="nothing tells num_heads, dechunk_kernel_sigma; give --config"):
        agree(FAMILY, sources(weights, {}), {})
    big = asdict(PRESETS["dc-dit-l-512"])
    left_out = ("num_heads", "dechunk_kernel_sigma")
    assert agree(FAMILY, {"shapes": {name: value for name, value in big.items() if name not in left_out}}, {}) == PRESETS["dc-dit-l-512"]


def test_checkpoints_of_another_kind_are_named(golden: Path) -> None:
    weights = torch.load(golden / "dcdit-a.pt", weights_only=True)["ema"]
    with pytest.raises(ModelError, match=r"not a DC-DiT checkpoint: it lacks router.proj.weight"):
        sources({key: value for key, value in weights.items() if "routing" not in key}, {})
    with pytest.raises(ModelError, match=r"its pos_embed has shape \(256, 64\), not 3 dimensions"):
        sources(weights | {"pos_embed": weights["pos_embed"][0]}, {})
    with pytest.raises(ModelError, match="other kinds than c1, c2"):
        sources({key: value for key, value in weights.items() if "encoder.layers" not in key}, {})
    with pytest.raises(ModelError, match="learn_sigma must be true"):
        short = weights | {"final_layer.linear.weight": weights["final_layer.linear.weight"][:4]}
        agree(FAMILY, sources(short, {"num_heads": 4, "dechunk_kernel_sigma": 1.0}), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "x0"}, "prediction must be epsilon \\(as in public checkpoints\\) or v, got 'x0'"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"input_size": 1}, "input_size must be at least 2, got 1"),
        ({"num_heads": 3}, "hidden_size 32 must be a multiple of num_heads 3"),
        ({"enc_dec_dim_factor": 2}, "must be a multiple of 32 \\* enc_dec_dim_factor = 64"),
        ({"dechunk_kernel_sigma": 0.0}, "dechunk_kernel_sigma must be above 0"),
        ({"dechunk_kernel_sigma": float("inf")}, "dechunk_kernel_sigma must be above 0 and finite"),
        ({"mlp_ratio": -1.0}, "mlp_ratio -1.0 leaves no hidden layer"),
        ({"encoder": "t2"}, "encoder must be c1, c2, ...: so many convolution blocks; got 't2'"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_upcycling_takes_the_core_and_the_conditions_of_a_plain_dit() -> None:
    plain = Elt(EltParams(8, 2, 4, 32, 4, 10, 2, 1, 1, prediction="ddpm"))
    randomize(plain, seed=0)
    public = {key.replace("modulation.linear.", "adaLN_modulation.1."): value for key, value in plain.state_dict().items()}
    model, taken = upcycle(SMALL, public)
    assert any("adaLN" in key for key in public)
    state, given = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[name], given[name]) for name in taken)
    assert {name.split(".")[0] for name in taken} == {"blocks", "t_embedder", "y_embedder"}
    assert not model.residual_proj.weight.any()
    assert torch.sigmoid(model.router.residual_scorer[-1].bias).item() == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(ModelError, match="has 2 blocks, the DC-DiT's core 1"):
        upcycle(replace(SMALL, depth=1), public)
    with pytest.raises(ModelError, match="lacks blocks.2.attn.qkv.weight"):
        upcycle(replace(SMALL, depth=3), public)
    with pytest.raises(ModelError, match=r"the DiT to upcycle has .* of shape .* the DC-DiT"):
        upcycle(replace(SMALL, hidden_size=64), public)


def test_an_untrained_model_keeps_only_what_it_must() -> None:
    prediction, kept = forward(untrained(SMALL).eval(), feeds({"x": np.zeros((1, 4, 8, 8), np.float32), "t": np.zeros(1, np.float32),
                                                              "y": np.zeros(1, np.int64)}, (0,), 64))  # fmt: skip
    assert kept.tolist() == [2.0]
    assert not prediction.any()


def test_feeds_are_as_the_contract_says(model: Model) -> None:
    from elastic_runtime import Budget

    arrays = FAMILY.feeds(model.params, Budget(tokens=100), 4)
    assert list(arrays) == [spec.name for spec in FAMILY.inputs(model.params)]
    assert arrays["slots"].tolist() == list(range(100))
    assert np.allclose(arrays["drop_fraction"], [0, 0.3, 0.6, 0])
    assert np.array_equal(arrays["timestep"], arrays["timestep"].round())
    assert arrays["timestep"].max() > 100
