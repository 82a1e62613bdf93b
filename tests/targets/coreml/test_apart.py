"""A denoiser whose conditions are a function of their own: its program is cut, and both halves run as one, at every shape and precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import narrow
from torch import Tensor, nn
from torch.nn import functional

from elastic_runtime import Axis, Budget, Span, UsageError
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.precision import COMPRESSIONS, PRECISIONS
from elastic_runtime.sessions.apart import ROWS, ApartSession
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions, Evaluator
from elastic_targets.coreml.apart import Halves, split
from elastic_targets.coreml.options import denoising, paths, requires

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of what it decomposes
WIDTH = 128  # 16384 weights a matrix: few, and enough to be compressed
FEW, ALL = Budget(tokens=2), Budget(tokens=5)


class Modulated(nn.Module):
    """A block that tokens pass twice, shifted and scaled by what is made of time and class."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label, self.modulation = nn.Linear(2, WIDTH), nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.first, self.middle, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        x = self.first(sample)  # (B, S, D)
        c = self.time(torch.stack([timestep.sin(), timestep.cos()], 1)) + self.label(class_labels)  # (B, D)
        for _ in range(2):
            shift, scale = self.modulation(functional.silu(c))[:, None].chunk(2, -1)  # (B, 1, D)
            x = x + self.middle(torch.tanh(x) * (1 + scale) + shift)
        return self.last(x)


def modulated() -> GraphCapture:
    def fed(budget: Budget, size: int) -> dict[str, Any]:
        generator = np.random.default_rng(0)
        sample = generator.standard_normal((size, ALL["tokens"], WIDTH)).astype(np.float32)[:, : budget["tokens"]]
        times = np.linspace(0.9, 0.1, size, dtype=np.float32)
        return {"sample": sample, "timestep": times, "class_labels": np.arange(size, dtype=np.int64) % 11}

    torch.manual_seed(0)
    specs = [("sample", "float32", ("B", "S", WIDTH)), ("timestep", "float32", ("B",)), ("class_labels", "int64", ("B",))]
    return GraphCapture(
        name="denoiser", module=Modulated().eval().requires_grad_(False), batch=Span(1, 4), feeds=fed,
        inputs=tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in specs),  # type: ignore[arg-type]
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", "S", WIDTH)),),
        axes=(Axis(name="tokens", min=2, max=5, step=1, default=5, input="sample", carrier="shape", dimension="S"),),
    )  # fmt: skip


def weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("weight.bin"))


@pytest.mark.parametrize(
    ("shapes", "functions"),
    narrow([("functions", ["tokens_2", "tokens_5"]), ("enumerated", ["main"]), ("range", ["main"])]),
)
def test_both_halves_are_the_whole_in_every_kind_of_shapes(
    lowered: Callable[..., Any], error: Callable[..., float], tmp_path: Path, shapes: str, functions: list[str]
) -> None:
    graph, budgets = modulated(), () if shapes == "range" else (FEW, ALL)
    artifact, session = lowered(graph, precision="fp32", shapes=shapes, budgets=budgets, conditions_apart=True)
    assert isinstance(session, ApartSession)
    assert list(dict.fromkeys(call.function for call in artifact.calls)) == functions
    apart = artifact.conditions
    assert (apart.path, apart.call.function, apart.call.sizes) == (artifact.path, "conditions", {"B": ROWS})
    assert (apart.inputs, apart.gone) == (("timestep", "class_labels"),) * 2
    assert apart.outputs[0].shape == ("B", 2 * WIDTH)  # the block's, once
    assert max(error(graph, session, budget) for budget in (FEW, Budget(tokens=3), ALL)[:: 1 if shapes == "range" else 2]) < 1e-6
    stored = 4 * sum(tensor.numel() for tensor in graph.module.parameters())
    assert weights(tmp_path) < stored + 10_000  # each once, whatever has it
    assert sorted(Evaluator(tmp_path / artifact.path).functions) == sorted(["conditions", *functions])


@pytest.mark.parametrize("compression", narrow(["int4", None, "palette4", "int8", "w8a8"]))
def test_fp16_and_fewer_bits_stay_within_their_bounds(
    lowered: Callable[..., Any], error: Callable[..., float], tmp_path: Path, compression: str | None
) -> None:
    graph = modulated()
    artifact, session = lowered(graph, budgets=(ALL,), compression=compression, conditions_apart=True)
    bound = COMPRESSIONS[compression] if compression else PRECISIONS["fp16"].tolerance
    assert 1e-5 < error(graph, session, ALL) < bound
    halves = 2 * sum(tensor.numel() for tensor in graph.module.parameters())
    assert weights(tmp_path) < (0.75 if compression else 1.02) * halves
    evaluator = Evaluator(tmp_path / artifact.path)
    # Activations of the block's matrix alone, in both passes; a row of conditions is none, in eight either.
    pairs = [evaluator.operations(name)["quantize"] for name in ("main", "conditions")]
    assert pairs == ([2, 0] if compression == "w8a8" else [0, 0])


