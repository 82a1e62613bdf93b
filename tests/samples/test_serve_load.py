"""The load on a server: a short one, through a real process, and its table in a page."""

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
pytest.importorskip("uvicorn", reason="serving needs uvicorn")
pytest.importorskip("httpx2", reason="what asks the server")

import elastic_export
import serve_load

SIZES = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 10, "group_size": 2,
    "head_blocks": 1, "tail_blocks": 1,
}  # fmt: skip


def test_the_table_is_filled_into_its_page(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(SIZES))
    config, tiny = tmp_path / "tiny.json", tmp_path / "tiny"
    elastic_export.export("elit-sit", config=config, random_weights=True, output=tiny, verify="ends")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures serve -->\nold\n<!-- end of figures -->\nafter\n", encoding="utf-8")
    serve_load.main(argparse.Namespace(bundle=tiny, seconds=0.3, loads=[2.0], steps=3, guidance=2.0, backend="ort", page=page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for way in serve_load.WAYS:
        assert f"| 2 | {way} | " in text
    assert "One picture alone takes" in text


def test_what_is_refused_is_not_on_time() -> None:
    asked = [
        serve_load.Asked(200, 0.1, {"a": 2}),
        serve_load.Asked(200, 0.4, {"b": 2}),
        serve_load.Asked(429, 0.0, {}),
        serve_load.Asked(429, 0.0, {}),
    ]
    row = serve_load.row("ours", 2.0, asked, 0.2, 1.0, {"a": 1.0, "b": 0.5})
    assert row == "| 2 | ours | 25.0% | 50.0% | 50.0% | 250 | 385 | 397 | 1.0 | 75.0% |"
