"""Matrices rounded by what they multiply: what is seen of the model, whole or in parts, and what comes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few_bits import over_tokens, unpacked

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import onnx_ir as ir  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

import elastic_export  # noqa: E402
from elastic_runtime import Budget, ModelError, Span, UsageError  # noqa: E402
from elastic_runtime.contract.precision import PRECISIONS  # noqa: E402
from elastic_targets.onnx import OnnxOptions, fitting  # noqa: E402
from elastic_targets.onnx.lower import TARGET, lower  # noqa: E402
from elastic_targets.onnx.matrices import Matrix  # noqa: E402
from elastic_targets.onnx.quantize import quantize  # noqa: E402
from elastic_targets.onnx.rounding import blocks, compensated, slabs  # noqa: E402

WIDTH, ROUNDS = 96, 3


def model(loop: bool = False, scale: float = 1.0) -> Any:
    """x by `w` -> Tanh -> by `a` -> Tanh -> by `b`, where `loop` says so `ROUNDS` times over; the middle is the layer that is rounded."""
    draw = np.random.default_rng(0)
    few = draw.standard_normal((WIDTH, 8)) @ draw.standard_normal((8, WIDTH))  # so that columns go together
    weights = {"w": few * scale, "a": draw.standard_normal((WIDTH, WIDTH)) / 10, "b": draw.standard_normal((WIDTH, WIDTH)) / 10}
    held = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    inner = [
        helper.make_node("Tanh", ["carried" if loop else "first"], ["bent"]),
        helper.make_node("MatMul", ["bent", "a"], ["middle"]),
        helper.make_node("Tanh", ["middle"], ["carries" if loop else "second"]),
    ]
    if loop:
        held.append(numpy_helper.from_array(np.array(ROUNDS), "rounds"))
        ports = [
            helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("on", 9, []),
            helper.make_tensor_value_info("carried", 1, ["m", WIDTH]),
        ]  # fmt: skip
        gives = [helper.make_tensor_value_info("goes", 9, []), helper.make_tensor_value_info("carries", 1, ["m", WIDTH])]
        body = helper.make_graph([*inner, helper.make_node("Identity", ["on"], ["goes"])], "body", ports, gives)
        inner = [helper.make_node("Loop", ["rounds", "", "first"], ["second"], body=body)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["first"]), *inner, helper.make_node("MatMul", ["second", "b"], ["y"])]
    ends = [helper.make_tensor_value_info(name, 1, ["m", WIDTH]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def run(made: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString()).run(None, {"x": x})[0])


RUNS = [{"x": np.random.default_rng(seed).standard_normal((200 + seed, WIDTH)).astype(np.float32)} for seed in range(4)]


def middle(made: Any) -> Matrix:
    (node,) = (node for node in made.graph.all_nodes() if node.op_type == "MatMul" and node.inputs[1].name == "a")
    return Matrix(node, node.inputs[1], False, None)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("part", [1, 1 << 30])
def test_a_matrix_is_fitted_to_all_that_it_multiplies(loop: bool, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop's body to what it multiplies in every round; in parts of a node each, and whole."""
    monkeypatch.setattr(fitting, "PART", part)
    made = model(loop)
    matrix = middle(made)
    seen = []
    for feed in RUNS:
        held = feed["x"] @ made.graph.initializers["w"].const_value.numpy()
        for _ in range(ROUNDS if loop else 1):
            seen.append(np.tanh(held))
            held = np.tanh(seen[-1] @ matrix.read().T)
    inputs = np.concatenate(seen)
    progress: list[tuple[Any, ...]] = []
    fitted = fitting.fitted(made, [matrix], 4, RUNS, tmp_path, lambda *words: progress.append(words))
    assert progress == [("rounding", 1, 1)]
    grams = [inputs[:, each].T @ inputs[:, each] for each in slabs(WIDTH, 32)]
    error, wanted, nearest = (
        np.square(inputs @ (unpacked(*each, 4, WIDTH) - matrix.read()).T).sum()
        for each in (fitted["a"](), compensated(matrix.read(), grams, 4, 32), blocks(matrix.read(), 4, 32))
    )
    assert error == pytest.approx(wanted, rel=0.05)  # sums in another order may tip a weight over
    assert error < 0.5 * nearest


@pytest.mark.parametrize("loop", [False, True])
def test_the_whole_graph_is_nearer_with_what_was_fitted(loop: bool, tmp_path: Path) -> None:
    exact, nearest, fitted = model(loop), model(loop), model(loop)
    quantize(nearest, "int4w")
    quantize(fitted, "int4w", lambda *given: fitting.fitted(*given, runs=RUNS, folder=tmp_path))
    assert [node.op_type for node in fitted.graph.all_nodes()].count("MatMulNBits") == 1
    new = np.random.default_rng(9).standard_normal((50, WIDTH)).astype(np.float32)
    off, before = (np.square(run(each, new) - run(exact, new)).mean() for each in (fitted, nearest))
    assert off < 0.6 * before


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    broken = model()
    feed = {"x": np.full((2, WIDTH), np.nan, np.float32)}
    with pytest.raises(ModelError, match="a multiplies values that are not finite, .* use --rounding nearest"):
        fitting.fitted(broken, [middle(broken)], 4, [feed], tmp_path)


