"""The script behind `make gpu-check`, on a machine that has no GPU: what it says there, and its table with a stand-in."""

from collections.abc import Callable
from types import ModuleType

import fake_gpu
import numpy as np
import pytest

import gpu_check
from elastic_export.exporting import export_bundle
from elastic_runtime import Bundle, Span
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.sessions.trt import gpu

Tiny = Callable[..., Bundle]


@pytest.fixture
def plus(room: ModuleType, tiny: Tiny) -> Callable[[float], Bundle]:
    """A bundle whose graph is `sample + addend`, with an engine; the stand-in's engine is `sample + 1`."""
    pytest.importorskip("onnxruntime", reason="the check compares with ONNX Runtime")
    from onnx import helper, numpy_helper

    def make(addend: float) -> Bundle:
        latents = TensorSpec(name="latent_ids", dtype="int64", shape=("J",))
        constant = numpy_helper.from_array(np.array(addend, np.float32), "addend")
        node = helper.make_node("Add", ["sample", "addend"], ["prediction"])
        bundle = tiny([node], [constant], (latents,), J=Span(1, 16))
        return export_bundle(bundle, "trt", room.TrtOptions(sms=(89,), buckets={"latents": (16, 64)}))

    return make


def test_without_a_gpu_it_says_that_nothing_ran(plus: Callable[[float], Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    if gpu()[0] is not None:
        pytest.skip("there is a GPU here")
    assert gpu_check.main([str(plus(1).folder)]) == 3
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err.startswith("nothing ran: trt: the engine is for sm 89 and tensorrt_rtx")


def test_one_row_a_budget_and_the_turns(
    plus: Callable[[float], Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = plus(1)
    device = fake_gpu.install(monkeypatch, version=str(bundle.manifest.graphs["denoiser"].artifacts[1].toolchain["tensorrt_rtx"]))
    assert gpu_check.main([str(bundle.folder), "--runs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["latents=16", "latents=20", "latents=64"]
    assert lines[-1] == "ok"
    assert device.named("launch")
    assert not device.memory


def test_a_difference_beyond_the_tolerance_fails(
    plus: Callable[[float], Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = plus(1.01)
    fake_gpu.install(monkeypatch, version=str(bundle.manifest.graphs["denoiser"].artifacts[1].toolchain["tensorrt_rtx"]))
    assert gpu_check.main([str(bundle.folder), "--runs", "2"]) == 1
    assert "FAILS" in capsys.readouterr().out
