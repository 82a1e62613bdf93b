import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import manifest, write_bundle, write_manifest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Bundle, BundleError
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import FileEntry, OnnxArtifact
from elastic_runtime.contract.bundle import MANIFEST, entry
from elastic_runtime.contract.manifest import OWN_STEPS, SCHEMA_VERSION, Quality
from elastic_runtime.files.folder import writing
from elastic_runtime.ralu.plan import PRESETS

FILE = FileEntry(path="onnx/denoiser.onnx", bytes=1, sha256="0" * 64)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest's JSON in place."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def rename_file(content: dict[str, Any], path: str) -> None:
    content["graphs"]["denoiser"]["artifacts"][0]["files"][0]["path"] = path


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = manifest()
    write_manifest(tmp_path, written)
    assert decode((tmp_path / MANIFEST).read_bytes(), MANIFEST) == written


def test_weights_were_rounded_to_the_nearest_where_an_artifact_says_nothing(tmp_path: Path) -> None:
    written = manifest(artifacts=(OnnxArtifact(precision="int4w", files=(FILE,), toolchain={}, opset=23, weight_rounding="gptq"),))
    write_manifest(tmp_path, written)
    (artifact,) = decode((tmp_path / MANIFEST).read_bytes(), MANIFEST).graphs["denoiser"].artifacts
    assert artifact.held == "int4w, gptq"
    edit(tmp_path, lambda content: content["graphs"]["denoiser"]["artifacts"][0].pop("weight_rounding"))
    older = decode((tmp_path / MANIFEST).read_bytes(), MANIFEST)
    (nearest,) = older.graphs["denoiser"].artifacts
    assert (nearest.held, nearest) == ("int4w", msgspec.structs.replace(artifact, weight_rounding="nearest"))
    assert older.joined("denoiser", [artifact]).graphs["denoiser"].artifacts == (artifact,)  # it takes the other's place
    kept = msgspec.structs.replace(nearest, float_matrices=("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"))
    assert kept.held == "int4w, 2 in floats"
    edit(tmp_path, lambda content: content["graphs"]["denoiser"]["artifacts"][0].update(weight_rounding="up"))
    with pytest.raises(BundleError, match="weight_rounding"):
        decode((tmp_path / MANIFEST).read_bytes(), MANIFEST)


def test_an_open_bundle_holds_its_manifest_and_its_files(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    assert bundle.manifest.model.name == "tiny"
    assert bundle.file("onnx/denoiser.onnx").read_bytes() == b"not really a graph"
    assert Bundle.open(str(tmp_path / "b"), hashes=True).manifest == bundle.manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m["model"].update(colour="red"), "colour"),
        (lambda m: m["axes"][0].update(colour="red"), "colour"),
        (lambda m: m["graphs"]["denoiser"]["artifacts"][0]["files"][0].update(mode="x"), "mode"),
        (lambda m: m["graphs"]["denoiser"]["dimensions"]["B"].update(opt=2), "opt"),
        (lambda m: m["model"]["schedule"].update(colour="red"), "colour"),
        (lambda m: m["cost"][0].update(colour="red"), "colour"),
        (lambda m: m["provenance"].update(colour="red"), "colour"),
        (lambda m: m.pop("axes"), "axes"),
        (lambda m: m["model"].pop("null_label"), "null_label"),
        (lambda m: m["graphs"]["denoiser"]["artifacts"][0].pop("opset"), "opset"),
        (lambda m: m["graphs"]["denoiser"]["artifacts"][0].pop("target"), "target"),
        (lambda m: m["graphs"]["denoiser"]["artifacts"][0].update(target="abacus"), "abacus"),
        (lambda m: m["model"].update(num_classes="ten"), "num_classes"),
        (lambda m: m["model"].update(prediction="noise"), "prediction"),
        (lambda m: m["axes"][0].update(max=63), "axis latents"),
        (lambda m: m["graphs"]["denoiser"]["artifacts"][0].update(files=[]), "files"),
        (lambda m: m["graphs"]["denoiser"]["dimensions"].pop("J"), "J"),
        (lambda m: m["graphs"]["denoiser"]["dimensions"].pop("B"), "B"),
    ],
)
def test_an_unknown_missing_or_wrong_field_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], named: str) -> None:
    write_bundle(tmp_path / "b")
    edit(tmp_path / "b", change)
    with pytest.raises(BundleError, match="not a valid manifest") as caught:
        Bundle.open(tmp_path / "b")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (SCHEMA_VERSION + 1, "pip install -U elastic-export"),
        (0, "export the bundle again"),
        (None, "export the bundle again"),
        ("1", "export"),
    ],
)
def test_another_schema_is_refused_with_advice(tmp_path: Path, version: object, advice: str) -> None:
    write_bundle(tmp_path / "b")
    edit(tmp_path / "b", lambda content: content.update(schema_version=version, something_new=1))
    with pytest.raises(BundleError, match=f"schema_version {version!r}; this version reads {SCHEMA_VERSION}") as caught:
        Bundle.open(tmp_path / "b")
    assert advice in str(caught.value)