class Bent(torch.nn.Module):
    """Three layers, of which the middle one is neither the first nor the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*sizes) for sizes in ((64, 8), (8, WIDTH), (WIDTH, WIDTH), (WIDTH, 64)))

    def forward(self, sample: Any, timestep: Any) -> Any:
        first, second, middle, last = self.layers
        return last(torch.tanh(middle(torch.tanh(second(first(sample)) * timestep[:, None, None]))))


class Told(Bent):
    """It multiplies by its conditions alone, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conditions = torch.nn.Linear(1, 64)

    def forward(self, sample: Any, timestep: Any) -> Any:
        return super().forward(sample * self.conditions(timestep[:, None])[:, None], timestep)


def bent(module: torch.nn.Module | None = None) -> Any:
    return over_tokens(module or Bent())


def test_a_denoiser_is_fitted_at_every_size_of_what_it_takes(tmp_path: Path) -> None:
    graph = bent()
    runs = fitting.feeds(graph)
    assert [run["sample"].shape[:2] for run in runs] == [(2, 4), (2, 17), (2, 32)] * 2
    assert len({float(time) for run in runs for time in run["timestep"]}) == 12
    feeds = {name: array[12:] for name, array in graph.feeds(Budget(S=32), 20).items()}  # which nothing was fitted to
    with torch.no_grad():
        wanted = graph.module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    off = []
    for rounding in ("nearest", "gptq"):
        (artifact,) = lower(graph, OnnxOptions(precision="int4w", rounding=rounding), tmp_path / rounding)
        assert [path.name for path in (tmp_path / rounding / "onnx").iterdir()] == ["denoiser.int4w.onnx"]  # nothing is left behind
        assert artifact.weight_rounding == rounding
        (prediction,) = onnxruntime.InferenceSession(str(tmp_path / rounding / artifact.path)).run(None, feeds)
        off.append(np.square(prediction - wanted).mean())
    assert off[1] < 0.5 * off[0]


def test_what_waits_on_disk_and_stands_in_memory_is_told_before() -> None:
    graph = bent()
    estimates = {
        rounding: TARGET.estimate(graph, OnnxOptions(precision="int4w", rounding=rounding))  # type: ignore[misc]
        for rounding in ("nearest", "gptq")
    }
    assert estimates["gptq"].file_bytes == estimates["nearest"].file_bytes
    waiting = [each.waiting_bytes for each in estimates.values()]
    assert waiting == [0, round((WIDTH * WIDTH + 64 * WIDTH) * PRECISIONS["int4w"].weight_bytes)]
    assert estimates["gptq"].peak_bytes > estimates["nearest"].peak_bytes


def test_two_files_hold_what_was_fitted_in_one(tmp_path: Path) -> None:
    graph = bent(Told())
    (whole,), (apart,) = (
        lower(graph, OnnxOptions(precision="int4w", rounding="gptq", conditions_apart=each), tmp_path) for each in (False, True)
    )
    assert apart.conditions
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        Path(each).name for each in (whole.path, apart.path, apart.conditions.path)
    }
    feeds = graph.feeds(Budget(S=32), 2)
    one, two, own = (onnxruntime.InferenceSession(str(tmp_path / each)) for each in (whole.path, apart.path, apart.conditions.path))
    (row,) = own.run(None, {name: feeds[name] for name in apart.conditions.inputs})
    given = {name: array for name, array in feeds.items() if name not in apart.conditions.gone} | {apart.conditions.outputs[0].name: row}
    np.testing.assert_allclose(two.run(None, given)[0], one.run(None, feeds)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rounding": "hqq"}, "--rounding must be one of nearest, gptq, got hqq"),
        ({"rounding": "gptq"}, "--rounding gptq is for a denoiser in int8w or int4w, and this one's precision is fp32"),
        ({"rounding": "gptq", "precision": "int8"}, "and this one's precision is int8"),
        ({"rounding": "gptq", "precision": "fp8"}, "and this one's precision is fp8"),
        ({"rounding": "gptq", "precision": "text=int4w"}, "and this one's precision is fp32"),
    ],
)
def test_a_rounding_that_does_not_fit_is_refused(words: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        elastic_export.export("elit-mnist", output=tmp_path / "b", **words)


@pytest.mark.parametrize(
    ("batch", "rows", "sizes"), [((1, 4), 12, [4, 4, 4]), ((4, 4), 6, [4, 4, 4]), ((8, 8), 12, [8, 8, 8]), ((1, 1), 6, [1] * 6)]
)
def test_runs_have_a_batch_that_the_graph_takes_and_every_budget_has_one(batch: tuple[int, int], rows: int, sizes: list[int]) -> None:
    graph = replace(over_tokens(torch.nn.Identity()), batch=Span(*batch))
    runs = fitting.feeds(graph, rows)
    assert [len(run["sample"]) for run in runs] == sizes
    assert len({run["sample"].shape[1] for run in runs}) == 3
