"""The Python API: what the commands do, with spans as text and options by name; importing it costs nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import elastic_export
from elastic_runtime import Bundle, Span, UsageError


def test_importing_it_imports_nothing_and_names_what_it_offers() -> None:
    script = (
        "import sys, elastic_export\n"
        "assert dir(elastic_export) == ['__version__', 'elasticize', 'export', 'models', 'plan', 'push', 'verify'], dir(elastic_export)\n"
        "heavy = {'torch', 'numpy', 'typer', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from elastic_export import export, models, verify\n"
        "assert not {'torch', 'typer'} & set(sys.modules), 'torch is for the call'\n"
        "assert all(each.__doc__ and 'Raises:' in each.__doc__ for each in (export, models, verify))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'compile'"):
        elastic_export.compile  # noqa: B018


def test_a_model_is_exported_verified_and_told_of(golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="exporting needs torch")
    pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")
    stages: list[str] = []
    bundle = elastic_export.export(
        "elit-sit", output=tmp_path / "out", checkpoint=golden / "elit-c.pt", config=str(golden / "elit-c.json"),
        latents="16-32", batch="1-2", opset=20, on_stage=stages.append,
    )  # fmt: skip
    assert bundle.manifest.axis("latents").span == Span(16, 32)
    assert bundle.manifest.graphs["denoiser"].batch == Span(1, 2)
    assert bundle.manifest.provenance.command == "elastic_export.export('elit-sit', target='onnx')"
    assert stages[0] == "loading elit-sit"
    ((graph, artifact),) = elastic_export.verify(tmp_path / "out")
    assert (graph, artifact.path) == ("denoiser", "onnx/denoiser.opset20.onnx")
    assert all(row.passed for row in artifact.verified)
    assert elastic_export.verify(bundle)[0][1].verified == artifact.verified
    assert {row["name"] for row in elastic_export.models()} >= {"elit-mnist", "ralu-digits", "elit-sit-xl-256"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "abacus"}, "no target 'abacus'; there are onnx, trt, coreml"),
        ({"target": "onnx", "shapes": "range"}, "the onnx target has no option shapes; it has opset, precision"),
        ({"components": "vae"}, "--components, --size, --max-sequence-length and --adapter are for a diffusers folder"),
        ({"latents": "256-32"}, "reversed: write 32-256"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    pytest.importorskip("torch", reason="exporting needs torch")
    with pytest.raises(UsageError, match=message):
        elastic_export.export("elit-mnist", output=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_bundle_takes_engines_from_its_own_artifacts(bundle_copy: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs tensorrt-rtx")
    with pytest.raises(UsageError, match="is a bundle and has its weights"):
        elastic_export.export(bundle_copy, output=bundle_copy, target="trt", checkpoint="x.pt")
    progress: list[tuple[str, int, int]] = []
    bundle = elastic_export.export(
        bundle_copy,
        output=bundle_copy,
        target="trt",
        sms=[89],
        buckets="8,16",
        latents="4-16",
        on_progress=lambda *step: progress.append(step),
    )
    engine = bundle.manifest.graphs["denoiser"].artifacts[-1]
    assert (engine.target, len(engine.profiles), bool(progress)) == ("trt", 2, True)  # type: ignore[attr-defined]


def test_the_golden_bundles_come_from_it(golden_bundle: Callable[[str], Bundle]) -> None:
    assert golden_bundle("c").manifest.provenance.command == "elastic-export onnx elit-sit"