def test_a_manifest_of_version_1_is_read_as_it_is_unless_it_draws_from_patches(tmp_path: Path) -> None:
    new = write_bundle(tmp_path / "b").manifest
    edit(tmp_path / "b", lambda content: content.update(schema_version=1))
    assert Bundle.open(tmp_path / "b").manifest == new
    patches = {"size": 2, "positions": "img_ids"}
    edit(tmp_path / "b", lambda content: content["model"].update(patches=patches))
    with pytest.raises(BundleError, match=r"schema_version 1, in which tiny has no axis `tokens` yet: export the bundle again"):
        Bundle.open(tmp_path / "b")
    edit(tmp_path / "b", lambda content: content.update(schema_version=SCHEMA_VERSION))
    assert Bundle.open(tmp_path / "b").manifest.model.patches


@pytest.mark.parametrize(
    ("plan", "steps", "where"),
    [
        ("full", (50,), "full, 50 steps"),
        ("4x", (5, 6, 7), "4x"),
        ("4x", None, "4x"),
        ("4x", (10, 12, 14), "4x, 10+12+14 steps"),
        (None, None, "latents=4"),
    ],
)
def test_a_card_s_row_names_its_plan_and_steps_that_are_not_the_preset_s_own(
    plan: str | None, steps: tuple[int, ...] | None, where: str
) -> None:
    assert Quality(budget={"latents": 4}, plan=plan, steps=steps, accuracy=1.0, frechet_distance=0.0).where == where


def test_presets_have_the_steps_that_cards_take_for_granted() -> None:
    assert {name: plan.steps for name, plan in PRESETS.items()} == OWN_STEPS
    with pytest.raises(ValueError, match="`steps` are a plan's"):
        Quality(budget={}, steps=(5,), accuracy=1.0, frechet_distance=0.0)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'"' + b"x" * 50, b"[" * 100_000])
def test_what_is_not_a_manifest_is_said_to_be_none(text: bytes) -> None:
    with pytest.raises(BundleError, match="is not a manifest"):
        decode(text, "elastic.json")


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8)).map(lambda d: json.dumps(d).encode())
)
def test_no_bytes_make_the_reader_fail_otherwise(text: bytes) -> None:
    with pytest.raises(BundleError):
        decode(text, "elastic.json")


@pytest.mark.parametrize(
    "path", ["../out.onnx", "onnx/../../out.onnx", "/etc/hostname", "..\\out.onnx", "onnx\\denoiser.onnx", "..", "a\0b", "C:x", "."]
)
def test_a_file_name_that_leaves_the_bundle_is_refused(tmp_path: Path, path: str) -> None:
    write_bundle(tmp_path / "b")
    (tmp_path / "out.onnx").write_bytes(b"not really a graph")
    edit(tmp_path / "b", lambda content: rename_file(content, path))
    with pytest.raises(BundleError, match="outside the bundle") as caught:
        Bundle.open(tmp_path / "b")
    assert repr(path) in str(caught.value)


def test_files_that_are_links_into_a_store_are_opened(tmp_path: Path) -> None:
    """As model hubs keep them in their caches: each name is a link to a blob beside the bundle."""
    folder = write_bundle(tmp_path / "snapshot").folder
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(("elastic.json", "onnx/denoiser.onnx")):
        blob = tmp_path / "blobs" / str(number)
        (folder / name).rename(blob)
        os.symlink(os.path.relpath(blob, (folder / name).parent), folder / name)
    bundle = Bundle.open(folder, hashes=True)
    assert bundle.file("onnx/denoiser.onnx").read_bytes() == b"not really a graph"


def test_a_folder_reached_by_a_link_is_still_a_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    os.symlink(tmp_path / "b", tmp_path / "link")
    assert Bundle.open(tmp_path / "link", hashes=True).manifest.model.name == "tiny"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    file = folder / "onnx/denoiser.onnx"
    file.write_bytes(b"shorter")
    with pytest.raises(BundleError, match=r"denoiser\.onnx is damaged: 7 bytes where the manifest says 18"):
        Bundle.open(folder)
    file.write_bytes(b"NOT really a graph")
    assert Bundle.open(folder).manifest.model.name == "tiny"  # sizes only, unless asked
    with pytest.raises(BundleError, match=r"denoiser\.onnx is damaged: its SHA-256"):
        Bundle.open(folder, hashes=True)
    file.unlink()
    with pytest.raises(BundleError, match=r"denoiser\.onnx is missing"):
        Bundle.open(folder)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no elastic\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nowhere")


def test_a_bundle_without_reference_outputs_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no reference outputs"):
        write_bundle(tmp_path / "b").reference()


