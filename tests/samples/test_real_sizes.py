"""`samples/real_sizes.py`: what commands took, and the table of it."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import real_sizes

ROW: dict[str, Any] = {
    "bytes": 2_820_000_000, "export_s": 41.6, "export_peak": 570_000_000, "run_peak": 2_990_000_000,
    "steps_peak": 2.5e9, "steps_ms": [500, 700.4],
    "whole_s": None, "step_db": 140.25, "picture_db": None, "machine": "a machine", "versions": {"onnxruntime": "1"},
}  # fmt: skip


def test_a_command_s_seconds_and_memory_are_its_own() -> None:
    """In a small process of its own: the system counts for a command what its parent held when it was begun."""
    words = "import real_sizes, sys; print(real_sizes.timed([sys.executable, '-c', 'x = bytearray(300_000_000); print(len(x))']))"
    path = os.pathsep.join(sys.path)
    process = subprocess.run(
        [sys.executable, "-c", words], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    output, seconds, peak = ast.literal_eval(process.stdout)
    assert output == "300000000\n"
    assert seconds > 0
    assert 300_000_000 < peak < 500_000_000
    with pytest.raises(SystemExit, match="this failed"):
        real_sizes.timed([sys.executable, "-c", "raise SystemExit(3)"])


def test_pictures_are_held_against_those_of_float32(tmp_path: Path) -> None:
    exact = np.linspace(0, 1, 101)
    np.savez(tmp_path / "exact.npz", a=exact, b=exact)
    np.savez(tmp_path / "near.npz", a=exact, b=exact + 0.01)
    assert real_sizes.nearest(tmp_path / "near.npz", tmp_path / "exact.npz") == pytest.approx(40)
    assert real_sizes.nearest(tmp_path / "exact.npz", tmp_path / "exact.npz") == 999
    assert real_sizes.nearest(tmp_path / "near.npz", tmp_path / "none.npz") is None


def test_rows_are_shown_beside_float32() -> None:
    whole = ROW | {"steps_ms": [2000.0, 3000.0], "whole_s": 61.2, "step_db": None}
    text = real_sizes.section(
        {"elit-xl fp32": ROW, "elit-xl int8": ROW | {"steps_ms": [250, 350.2], "picture_db": 45.04}, "flux-dev int4w": whole}
    )
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:5]]
    assert rows[0] == ["fp32", "2.82 GB", "42 s", "0.57 GB", "2.99 GB (2.50)", "500, 700 ms", "1.00", "140.2", "-"]
    assert rows[1] == ["int8", "2.82 GB", "42 s", "0.57 GB", "2.99 GB (2.50)", "250, 350 ms", "2.00", "140.2", "45.0"]
    assert rows[2][5:] == ["2.0 to 3.0 s; 61 s in all", "-", "-", "-"]
    assert "a machine; onnxruntime 1" in text
