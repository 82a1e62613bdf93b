"""Engines join a bundle or a copy of one, while nobody else can write it."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from elastic_export.exporting import export_bundle
from elastic_runtime import Bundle, BundleError
from elastic_runtime.contract.artifacts import TrtArtifact
from elastic_runtime.files.folder import writing

Tiny = Callable[..., Bundle]


def engines(bundle: Bundle) -> list[TrtArtifact]:
    return [artifact for artifact in bundle.manifest.graphs["denoiser"].artifacts if isinstance(artifact, TrtArtifact)]


def add_one(tiny: Tiny) -> Bundle:
    from onnx import helper

    return tiny([helper.make_node("Add", ["sample", "sample"], ["prediction"])])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_elsewhere_leaves_the_bundle_as_it_was(room: ModuleType, tiny: Tiny, tmp_path: Path) -> None:
    bundle = add_one(tiny)
    before = contents(bundle.folder)
    made = export_bundle(bundle, "trt", room.TrtOptions(sms=(89,)), output=tmp_path / "copy")
    assert contents(bundle.folder) == before
    assert len(engines(made)) == 1
    for file in bundle.manifest.files():
        assert not bundle.file(file.path).samefile(made.file(file.path)), "a write into the one must not change the other"
    with pytest.raises(BundleError, match="holds another bundle"):
        export_bundle(bundle, "trt", room.TrtOptions(sms=(89,)), output=tmp_path / "copy")
    (tmp_path / "copy" / "digits.png").write_bytes(b"a picture")
    again = export_bundle(bundle, "trt", room.TrtOptions(sms=(86,)), output=tmp_path / "copy", overwrite=True)
    assert [artifact.sms for artifact in engines(again)] == [(86,)]
    assert engines(again)[0].source in [file.path for file in again.manifest.files()]
    assert contents(again.folder).keys() == {"elastic.json", "digits.png", *(file.path for file in again.manifest.files())}


def test_an_engine_shares_nothing_with_the_cache_that_it_came_from(room: ModuleType, tiny: Tiny, cache: Path) -> None:
    made = export_bundle(add_one(tiny), "trt", room.TrtOptions(sms=(89,)))
    (kept,) = cache.glob("*/engine")
    assert not kept.samefile(made.file(engines(made)[0].path))


def test_while_one_run_writes_another_is_refused_and_afterwards_both_engines_come_to_be(room: ModuleType, tiny: Tiny) -> None:
    bundle = add_one(tiny)
    with writing(bundle.folder), pytest.raises(BundleError, match="is being written by another run; wait for it"):
        export_bundle(bundle, "trt", room.TrtOptions(sms=(86,)))
    export_bundle(bundle, "trt", room.TrtOptions(sms=(89,)))
    # `bundle` was opened before: what is extended is what lies there now
    assert [artifact.sms for artifact in engines(export_bundle(bundle, "trt", room.TrtOptions(sms=(86,))))] == [(89,), (86,)]
