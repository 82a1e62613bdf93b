"""The loops axis from the command line: export, draw, refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

from conftest import Outcome

from elastic_export.capture.capture import capture
from elastic_export.capture.zoo import Request, load
from elastic_export.exporting import export_capture
from elastic_runtime import Span
from elastic_targets import target as room

Run = Callable[..., Outcome]
SIZES = {"hidden_size": 32, "num_heads": 4, "num_classes": 10, "unique_blocks": 2, "loops": 3, "max_loops": 8}
DIFFUSION = SIZES | {"input_size": 8, "patch_size": 2, "in_channels": 1}
MASKED = SIZES | {"grid": 4, "vocabulary": 6, "token_kind": "grey"}


def made(run: Run, folder: Path, family: str, sizes: dict[str, object], *more: object) -> Outcome:
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(sizes))
    return run("onnx", family, "--config", config, "--random-weights", "-o", folder, "-q", *more)


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights with loops 1-6, made once. Tests must not change it."""
    folder = tmp_path_factory.mktemp("bundles") / "looped"
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(DIFFUSION))
    captured = capture(load(Request("elt", config=config, random_weights=True)), {"loops": Span(1, 6)}, Span(1, 4))
    export_capture(captured, "onnx", room("onnx").options(), folder, "elastic-export onnx elt")
    return folder


def test_one_bundle_draws_at_any_loops_even_other_ones_at_each_step(run: Run, looped: Path, tmp_path: Path) -> None:
    done = run("generate", looped, "-o", tmp_path / "a.png", "--steps", "3", "--loops", "1,3,6", "--guidance-loops", "1", "--json", "-q")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["sampler"] == "ddpm"
    assert [step["budget"]["loops"] for step in record["steps"]] == [1, 3, 6]
    assert [step["guidance_budget"]["loops"] for step in record["steps"]] == [1, 1, 1]
    assert run("generate", looped, "-o", tmp_path / "b.png", "--steps", "2", "--sampler", "ddim", "--loops", "2", "-q").code == 0
    assert "axis loops: 1-6 in steps of 1, default 3" in run("inspect", looped).out


def test_a_masked_model_takes_the_same_axis_and_its_own_sampler(run: Run, tmp_path: Path) -> None:
    exported = made(run, tmp_path / "masked", "elt-masked", MASKED, "--loops", "1-4")
    assert exported.code == 0, exported.err
    assert "axis loops: 1-4" in exported.out
    done = run(
        "generate", tmp_path / "masked", "-o", tmp_path / "a.png", "--steps", "3", "--loops", "2", "--guidance-loops", "1",
        "--temperature", "1", "--json", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["sampler"], record["steps"][0]["budget"]) == ("maskgit", {"loops": 2})
    refused = run("generate", tmp_path / "masked", "-o", tmp_path / "b.png", "--steps", "17", "-q")
    assert (refused.code, "at most 16 steps" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "0"], "loops 0 is not available: this model offers 1-6; the nearest is 1"),
        (["--loops", "7"], "loops 7 is not available: this model offers 1-6; the nearest is 6"),
        (["--loops", "-1"], "numbers are written 7 or 0,3,7 or 0-9, got '-1'"),
        (["--guidance-loops", "9"], "loops 9 is not available"),
        (["--loops", "1,2"], "2 budgets were given for 3 steps"),
        (["--latents", "4"], "this model has no axis 'latents'; it has loops"),
        (["--loops", "1,2,3", "--latents", "4,4"], "--latents has 2 values where another axis has 3"),
        (["--sampler", "euler"], "'euler' does not fit; elt, whose schedule is shifted_cosine, takes ddpm, ddim, ab2, ab3 or dpm++2m"),
        (["--temperature", "1"], "temperature is for masked models; ddpm takes none"),
    ],
)
def test_budgets_that_are_not_offered(run: Run, looped: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("generate", looped, "-o", tmp_path / "a.png", "--steps", "3", "-q", *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("span", "message"), [("0-8", "loops 0 is not available"), ("1-9", "loops 9 is not available"), ("8-1", "is reversed")]
)
def test_spans_that_the_model_does_not_offer(run: Run, tmp_path: Path, span: str, message: str) -> None:
    done = made(run, tmp_path / "out", "elt", DIFFUSION, "--loops", span)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