def test_conditions_are_computed_in_runs_of_eight_ahead_of_their_steps(lowered: Callable[..., Any]) -> None:
    graph = modulated()
    _, session = lowered(graph, precision="fp32", budgets=(ALL,), conditions_apart=True)
    runs, times, evaluator = list[str](), np.linspace(1, 0.1, 8).astype(np.float32), Evaluator.run

    def counted(self: Evaluator, function: str, feeds: Any) -> Any:
        runs.append(f"{function} {len(feeds.get('timestep', feeds.get('sample')))}")
        return evaluator(self, function, feeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "run", counted)
        session.foresee(times)
        for time in times[:3]:
            session.run(graph.feeds(ALL, 1) | {"timestep": time[None]})
    assert runs == ["conditions 8", *["main 1"] * 3]


def test_the_option_is_for_a_denoiser_and_for_systems_that_have_functions() -> None:
    graph, options = modulated(), CoremlOptions(conditions_apart=True, shapes="range")
    requires(graph, options)
    assert paths(graph, options) == ("coreml/denoiser.range.apart.mlpackage",)
    assert (denoising(options), denoising(CoremlOptions())) == (["--conditions-apart"], [])
    with pytest.raises(UsageError, match="--target iOS17 is too old for --conditions-apart, .* which needs iOS18 or macOS15"):
        requires(graph, CoremlOptions(conditions_apart=True, shapes="range", target="iOS17"))


def halves(body: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> tuple[Halves, Tensor]:
    """What becomes of a sample (8, 4) and its times, with a matrix (4, 4) and a row (1, 4); and that both halves are the whole."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.row = nn.Linear(4, 4), nn.Linear(1, 4, bias=False)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return body(self, sample, timestep)

    torch.manual_seed(0)
    module, feeds = Whole(), {"sample": torch.randn(8, 4), "timestep": torch.rand(8)}
    specs = (TensorSpec(name="sample", dtype="float32", shape=("B", 4)), TensorSpec(name="timestep", dtype="float32", shape=("B",)))
    with torch.no_grad():
        made = split(torch.export.export(module, (), feeds), specs, "coreml/d.mlpackage")
        left = made.left({name: value.numpy() for name, value in feeds.items()})
        (prediction,) = made.rest(**{name: torch.from_numpy(array) for name, array in left.items()})
        torch.testing.assert_close(prediction, module(**feeds))
    assert [spec.name for spec in made.apart.rest(specs)] == list(left)
    return made, prediction


def test_what_the_rest_needs_itself_stays_its_input() -> None:
    made, _ = halves(lambda module, sample, timestep: sample * timestep.sin()[:, None] + module.row(timestep[:, None]))  # type: ignore[operator]
    assert (made.apart.inputs, made.apart.gone) == (("timestep",), ())


def test_weights_stand_in_the_half_that_needs_them_and_other_types_pass_as_floats() -> None:
    """The middle of a sum of conditions is cut, too, where the sample needs it: as whole numbers, and of three dimensions."""

    def body(module: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        places = (timestep * 10).long()[:, None, None]  # (B, 1, 1)
        return module.matrix(sample) + module.row(places[:, 0].float()) + torch.where(places[:, 0] > 5, 1.0, 0.0)

    made, _ = halves(body)
    assert made.apart.outputs[0].shape == ("B", 5)
    assert {name for name, _ in made.rest.named_parameters()} == {"matrix.weight", "matrix.bias"}
    assert {name for name, _ in made.conditions.named_parameters()} == {"row.weight"}


def test_one_of_several_values_may_be_what_the_rest_takes() -> None:
    def body(module: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        first, second = torch.stack([timestep, timestep.sin()], 1).chunk(2, 1)
        return sample * first + module.row(second)

    assert halves(body)[0].apart.outputs[0].shape == ("B", 5)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda module, sample, timestep: module.matrix(sample) * timestep[:, None], "has no weights for its conditions alone"),
        (lambda module, sample, timestep: module.row(timestep[:, None]), "of its conditions alone, which two parts cannot"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(body: Any, why: str) -> None:
    with pytest.raises(UsageError, match=f"{why}.*leave --conditions-apart out"):
        halves(body)
