"""A loop count is a value, and Core ML takes no scalars: each function has its own count, and all of them share the blocks' weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_export.models import elt, elt_masked
from elastic_export.models.family import Family
from elastic_export.models.layers import randomize
from elastic_runtime import Budget, BudgetError, Span, UsageError
from elastic_runtime.reference import TOLERANCE
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions, requires

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


@pytest.mark.parametrize(("family", "params"), [(elt.FAMILY, ELT), (elt_masked.FAMILY, MASKED)], ids=["elt", "elt-masked"])
def test_a_function_a_count_agrees_with_torch(
    family: Family, params: Any, lowered: Callable[..., Any], error: Callable[..., float]
) -> None:
    graph = captured(family, params)
    artifact, session = lowered(graph, precision="fp32", budgets=COUNTS)
    assert [call.function for call in artifact.calls] == ["loops_1", "loops_3", "loops_4"]
    assert session.budgets == COUNTS
    assert max(error(graph, session, count) for count in COUNTS) < TOLERANCE["fp32"]
    # Functions that ignored their count would agree with each other.
    few, many = (session.run(graph.feeds(count, 1))[graph.outputs[0].name] for count in COUNTS[:2])
    assert np.abs(few - many).max() > 1e-4
    with pytest.raises(BudgetError, match=r"was not compiled for .*loops 2; it takes loops=1 "):
        session.run(graph.feeds(Budget(loops=2), 1))


def test_functions_share_the_blocks_weights(lowered: Callable[..., Any], tmp_path: Path) -> None:
    graph = captured(elt.FAMILY, ELT)
    one = lowered(graph, budgets=COUNTS[2:])[0]
    three = lowered(graph, budgets=COUNTS)[0]
    weights = [sum(file.bytes for file in artifact.files if file.path.endswith("weight.bin")) for artifact in (one, three)]
    assert weights[1] < 1.1 * weights[0]


def test_open_shapes_are_refused_since_a_value_opens_none() -> None:
    for shapes in ("range", "enumerated"):
        with pytest.raises(UsageError, match=f"--shapes {shapes} opens lengths, and loops is carried by a value: use --shapes functions"):
            requires(captured(elt.FAMILY, ELT), CoremlOptions(shapes=shapes))
