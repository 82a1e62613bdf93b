"""`samples/overhead.py` on a real bundle."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import elastic_export
import overhead
from elastic_runtime import Budget, ElasticPipeline

SIZES = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10, "group_size": 2,
    "head_blocks": 1, "tail_blocks": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overhead")
    (folder / "tiny.json").write_text(json.dumps(SIZES))
    elastic_export.export("elit-sit", config=folder / "tiny.json", random_weights=True, output=folder / "tiny", verify="ends")
    return folder / "tiny"


def test_the_backends_time_is_taken_out_and_the_session_left_as_it_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "PICTURES", 2)
    monkeypatch.setattr(overhead, "WARM", 1)
    with ElasticPipeline.from_pretrained(made, "ort") as pipe:
        several = pipe.session("denoiser")._several
        picture, left = overhead.outside(pipe, Budget())
        assert 0 < left < picture
        assert pipe.session("denoiser")._several == several


def test_a_cold_process_draws(made: Path) -> None:
    assert 0 < overhead.cold(made) < 120