def test_a_reference_that_is_not_one_is_said_to_be_damaged(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    (folder / "reference.npz").write_bytes(b"not an archive")
    entry = {"path": "reference.npz", "bytes": 14, "sha256": "0" * 64}
    edit(folder, lambda content: content.update(reference=entry))
    with pytest.raises(BundleError, match=r"reference\.npz is damaged"):
        Bundle.open(folder).reference()


def exchanged(folder: Path, content: bytes = b"another graph") -> Bundle:
    """Put another bundle in the place of the one in `folder`."""
    with writing(folder, overwrite=True) as draft:
        file = draft.stage / "onnx" / "denoiser.onnx"
        file.parent.mkdir()
        file.write_bytes(content)
        artifact = OnnxArtifact(precision="fp32", files=(entry(draft.stage, file),), toolchain={}, opset=23)
        return draft.commit(manifest(artifacts=(artifact,)))


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_as_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bundle(tmp_path / "b").folder
    check, replaced = Bundle.check, []

    def slow(self: Bundle, entry: FileEntry, hashes: bool = False) -> None:
        if self.folder == folder and not replaced:
            replaced.append(True)
            exchanged(folder)
        check(self, entry, hashes)

    monkeypatch.setattr(Bundle, "check", slow)
    bundle = Bundle.open(folder, hashes=True)
    assert replaced
    assert bundle.file("onnx-2/denoiser.onnx").read_bytes() == b"another graph"


def test_a_file_that_is_asked_for_after_its_bundle_was_replaced_is_never_anothers(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    for content in (b"another graph", b"NOT really a graph"):  # the second takes the first one's name again
        exchanged(bundle.folder, content)
        with pytest.raises(BundleError, match=r"b was replaced since it was opened, and onnx/denoiser\.onnx with it: open it again"):
            bundle.file("onnx/denoiser.onnx")
    shutil.rmtree(bundle.folder)
    with pytest.raises(BundleError, match="was replaced since it was opened"):
        bundle.file("onnx/denoiser.onnx")


def test_a_bundle_that_was_extended_since_it_was_opened_still_gives_its_files(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    with writing(bundle.folder) as draft:
        (draft.stage / "more").write_bytes(b"more")
        artifact = OnnxArtifact(precision="fp32", files=(entry(draft.stage, draft.stage / "more"),), toolchain={}, opset=20)
        draft.commit(bundle.manifest.joined("denoiser", [artifact]))
    assert bundle.file("onnx/denoiser.onnx").read_bytes() == b"not really a graph"
    assert bundle.file("onnx").is_dir(), "a package is a folder"


@pytest.mark.parametrize(
    ("reader", "name"),
    [("read_bytes", "elastic.json"), ("is_file", "elastic.json"), ("stat", "onnx/denoiser.onnx"), ("open", "onnx/denoiser.onnx")],
)
def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str) -> None:
    folder = write_bundle(tmp_path / "b").folder
    real = getattr(Path, reader)

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == folder / name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, reader, refuse)
    with pytest.raises(BundleError, match=rf"cannot read .*{name}: Permission denied\. Give yourself the right to read it"):
        Bundle.open(folder, hashes=True)


def test_a_reference_that_may_not_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bundle(tmp_path / "b").folder
    np.savez(folder / "reference.npz", a=np.zeros(1))
    whole = msgspec.structs.replace(Bundle.open(folder).manifest, reference=entry(folder, folder / "reference.npz"))
    write_manifest(folder, whole)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(BundleError, match=r"cannot read .*reference\.npz: Permission denied"):
        Bundle.open(folder).reference()


@pytest.mark.parametrize("name", ["elastic.json", "onnx/denoiser.onnx"])
def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = write_bundle(tmp_path / "b").folder
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError):
        Bundle.open(folder, hashes=True)


def test_joining_replaces_the_artifact_in_the_same_slot(tmp_path: Path) -> None:
    """A file may have got another name since its own was taken."""
    written = exchanged(write_bundle(tmp_path / "b").folder).manifest
    (numbered,) = written.graphs["denoiser"].artifacts
    assert numbered.path == "onnx-2/denoiser.onnx"
    plain = msgspec.structs.replace(numbered, files=(FileEntry(path="onnx/denoiser.onnx", bytes=1, sha256=""),))
    assert written.joined("denoiser", [plain]).graphs["denoiser"].artifacts == (plain,)


def test_joining_replaces_the_artifact_at_the_same_path_and_keeps_the_others(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b").manifest
    (first,) = written.graphs["denoiser"].artifacts
    second = type(first)(precision="fp16", files=(FileEntry(path="onnx/two.onnx", bytes=1, sha256=""),), toolchain={}, opset=20)
    both = written.joined("denoiser", [second])
    assert [artifact.path for artifact in both.graphs["denoiser"].artifacts] == ["onnx/denoiser.onnx", "onnx/two.onnx"]
    again = both.joined("denoiser", [type(second)(precision="fp32", files=second.files, toolchain={}, opset=23)])
    assert [(artifact.path, artifact.precision) for artifact in again.graphs["denoiser"].artifacts] == [
        ("onnx/denoiser.onnx", "fp32"),
        ("onnx/two.onnx", "fp32"),
    ]


def test_an_axis_is_found_by_name_or_the_others_are_listed() -> None:
    assert manifest().axis("latents").max == 64
    with pytest.raises(BundleError, match="no axis 'loops'; it has latents"):
        manifest().axis("loops")
