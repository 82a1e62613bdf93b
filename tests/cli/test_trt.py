"""`elastic-export trt` as it is typed."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_runtime.errors import InferenceError

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs tensorrt-rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_bundle_gains_engines_and_inspect_shows_their_profiles(run: Run, bundle_copy: Path) -> None:
    made = run("trt", bundle_copy, "--sm", "86,89", "--latents", "32-64", "--buckets", "none", "-q")
    assert made.code == 0, made.err
    shown = run("inspect", bundle_copy)
    assert "trt/denoiser.sm86-89.tensorrt_rtx-" in shown.out
    assert "profile 0: B 1-4 (best 2), J 8-16 (best 16)" in shown.out
    assert "was not verified: trt: the engine is for sm 86, 89" in shown.err or "max abs" in shown.out
    again = run("trt", bundle_copy, "--sm", "86,89", "--latents", "32-64", "--buckets", "none", "-q")
    assert again.code == 2
    assert "exists: choose another -o/--output, or replace it with --overwrite" in again.err


def test_a_model_is_exported_and_built_in_one_go(run: Run, golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="exporting needs torch")
    source = ("elit-sit", "--checkpoint", golden / "elit-c.pt", "--config", golden / "elit-c.json")
    done = run("trt", *source, "-o", tmp_path / "out", "--latents", "32-64", "--buckets", "32,64", "--sm", "89", "--json", "-q")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["schema"] == "elastic-export/trt/1"
    onnx, engine = result["manifest"]["graphs"]["denoiser"]["artifacts"]
    assert (onnx["target"], engine["target"], engine["sms"]) == ("onnx", "trt", [89])
    assert [profile["dimensions"]["J"]["max"] for profile in engine["profiles"]] == [8, 16]
    assert all(row["passed"] for row in onnx["verified"])


@pytest.mark.parametrize("words", [("--buckets", "32", "--sm", "89"), ("--sm", "89")])
def test_a_model_whose_engines_cannot_be_built_leaves_the_old_bundle(
    words: tuple[str, ...], run: Run, golden: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="exporting needs torch")

    def fails(*_: object, **__: object) -> None:
        raise InferenceError("the builder gave up")

    monkeypatch.setattr(importlib.import_module("elastic_targets.trt.lower"), "build", fails)

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in bundle_copy.rglob("*") if path.is_file()}

    before = files()
    source = ("elit-sit", "--checkpoint", golden / "elit-c.pt", "--config", golden / "elit-c.json", "--latents", "32-64")
    done = run("trt", *source, "-o", bundle_copy, *words, "--overwrite", "-q")
    assert done.code != 0
    assert ("the last bucket is 32" if "--buckets" in words else "the builder gave up") in " ".join(done.err.split())
    assert files() == before


def test_a_dry_run_of_a_model_reads_the_buckets(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="a model is read with torch")
    done = run("trt", "elit-mnist", "-o", tmp_path / "b", "--buckets", "7", "--dry-run")
    assert (done.code, "the last bucket is 7" in done.err or "7" in done.err) == (2, True)
    assert not (tmp_path / "b").exists()


def test_a_dry_run_says_what_would_be_built_and_for_how_long(run: Run, bundle_copy: Path) -> None:
    before = sorted(bundle_copy.rglob("*"))
    outcome = run("trt", bundle_copy, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "would build trt/denoiser.sm80-86-89-120-121.tensorrt_rtx-" in outcome.out
    assert " s (826 layers)" in outcome.out or " layers)" in outcome.out
    assert "profile 3: B 1-4 (best 2), J 9-16 (best 16)" in outcome.out
    plan = json.loads(run("trt", bundle_copy, "--dry-run", "--json").out)["plans"][0]
    assert plan["seconds"] > 0
    assert sorted(bundle_copy.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--sm", "87"), 2, "does not build for sm 87 here; it builds for 75, 80, 86, 89, 120"),
        (("--sm", "x"), 2, "numbers are written"),
        (("--latents", "32-512"), 2, "latents 512 is not available: this model offers 4-64 in steps of 4; the nearest is 64"),
        (("--buckets", "3x"), 2, "--buckets is written 32,64,128"),
        (
            ("--precision", "bf16"),
            2,
            "has no bf16 ONNX artifact of 'denoiser'; it has fp32. Add one with: elastic-export onnx MODEL --precision bf16",
        ),
        (("--precision", "fp8", "--sm", "80,89"), 2, "fp8 needs a GPU of sm 89 or later, got sm 80: leave it out of --sm, or choose"),
        (("--precision", "nvfp4", "--sm", "86,89"), 2, "needs a GPU of sm 100 or later, got sm 86, 89: leave them out of --sm"),
        (("--precision", "int8"), 2, "for TensorRT choose int8qdq"),
        (("--checkpoint", "w.pt"), 2, "is a bundle and has its weights"),
        (("--opset", "20"), 2, "--opset is for a MODEL that is exported to ONNX first, and"),
        (("--verify", "ends"), 2, "--verify is for a MODEL that is exported to ONNX first, and"),
        (("--builder", "nvcc"), 2, "--builder must be one of auto, rtx, tensorrt"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_its_exit_code(
    run: Run, bundle_copy: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = run("trt", bundle_copy, *arguments)
    assert done.code == code
    assert message in " ".join(done.err.split())
    assert not (bundle_copy / "trt").exists()


def test_a_bundle_that_another_run_writes_is_refused_at_once(run: Run, bundle_copy: Path) -> None:
    """Whichever command holds it, and whichever comes."""
    from elastic_runtime.files.folder import writing

    with writing(bundle_copy):
        before = (bundle_copy / "elastic.json").read_bytes()
        for command in (("trt", bundle_copy, "--sm", "86"), ("onnx", "elit-mnist", "-o", bundle_copy, "--overwrite")):
            done = run(*command, "-q")
            assert done.code == 2, done.err
            assert "is being written by another run; wait for it, or choose another -o/--output" in " ".join(done.err.split())
        assert run("inspect", bundle_copy).code == 0
    assert (bundle_copy / "elastic.json").read_bytes() == before


@pytest.mark.parametrize("arguments", [("--sm", "86"), ("--opset", "20")])
def test_a_model_is_not_exported_first_for_what_no_engine_is_built_of(run: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run("trt", "elit-mnist", "-o", tmp_path / "b", "--precision", "nvfp4", *arguments)
    assert (done.code, "needs" in done.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
