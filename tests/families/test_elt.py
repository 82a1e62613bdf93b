"""ELT and its masked form: one graph with a real loop, exact at every count."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from elastic_export.capture.capture import capture  # noqa: E402
from elastic_export.capture.zoo import Model  # noqa: E402
from elastic_export.exporting import export_capture  # noqa: E402
from elastic_export.families import elt, elt_masked  # noqa: E402
from elastic_export.families.family import agree  # noqa: E402
from elastic_export.families.layers import DiTBlock, randomize  # noqa: E402
from elastic_runtime import Budget, BudgetError, Bundle, ModelError, Span, open_session  # noqa: E402
from elastic_runtime.contract.schedule import CosineMask, LinearBeta, RectifiedFlow, ShiftedCosine  # noqa: E402
from elastic_targets import target as room  # noqa: E402

DIFFUSION = elt.EltParams(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, num_heads=4, num_classes=10, unique_blocks=2, loops=3, max_loops=8,
    prelude_blocks=1, coda_blocks=1,
)  # fmt: skip
MASKED = elt_masked.EltMaskedParams(
    grid=4, vocabulary=6, hidden_size=32, num_heads=4, num_classes=10, unique_blocks=2, loops=3, max_loops=8, token_kind="grey"
)
FAMILIES = [(elt.FAMILY, DIFFUSION), (elt_masked.FAMILY, MASKED)]


def loaded(family: Any, params: Any) -> Model:
    """The family with weights large enough that each loop moves its output."""
    module = family.build(params)
    randomize(module, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return Model("tiny", family, params, module.eval().requires_grad_(False), "random")


def answer(model: Model, budget: Budget) -> np.ndarray:
    feeds = model.family.feeds(model.params, budget, 3)
    return np.asarray(model.module(**{name: torch.from_numpy(array) for name, array in feeds.items()}))


@pytest.fixture(scope="module", params=FAMILIES, ids=["diffusion", "masked"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Bundle]:
    model = loaded(*request.param)
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    return model, export_capture(capture(model, {}, Span(1, 4)), "onnx", room("onnx").options(), folder, "elastic-export onnx")


def test_every_count_is_exact_through_onnx_runtime(exported: tuple[Model, Bundle]) -> None:
    pytest.importorskip("onnxruntime")
    model, bundle = exported
    (axis,) = bundle.manifest.axes
    assert (axis.name, axis.span, axis.default, axis.carrier) == ("loops", Span(1, 8), 3, "value")
    before = None
    with open_session(bundle, threads=1) as session:
        for loops in axis.values:
            feeds = model.family.feeds(model.params, Budget(loops=loops), 3)
            (name,) = (spec.name for spec in session.graph.outputs)
            got, wanted = session.run(feeds)[name], answer(model, Budget(loops=loops))
            assert np.abs(got - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())
            assert before is None or np.abs(wanted - before).max() > 1e-2, "a loop that changes nothing proves nothing"
            before = wanted


def test_the_graph_is_one_loop_that_ends_on_its_condition(exported: tuple[Model, Bundle]) -> None:
    _, bundle = exported
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    nodes = onnx.load(str(bundle.file(artifact.path))).graph.node
    (loop,) = (node for node in nodes if node.op_type == "Loop")
    assert loop.input[1], "the condition is wired"
    (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
    assert "loops" in {name for node in body.node for name in node.input} or loop.input[0]


def test_weights_stand_once_whatever_the_span(exported: tuple[Model, Bundle], tmp_path: Path) -> None:
    model, bundle = exported
    once = export_capture(
        capture(model, {"loops": Span(1, 1)}, Span(1, 4)), "onnx", room("onnx").options(), tmp_path / "once", "elastic-export"
    )
    sizes = [next(iter(each.manifest.graphs["denoiser"].artifacts)).files[0].bytes for each in (once, bundle)]
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize(("family", "params"), FAMILIES)
def test_exits_are_the_outputs_of_their_counts(family: Any, params: Any) -> None:
    model = loaded(family, params)
    feeds = {name: torch.from_numpy(array) for name, array in family.feeds(params, Budget(loops=1), 3).items() if name != "loops"}
    for count, output in zip((1, 3, 3, 5), model.module.exits(**feeds, loops=[1, 3, 3, 5]), strict=True):
        np.testing.assert_allclose(output, answer(model, Budget(loops=count)), atol=1e-6)


@pytest.mark.parametrize(("family", "params"), FAMILIES)
def test_parameters_do_not_depend_on_loops_and_are_what_shapes_tell(family: Any, params: Any) -> None:
    weights = family.build(params).state_dict()
    assert {name: value.shape for name, value in family.build(replace(params, loops=1, max_loops=1)).state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    sources = family.sources(weights, {"num_heads": 4, "loops": 3, "max_loops": 8, "token_kind": "grey"})
    assert agree(family, sources, {}) == params
    with pytest.raises(ModelError, match="it lacks"):
        family.sources({"pos_embed": weights["pos_embed"]}, {})
    with pytest.raises(ModelError, match="nothing tells num_heads, loops, max_loops"):
        agree(family, family.sources(weights, {}), {})


def test_checkpoint_keys_are_those_of_the_specification() -> None:
    names = {name.split(".")[0] for name in elt.Elt(DIFFUSION).state_dict()}
    assert names == {"x_embedder", "t_embedder", "y_embedder", "pos_embed", "prelude", "blocks", "coda", "final_layer"}
    assert elt.rename_key("coda.0.adaLN_modulation.1.weight") == "coda.0.modulation.linear.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_loops": 2}, "max_loops 2 is fewer than the 3 loops"),
        ({"loops": 0}, "loops must be at least 1, got 0"),
        ({"prediction": "score"}, "prediction must be v, epsilon, flow, ddpm, ddpm-v, got 'score'"),
        ({"prelude_blocks": -1}, "must be 0 or more, got -1 and 1"),
        ({"num_heads": 3}, "hidden_size 32 must be a multiple of num_heads 3"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio nan leaves no hidden layer"),
    ],
)
def test_sizes_that_make_no_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DIFFUSION, **change)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_masked_model_has_a_hidden_layer(value: float) -> None:
    with pytest.raises(ValueError, match="leaves no hidden layer of a finite size"):
        replace(MASKED, mlp_ratio=value)


def test_prediction_decides_the_schedule() -> None:
    descriptions = {prediction: elt.facts(replace(DIFFUSION, prediction=prediction)) for prediction in elt.PREDICTIONS}
    assert [(facts["prediction"], type(facts["schedule"])) for facts in descriptions.values()] == [
        ("v", ShiftedCosine), ("epsilon", ShiftedCosine), ("velocity", RectifiedFlow), ("epsilon", LinearBeta), ("v", LinearBeta),
    ]  # fmt: skip
    assert descriptions["v"]["schedule"] == ShiftedCosine.at(8)
    assert elt_masked.facts(MASKED)["schedule"] == CosineMask(vocabulary=6)


def test_spans_beyond_the_model_are_refused() -> None:
    model = loaded(*FAMILIES[0])
    for span, message in ((Span(0, 4), "loops 0 is not available: this model offers 1-8"), (Span(2, 9), "loops 9 is not available")):
        with pytest.raises(BudgetError, match=message):
            capture(model, {"loops": span}, Span(1, 4))
    with pytest.raises(BudgetError, match="has no axis 'latents'; it has loops"):
        capture(model, {"latents": Span(1, 4)}, Span(1, 4))


def test_cost_is_that_of_the_blocks_that_run() -> None:
    block = elt.flops(DIFFUSION, 2) - elt.flops(DIFFUSION, 1)
    assert elt.flops(DIFFUSION, 8) == elt.flops(DIFFUSION, 1) + 7 * block
    assert elt.flops(replace(DIFFUSION, prelude_blocks=3), 1) == elt.flops(DIFFUSION, 1) + block  # two blocks make a loop
    tokens, width = MASKED.tokens, MASKED.hidden_size
    linear = 2 * tokens * sum(p.numel() for p in elt_masked.Block(width, 4, 4.0).parameters() if p.ndim == 2)
    assert elt_masked.flops(MASKED, 2) - elt_masked.flops(MASKED, 1) == 2 * (linear + 4 * tokens**2 * width)
    one, eight = (elt.cost(DIFFUSION, Budget(loops=loops), 1000) for loops in (1, 8))
    assert (one.weight_bytes, one.activation_bytes) == (eight.weight_bytes, eight.activation_bytes) == (4000, one.activation_bytes)


@pytest.mark.parametrize(("name", "millions"), [("elt-masked-xl-7x4", 111), ("elt-masked-l-8x3", 101), ("elt-masked-l-12x2", 151)])
def test_masked_presets_have_the_published_size(name: str, millions: float) -> None:
    """N * 12 D^2 weights in the blocks."""
    params = elt_masked.PRESETS[name]
    assert params.unique_blocks * 12 * params.hidden_size**2 / 1e6 == pytest.approx(millions, rel=0.01)
    with torch.device("meta"):
        block = elt_masked.Block(params.hidden_size, params.num_heads, params.mlp_ratio)
    assert sum(p.numel() for p in block.parameters() if p.ndim == 2) == 12 * params.hidden_size**2


def test_a_looped_block_is_the_dit_block() -> None:
    assert all(type(block) is DiTBlock for block in elt.Elt(DIFFUSION).blocks)
    assert set(asdict(DIFFUSION)) >= {"unique_blocks", "loops", "prelude_blocks", "coda_blocks", "prediction"}
