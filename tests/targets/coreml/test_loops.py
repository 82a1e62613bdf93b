"""A loop count is a value: functions have one each, sharing the blocks' weights, or one function takes it and loops."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

from elastic_export.families import elt, elt_masked
from elastic_export.families.family import Family
from elastic_export.families.layers import randomize
from elastic_runtime import Axis, Budget, BudgetError, Span, UsageError
from elastic_runtime.contract.precision import PRECISIONS
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions, Evaluator
from elastic_targets.coreml.options import budgets, requires

ELT = elt.EltParams(
    input_size=8, patch_size=2, in_channels=4, hidden_size=128, num_heads=4, num_classes=10, unique_blocks=2, loops=3, max_loops=4,
)  # fmt: skip
MASKED = elt_masked.EltMaskedParams(
    grid=4, vocabulary=16, hidden_size=64, num_heads=4, num_classes=10, unique_blocks=2, loops=3, max_loops=4, token_kind="grey",
)  # fmt: skip
COUNTS = tuple(Budget(loops=count) for count in (1, 3, 4))


def captured(family: Family, params: Any) -> GraphCapture:
    module = family.build(params)
    randomize(module, seed=0)
    return GraphCapture(
        name="denoiser", module=module.eval().requires_grad_(False), inputs=family.inputs(params), outputs=family.outputs(params),
        axes=family.axes(params), batch=Span(1, 4), feeds=lambda budget, size: family.feeds(params, budget, size),
    )  # fmt: skip


@pytest.mark.parametrize(("family", "params"), narrow([(elt.FAMILY, ELT), (elt_masked.FAMILY, MASKED)]), ids=["elt", "elt-masked"])
def test_a_function_a_count_agrees_with_torch(
    family: Family, params: Any, lowered: Callable[..., Any], error: Callable[..., float]
) -> None:
    graph = captured(family, params)
    artifact, session = lowered(graph, precision="fp32", budgets=COUNTS)
    assert [call.function for call in artifact.calls] == ["loops_1", "loops_3", "loops_4"]
    assert session.budgets == COUNTS
    assert max(error(graph, session, count) for count in COUNTS) < PRECISIONS["fp32"].tolerance
    # Functions that ignored their count would agree with each other.
    few, many = (session.run(graph.feeds(count, 1))[graph.outputs[0].name] for count in COUNTS[:2])
    assert np.abs(few - many).max() > 1e-4
    with pytest.raises(BudgetError, match=r"was not compiled for .*loops 2; it takes loops=1 "):
        session.run(graph.feeds(Budget(loops=2), 1))


@pytest.mark.parametrize(("family", "params"), narrow([(elt.FAMILY, ELT), (elt_masked.FAMILY, MASKED)]), ids=["elt", "elt-masked"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loop_agrees_with_torch_at_every_count(
    family: Family, params: Any, precision: str, lowered: Callable[..., Any], error: Callable[..., float], tmp_path: Path
) -> None:
    graph = captured(family, params)
    artifact, session = lowered(graph, precision=precision, shapes="range")
    assert (artifact.shapes, [(call.function, call.budget, call.sizes) for call in artifact.calls]) == ("range", [("main", {}, {})])
    assert session.budgets is None
    assert Evaluator(tmp_path / artifact.package).operations("main")["while_loop"] == 1
    counts = [Budget(loops=count) for count in graph.axes[0].values]
    assert max(error(graph, session, count) for count in counts) < PRECISIONS[precision].tolerance
    few, many = (session.run(graph.feeds(count, 1))[graph.outputs[0].name] for count in counts[:2])
    assert np.abs(few - many).max() > 1e-4


def test_conditions_apart_stand_outside_the_loop(lowered: Callable[..., Any], error: Callable[..., float], tmp_path: Path) -> None:
    graph = captured(elt.FAMILY, ELT)
    artifact, session = lowered(graph, precision="fp32", shapes="range", conditions_apart=True)
    evaluator = Evaluator(tmp_path / artifact.package)
    assert [evaluator.operations(name)["while_loop"] for name in ("main", "conditions")] == [1, 0]
    assert artifact.conditions.gone == ("timestep", "class_labels")
    assert max(error(graph, session, count) for count in COUNTS[::2]) < PRECISIONS["fp32"].tolerance


def test_the_blocks_weights_stand_once_in_functions_and_around_a_loop(lowered: Callable[..., Any]) -> None:
    graph = captured(elt.FAMILY, ELT)

    def weights(**options: Any) -> int:
        return sum(file.bytes for file in lowered(graph, **options)[0].files if file.path.endswith("weight.bin"))

    one = weights(budgets=COUNTS[:1])
    assert weights(budgets=COUNTS) < 1.1 * one
    assert weights(shapes="range") < 1.01 * one
    assert weights(shapes="range", compression="int8") < 0.6 * one


def test_a_span_of_one_count_needs_no_loop(lowered: Callable[..., Any], error: Callable[..., float], tmp_path: Path) -> None:
    graph = captured(elt_masked.FAMILY, MASKED)
    graph = replace(graph, axes=(graph.axes[0].narrow(Span(3, 3)),))
    artifact, session = lowered(graph, precision="fp32", shapes="range")
    assert [(call.function, call.sizes["loops"]) for call in artifact.calls] == [("main", 3)]
    assert Evaluator(tmp_path / artifact.package).operations("main")["while_loop"] == 0
    assert error(graph, session, Budget(loops=3)) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": "enumerated"}, "enumerated lists lengths, and loops is carried by a value: use --shapes functions or range"),
        ({"shapes": "range", "budgets": COUNTS}, "--shapes range takes every budget of the span: leave --budgets out"),
        ({"budgets": (1, 9)}, "loops 9 is not available: this model offers 1-4"),
        ({"budgets": (0, 1)}, "loops 0 is not available: this model offers 1-4"),
    ],
)
def test_what_a_loop_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        requires(captured(elt.FAMILY, ELT), CoremlOptions(**options))


def test_a_number_is_a_value_of_the_one_axis() -> None:
    graph = captured(elt_masked.FAMILY, MASKED)
    assert budgets(graph, CoremlOptions(budgets=(4, 1, 4))) == [Budget(loops=1), Budget(loops=4)]
    latents = Axis(name="latents", min=4, max=16, step=4, default=16, input="latent_ids", carrier="length", unit=4, dimension="J")
    with pytest.raises(UsageError, match="--budgets takes values of one axis, and this model has loops and latents"):
        requires(replace(graph, axes=(*graph.axes, latents)), CoremlOptions(budgets=(4,)))
