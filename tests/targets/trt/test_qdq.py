"""Engines of few bits, from graphs that hold Q/DQ: really built for GPUs that are not here."""

import shutil
import struct
from pathlib import Path
from types import ModuleType

import pytest

from elastic_export.exporting import export_bundle
from elastic_runtime import Bundle, UsageError
from elastic_runtime.contract.artifacts import TrtArtifact
from elastic_targets.capture import BundleGraph


@pytest.mark.parametrize(
    ("precision", "sms", "engines"),
    [
        ("fp8", (89, 120), [(89, 120)]),
        ("int8qdq", (75, 89, 120), [(75,), (89, 120)]),
        ("int4qdq", (80, 120), [(80, 120)]),
        ("nvfp4", (), [(120, 121)]),
    ],
)
def test_an_engine_is_built_of_what_was_proven(
    room: ModuleType, rounded: Bundle, tmp_path: Path, precision: str, sms: tuple[int, ...], engines: list[tuple[int, ...]]
) -> None:
    bundle = Bundle.open(shutil.copytree(rounded.folder, tmp_path / "bundle"))
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=sms, precision=precision, buckets={}))
    artifacts = [artifact for artifact in made.manifest.graphs["denoiser"].artifacts if isinstance(artifact, TrtArtifact)]
    assert [(each.sms, each.precision, each.source) for each in artifacts] == [
        (sms, precision, f"onnx/denoiser.{precision}.onnx") for sms in engines
    ]
    for each in artifacts:
        content = made.file(each.path).read_bytes()
        assert (content[:4], struct.unpack_from("<Q", content, 16)) == (b"vtrt", (len(content),))


@pytest.mark.parametrize(
    ("precision", "sms", "message"),
    [
        ("fp8", (80,), "fp8 needs a GPU of sm 89 or later, got sm 80: leave it out of --sm, or choose .*: fp16, int8qdq, int4qdq$"),
        ("fp8", (75, 86, 89), "got sm 75, 86: leave them out of --sm, or choose a --precision that they can multiply: fp16, int8qdq$"),
        ("int4qdq", (75,), "int4qdq needs a GPU of sm 80 or later, got sm 75"),
        ("nvfp4", (89,), "nvfp4 needs a GPU of sm 100 or later, got sm 89: .*: fp16, int8qdq, int4qdq, fp8$"),
    ],
)
def test_a_generation_that_cannot_multiply_it_is_refused_before_anything_is_built(
    room: ModuleType, rounded: Bundle, precision: str, sms: tuple[int, ...], message: str
) -> None:
    options = room.TrtOptions(sms=sms, precision=precision)
    with pytest.raises(UsageError, match=message):
        room.requires(BundleGraph(rounded, "denoiser"), options)
    with pytest.raises(UsageError, match=message):
        room.available(options)
