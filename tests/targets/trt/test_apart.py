"""A denoiser in two engines, really built from an ONNX artifact in two files."""

import shutil
import struct
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from elastic_export.exporting import export_bundle
from elastic_runtime import Bundle, UsageError
from elastic_runtime.contract.artifacts import OnnxArtifact, Range, TrtArtifact
from elastic_runtime.contract.bundle import encode
from elastic_runtime.sessions.apart import ROWS, halves
from elastic_targets.capture import BundleGraph


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_two_engines_are_built_and_come_from_the_cache_again(room: ModuleType, in_two: Path, tmp_path: Path, precision: str) -> None:
    bundle = Bundle.open(shutil.copytree(in_two, tmp_path / "bundle"))
    options, steps = room.TrtOptions(sms=(89,), precision=precision, buckets={}, conditions_apart=True), list[tuple[str, int, int]]()
    made = export_bundle(bundle, "trt", options, on_progress=lambda *step: steps.append(step))
    graph = made.manifest.graphs["denoiser"]
    (artifact,) = (each for each in graph.artifacts if isinstance(each, TrtArtifact))
    source = next(each for each in graph.artifacts if isinstance(each, OnnxArtifact) and each.path == artifact.source)
    name = "" if precision == "fp32" else f".{precision}"
    assert artifact.path.startswith(f"trt/denoiser{name}.rest.sm89.")
    assert source.conditions
    assert artifact.conditions
    assert artifact.conditions.path.startswith(f"trt/denoiser{name}.conditions.sm89.")
    assert artifact.conditions.outputs == source.conditions.outputs
    assert [file.path for file in artifact.files] == [artifact.path, artifact.conditions.path]
    for file in artifact.files:
        content = made.file(file.path).read_bytes()
        assert (content[:4], struct.unpack_from("<Q", content, 16)) == (b"vtrt", (len(content),))
    assert artifact.network.attentions
    rest, own = halves(graph, artifact, artifact.conditions)
    assert isinstance(rest, TrtArtifact)
    assert isinstance(own, TrtArtifact)
    assert rest.profiles == artifact.profiles
    assert (own.source, own.profiles[0].dimensions) == (source.conditions.path, {"B": Range(1, ROWS, ROWS)})
    hashes = {file.path: file.sha256 for file in source.files}
    assert (rest.source_sha256, own.source_sha256) == (hashes[rest.source], hashes[own.source])
    other = msgspec.structs.replace(artifact, source_sha256="0" * 64)  # of an ONNX file that was replaced since
    assert halves(graph, other, artifact.conditions)[1].source_sha256 == "0" * 64  # type: ignore[union-attr]
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1:] == (1000, 1000)

    assert encode(Bundle.open(made.folder, hashes=True).manifest) == encode(made.manifest)

    again = list[str]()
    export_bundle(made, "trt", options, overwrite=True, on_progress=lambda stage, *_: again.append(stage))
    assert again == ["denoiser sm89 from the cache"]


def test_a_bundle_without_such_an_artifact_says_how_to_get_one(room: ModuleType, digits: Path, in_two: Path) -> None:
    apart = room.TrtOptions(sms=(89,), conditions_apart=True)
    message = "no ONNX artifact of 'denoiser' in two files .*onnx MODEL --conditions-apart -o .*, or build without --conditions-apart"
    with pytest.raises(UsageError, match=message):
        room.requires(BundleGraph(Bundle.open(digits), "denoiser"), apart)
    with pytest.raises(UsageError, match="no bf16 ONNX artifact of 'denoiser' in two files; it has fp32, fp8, int4w.*--conditions-apart"):
        room.requires(BundleGraph(Bundle.open(in_two), "denoiser"), room.TrtOptions(sms=(89,), precision="bf16", conditions_apart=True))
