"""`elastic-export coreml` as typed, on a small checkpoint: a bundle that another target made is extended, and proven without a Mac."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import narrow

from elastic_runtime import Bundle
from elastic_runtime.contract.artifacts import CoremlArtifact

pytest.importorskip("coremltools", reason="the Core ML room needs coremltools")
Run = Callable[..., Any]


@pytest.fixture
def model(golden: Path) -> tuple[object, ...]:
    return ("elit-sit", "--checkpoint", golden / "elit-c.pt", "--config", golden / "elit-c.json")


def test_a_bundle_is_extended_verified_and_then_guarded(run: Run, model: tuple[object, ...], bundle_copy: Path) -> None:
    command = ("coreml", *model, "-o", bundle_copy, "--budgets", "16,64")
    done = run(*command)
    assert done.code == 0, done.err
    onnx, coreml = Bundle.open(bundle_copy, hashes=True).manifest.graphs["denoiser"].artifacts
    assert onnx.target == "onnx"
    assert isinstance(coreml, CoremlArtifact)
    assert [(call.function, call.sizes) for call in coreml.calls] == [("latents_16", {"B": 1, "J": 4}), ("latents_64", {"B": 1, "J": 16})]
    rows = sorted((row.budget["latents"], row.passed, row.where.split(",")[0]) for row in coreml.verified)
    assert rows == [(16, True, "MIL evaluator"), (64, True, "MIL evaluator")]
    assert run(*command).code == 2  # it is there already
    assert run("verify", bundle_copy).code == 0
    weights = bundle_copy / coreml.package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)
    broken = run("verify", bundle_copy)
    assert broken.code == 2
    assert "weight.bin is damaged" in broken.err


def test_counts_of_loops_are_budgets_and_an_open_loop_joins_them(run: Run, tmp_path: Path) -> None:
    config, folder = tmp_path / "elt.json", tmp_path / "looped"
    config.write_text(
        json.dumps(
            {
                "grid": 4,
                "vocabulary": 6,
                "hidden_size": 32,
                "num_heads": 4,
                "num_classes": 10,
                "unique_blocks": 1,
                "loops": 3,
                "max_loops": 6,
            }
        )
    )
    command = ("coreml", "elt-masked", "--config", config, "--random-weights", "-o", folder)
    for extra in (("--budgets", "1,4"), ("--shapes", "range")):
        done = run(*command, *extra)
        assert done.code == 0, done.err
    functions, loop = Bundle.open(folder).manifest.graphs["denoiser"].artifacts
    assert isinstance(functions, CoremlArtifact)
    assert isinstance(loop, CoremlArtifact)
    assert [call.function for call in functions.calls] == ["loops_1", "loops_4"]
    assert [row.budget["loops"] for row in functions.verified] == [1, 4]
    assert (loop.package, [call.budget for call in loop.calls]) == ("coreml/denoiser.range.mlpackage", [{}])
    assert {1, 4, 6} <= {row.budget["loops"] for row in loop.verified}  # traced at 3
    assert all(row.passed for row in (*functions.verified, *loop.verified))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--target", "iOS17"), "--target iOS17 is too old for a package of 5 functions, which needs iOS18 or macOS15"),
        (("--latents", "32-256"), "latents 256 is not available: this model offers 4-64"),
        (("--budgets", "16,18"), "latents 18 is not available"),
        (("--budgets", "16", "--shapes", "range"), "--shapes range takes every budget of the span: leave --budgets out"),
        (("--shapes", "range", "--conditions-apart", "--target", "iOS17"), "--target iOS17 is too old for --conditions-apart"),
        (("--shapes", "any"), "--shapes for coreml must be one of functions, enumerated, range, got any"),
    ],
)
def test_bad_requests_end_in_one_line_and_leave_nothing(
    run: Run, model: tuple[object, ...], tmp_path: Path, extra: Any, message: str
) -> None:
    failed = run("coreml", *model, "-o", tmp_path / "out", *extra)
    assert failed.code == 2
    assert message in failed.err
    assert "Traceback" not in failed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("verify", "proven", "left"), narrow([("ends", {16, 64}, {32}), ("none", {64}, {16, 32})]))
def test_budgets_that_are_left_out_are_said_and_the_rest_is_proven(
    verify: str, proven: set[int], left: set[int], run: Run, model: tuple[object, ...], bundle_copy: Path
) -> None:
    """The bundle has the original's answers at 4, 24, 36 and 64 from the export before."""
    done = run("coreml", *model, "-o", bundle_copy, "--budgets", "16,32,64", "--verify", verify)
    assert done.code == 0, done.err
    graph = Bundle.open(bundle_copy).manifest.graphs["denoiser"]
    assert {row.budget["latents"] for row in graph.artifacts[1].verified} == proven
    assert {budget["latents"] for budget in graph.unproven} == left
    assert run("verify", bundle_copy).code == 0
