"""The checks for a GPU machine, in the form that needs no GPU: what travels comes back byte for byte, and each check gives its rows."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from elastic_runtime import Bundle

KIT = Path(__file__).parents[2] / "samples" / "checks" / "gpu"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packaged sample's bundle in two precisions."""
    pytest.importorskip("onnxscript", reason="exporting needs the torch extra")
    import elastic_export

    folder = tmp_path_factory.mktemp("gpu") / "masked"
    for precision in ("fp32", "fp16"):
        elastic_export.export("elt-mnist-masked", output=folder, loops="1-2", precision=precision)
    return folder


def run(program: str, results: Path, *arguments: str, seconds: int = 600) -> list[dict[str, Any]]:
    """Rows of every table that a check wrote."""
    environment = os.environ | {"CHECK_DEVICE": "cpu", "RESULTS": str(results), "LIMIT_S": str(seconds), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, KIT / program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for path in sorted(results.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_a_bundle_travels_without_its_weights(exported: Path, tmp_path: Path) -> None:
    hollow = tmp_path / "hollow"
    run("hollow.py", tmp_path, "strip", str(exported), str(hollow))
    whole, packed = (sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in (exported, hollow))
    assert packed < 0.5 * whole
    assert not list(hollow.rglob("*.onnx"))
    run("hollow.py", tmp_path, "fill", str(hollow))
    bundle = Bundle.open(hollow)
    for file in bundle.manifest.files():
        bundle.check(file, hashes=True)


def test_sessions_are_held_against_the_reference_and_timed(exported: Path, tmp_path: Path) -> None:
    rows = run("sessions.py", tmp_path, str(exported))
    for check in ("plain", "captured", "replayed"):
        proven = [row for row in rows if row["check"] == check]
        assert {row["precision"] for row in proven} == {"fp32", "fp16"}
        assert all(row["passed"] for row in proven)
    assert all(row["ms"] > 0 for row in rows if row["check"].startswith("time"))
    assert not [row for row in rows if row["check"] == "failed"]
    summary = subprocess.run(
        [sys.executable, KIT / "summary.py", "sessions"],
        env=os.environ | {"RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "replayed" in summary.stdout
    assert "FAILS" not in summary.stdout


def test_a_bundle_that_comes_out_otherwise_is_refused(exported: Path, tmp_path: Path) -> None:
    hollow = tmp_path / "hollow"
    run("hollow.py", tmp_path, "strip", str(exported), str(hollow))
    damaged = next(hollow.rglob("*.hollow"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = subprocess.run([sys.executable, KIT / "hollow.py", "fill", hollow], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "other bytes than the manifest's" in done.stderr


def test_the_originals_and_the_plans_run(tmp_path: Path) -> None:
    rows = run("originals.py", tmp_path, "elit-sit-s-256", seconds=25)
    assert all(row["ms"] > 0 for row in rows)
    assert rows
    if find_spec("diffusers") is None:
        pytest.skip("plans are those of a diffusers model: pip install 'elastic-export[flux]'")
    drawings = [row for row in run("plans.py", tmp_path) if row.get("what") == "drawing"]
    assert {row["plan"] for row in drawings} == {"full", "4x", "7x"}
    assert all(row["finite"] for row in drawings)
