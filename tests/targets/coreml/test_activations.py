"""int8 activations: which matrices take them, that scales are what those multiply at most, and that functions share them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elastic_runtime import Axis, Budget, ModelError, Span
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.precision import COMPRESSIONS
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions, Evaluator
from elastic_targets.coreml.options import paths
from elastic_targets.feeds import feeds

WIDTH = 128  # 16384 weights
LOOPS = (Budget(loops=1), Budget(loops=3))


class Looped(nn.Module):
    """A first and a last layer, a matrix of conditions, and one that a loop passes twice as large values each time."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.width = width
        self.first, self.condition, self.middle, self.last = (nn.Linear(width, width, bias=False) for _ in range(4))
        nn.init.orthogonal_(self.middle.weight)
        self.middle.weight.data *= 2

    def forward(self, sample: Tensor, timestep: Tensor, loops: Any) -> Tensor:
        x = self.started(sample, timestep)
        if isinstance(loops, Tensor):
            x, _ = torch._higher_order_ops.while_loop(lambda x, i: i < loops, lambda x, i: (self.middle(x), i + 1), (x, loops * 0))
        else:
            for _ in range(loops):
                x = self.middle(x)
        return self.last(torch.tanh(x))

    def started(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.first(sample) * self.condition(timestep[:, None] * torch.ones(1, self.width))[:, None]  # (B, T, C)


def looped(width: int = WIDTH) -> GraphCapture:
    def fed(budget: Budget, size: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(size, 5, width, generator=generator).numpy()
        return {"sample": sample, "timestep": np.full(size, 0.5, np.float32), "loops": np.array(budget["loops"])}

    torch.manual_seed(0)
    specs = [("sample", "float32", ("B", 5, width)), ("timestep", "float32", ("B",)), ("loops", "int64", ())]
    return GraphCapture(
        name="denoiser", module=Looped(width).eval().requires_grad_(False), batch=Span(1, 4), feeds=fed,
        inputs=tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in specs),  # type: ignore[arg-type]
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", 5, width)),),
        axes=(Axis(name="loops", min=1, max=3, step=1, default=3, input="loops", carrier="value"),),
    )  # fmt: skip


def scales(package: Path) -> dict[str, list[float]]:
    """Scales of the pairs of each function; every pair is whole, and stands before a product by the matrix of the loop."""
    evaluator, values = Evaluator(package), {}
    for name in evaluator.functions:
        blocks, values[name] = [evaluator.program(name)], []
        while blocks:
            for operation in blocks.pop().operations:
                blocks += operation.blocks
                if operation.op_type == "quantize":
                    (pair,) = operation.outputs[0].child_ops
                    assert (pair.op_type, float(pair.scale.val)) == ("dequantize", float(operation.scale.val))
                    values[name].append(float(operation.scale.val))
    return values


def largest(graph: GraphCapture, loops: int) -> float:
    """What the matrix of the loop multiplies at most in so many passes of what scales are made of."""
    module, most = graph.module, 0.0
    for fed in feeds(graph, Budget(loops=loops)):
        x = module.started(torch.from_numpy(fed["sample"]), torch.from_numpy(fed["timestep"]))
        for _ in range(loops):
            most, x = max(most, float(x.abs().max())), module.middle(x)
    return most


def test_functions_that_share_a_matrix_share_its_scale(lowered: Callable[..., Any], error: Any, tmp_path: Path) -> None:
    graph = looped()
    artifact, session = lowered(graph, compression="w8a8", budgets=LOOPS)
    assert (artifact.compression, artifact.package) == ("w8a8", "coreml/denoiser.w8a8.mlpackage")
    assert max(error(graph, session, budget) for budget in LOOPS) < COMPRESSIONS["w8a8"]
    stored = sum(entry.bytes for entry in artifact.files if entry.path.endswith("weight.bin"))
    assert 4 * WIDTH**2 < stored < 1.1 * 4 * WIDTH**2, "a byte a weight, and each matrix once"
    values = scales(tmp_path / artifact.package)
    scale = pytest.approx(largest(graph, 3) / 127, rel=1e-2)
    assert values == {"loops_1": [scale], "loops_3": [scale, scale, scale]}, "the first, the last and the conditions' keep their floats"


def test_a_loop_has_its_pair_inside(lowered: Callable[..., Any], error: Any, tmp_path: Path) -> None:
    graph = looped()
    artifact, session = lowered(graph, compression="w8a8", shapes="range", target="iOS17")
    assert max(error(graph, session, Budget(loops=count)) for count in (1, 2, 3)) < COMPRESSIONS["w8a8"]
    assert scales(tmp_path / artifact.package) == {"main": [pytest.approx(largest(graph, 3) / 127, rel=1e-2)]}


def test_other_graphs_than_a_denoiser_hold_int8_weights_alone() -> None:
    options = CoremlOptions(compression="w8a8")
    assert paths(replace(looped(), name="decoder"), options) == ("coreml/decoder.int8.mlpackage",)
    assert paths(replace(looped(), name="text_encoder"), options) == ("coreml/text_encoder.int8.mlpackage",)


def test_a_model_without_a_matrix_that_is_worth_it_is_refused(lowered: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="finds no matrix of more than 10000 weights that tokens pass.*use --compress int8"):
        lowered(looped(64), compression="w8a8", budgets=LOOPS[:1])
