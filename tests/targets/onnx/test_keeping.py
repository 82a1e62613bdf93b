"""Matrices that keep their floats: those whose rounding moves the graph's answers most."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few_bits import over_tokens

torch = pytest.importorskip("torch", reason="exporting needs torch")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

from elastic_runtime import Budget, UsageError  # noqa: E402
from elastic_targets.onnx import OnnxOptions, stream  # noqa: E402
from elastic_targets.onnx.lower import TARGET, lower  # noqa: E402

WIDTH = 96


class Uneven(torch.nn.Module):  # type: ignore[misc]
    """Two matrices of the same size and the same values: what comes of `quiet` hardly reaches the answer, of `loud` all does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.quiet, self.loud, self.last = (
            torch.nn.Linear(*ends) for ends in ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 64))
        )
        self.loud.load_state_dict(self.quiet.state_dict())

    def forward(self, sample: Any, timestep: Any) -> Any:
        hidden = torch.tanh(self.first(sample) + timestep[:, None, None])
        return self.last(torch.tanh(self.quiet(hidden)) / 100 + torch.tanh(self.loud(hidden.sin())))


def uneven() -> Any:
    return over_tokens(Uneven())


@pytest.mark.parametrize("precision", ["int8", "int4w"])
def test_what_costs_most_keeps_its_floats(precision: str, tmp_path: Path) -> None:
    graph, progress = uneven(), list[Any]()
    errors, sizes = [], []
    feeds = graph.feeds(Budget(S=32), 2)
    with torch.no_grad():
        wanted = graph.module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    for keep in (0, 1):
        (artifact,) = lower(graph, OnnxOptions(precision=precision, keep=keep), tmp_path / str(keep), lambda *words: progress.append(words))
        assert artifact.float_matrices == ("loud.weight",)[:keep]
        assert artifact.held == (f"{precision}, 1 in floats" if keep else precision)
        (prediction,) = onnxruntime.InferenceSession(str(tmp_path / str(keep) / artifact.path)).run(None, feeds)
        errors.append(np.square(prediction - wanted).mean())
        sizes.append(artifact.files[0].bytes)
    assert errors[1] < 1e-2 * errors[0]
    assert sizes[1] - sizes[0] == pytest.approx(WIDTH * WIDTH * (4 - (1 if precision == "int8" else 0.625)), rel=0.05)
    assert ("weighing matrices", 2, 2) in progress


def test_a_large_weight_has_its_name_though_the_graph_turns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SMALL", 0)
    (artifact,) = lower(uneven(), OnnxOptions(precision="int8", keep=1), tmp_path)
    assert artifact.float_matrices == ("loud.weight",)


def test_what_is_kept_is_not_rounded_by_what_it_multiplies_either(tmp_path: Path) -> None:
    (artifact,) = lower(uneven(), OnnxOptions(precision="int4w", rounding="gptq", keep=1), tmp_path)
    assert artifact.held == "int4w, gptq, 1 in floats"
    model = onnx.load(tmp_path / artifact.path)
    assert [node.op_type for node in model.graph.node if "MatMul" in node.op_type].count("MatMulNBits") == 1


def test_what_floats_take_is_told_before() -> None:
    sizes = [TARGET.estimate(uneven(), OnnxOptions(precision="int8", keep=keep)).file_bytes for keep in (0, 1)]  # type: ignore[misc]
    assert sizes[1] - sizes[0] == pytest.approx(3 * WIDTH * WIDTH, rel=0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"keep": -1, "precision": "int8"}, "a whole number from 0, got -1"),
        ({"keep": True, "precision": "int8"}, "a whole number from 0, got True"),
        ({"keep": 2}, "--keep 2 is for a denoiser in int8, int8w, int4w, and this one's precision is fp32"),
        ({"keep": 2, "precision": "fp8"}, "this one's precision is fp8"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TARGET.requires(uneven(), OnnxOptions(**words))


def test_something_is_left_to_round(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--keep 2 leaves nothing in int8 of this denoiser, which has 2 matrices: keep fewer"):
        lower(uneven(), OnnxOptions(precision="int8", keep=2), tmp_path)
