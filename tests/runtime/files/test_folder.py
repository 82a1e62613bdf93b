"""A bundle's folder holds the old bundle or the new one, and everything in it that is not ours."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import manifest, write_bundle
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Bundle, BundleError
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.bundle import MANIFEST, entry
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.files import leftovers
from elastic_runtime.files.folder import Draft, standing, writing
from elastic_runtime.files.lock import NAME as LOCK

OLD, NEW = b"not really a graph", b"another graph"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(draft: Draft, name: str = "onnx/denoiser.onnx", content: bytes = NEW) -> OnnxArtifact:
    """Make an artifact's file in the stage."""
    path = draft.stage / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return OnnxArtifact(precision="fp32", files=(entry(draft.stage, path),), toolchain={}, opset=20)


def extend(folder: Path, name: str = "onnx/denoiser.onnx", content: bytes = NEW) -> Bundle:
    """Put an artifact into the bundle in `folder`, or in the place of the one in that slot."""
    with writing(folder) as draft:
        assert draft.old is not None
        return draft.commit(draft.old.manifest.joined("denoiser", [make(draft, name, content)]))


def replace(folder: Path, content: bytes = NEW) -> Bundle:
    """Put another bundle in the place of what stands in `folder`."""
    with writing(folder, overwrite=True) as draft:
        return draft.commit(manifest(artifacts=(make(draft, content=content),)))


def paths(bundle: Bundle) -> list[str]:
    return [file.path for file in bundle.manifest.files()]


def test_a_new_bundle_appears_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er" / "bundle"
    with writing(folder) as draft:
        assert draft.old is None
        assert not (folder / MANIFEST).exists()
        bundle = draft.commit(manifest(artifacts=(make(draft),)))
    assert contents(folder).keys() == {MANIFEST, "onnx/denoiser.onnx"}
    assert Bundle.open(folder, hashes=True).manifest == bundle.manifest
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_being_written_is_opened_before_it_is_there_and_what_stands_behind_it(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    with writing(folder) as draft:
        assert draft.old is not None
        before = draft.bundle(draft.old.manifest)
        assert before.file("onnx/denoiser.onnx").read_bytes() == OLD
        grown = draft.bundle(draft.old.manifest.joined("denoiser", [make(draft), make(draft, "onnx/b.onnx")]))
        assert grown.file("onnx/denoiser.onnx").read_bytes() == NEW
        assert grown.file("onnx/b.onnx").read_bytes() == NEW
        with pytest.raises(BundleError, match=r"onnx/c\.onnx is missing"):
            grown.file("onnx/c.onnx")


@pytest.mark.parametrize("error", [KeyError("any"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path, error: BaseException, there: bool) -> None:
    folder = write_bundle(tmp_path / "b").folder if there else tmp_path / "deep" / "b"
    before = contents(folder)
    with pytest.raises(type(error)), writing(folder) as draft:
        make(draft)
        raise error
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == ([folder] if there else [])


def test_a_draft_that_is_not_committed_changes_nothing(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    before = contents(folder)
    with writing(folder) as draft:
        make(draft)
    assert contents(folder) == before


# --- what is the user's


def users(folder: Path) -> dict[str, bytes]:
    """Files that people keep beside a bundle's own."""
    mine = {
        "digits.png": b"picture",
        "README.md": b"card",
        ".git/config": b"git",
        "onnx/notes.txt": b"notes",
        "onnx-2/denoiser.onnx": b"mine",
    }
    for name, content in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return mine


@pytest.mark.parametrize("write", [lambda folder: extend(folder, "onnx/b.onnx"), extend, replace], ids=["add", "exchange", "replace"])
def test_what_the_manifest_does_not_list_is_never_touched(tmp_path: Path, write: Any) -> None:
    folder = write_bundle(tmp_path / "b").folder
    mine = users(folder)
    bundle = write(folder)
    after = contents(folder)
    assert {name: after[name] for name in mine} == mine
    assert after.keys() == {*mine, *paths(bundle), MANIFEST}
    Bundle.open(folder, hashes=True)


def test_a_new_file_takes_another_name_where_its_own_stands_and_the_old_one_goes(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    assert paths(extend(folder)) == ["onnx-2/denoiser.onnx"]
    assert contents(folder).keys() == {MANIFEST, "onnx-2/denoiser.onnx"}
    assert not (folder / "onnx").exists(), "a folder that became empty goes"
    assert paths(extend(folder, content=b"third")) == ["onnx/denoiser.onnx"]
    assert contents(folder).keys() == {MANIFEST, "onnx/denoiser.onnx"}


def test_weights_stay_beside_the_graph_that_names_them(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    (folder / "onnx" / "large.onnx.data").write_bytes(b"somebody's")
    with writing(folder) as draft:
        assert draft.old is not None
        graph, data = make(draft, "onnx/large.onnx"), make(draft, "onnx/large.onnx.data")
        whole = msgspec.structs.replace(graph, files=(*graph.files, *data.files))
        bundle = draft.commit(draft.old.manifest.joined("denoiser", [whole]))
    assert paths(bundle)[1:] == ["onnx-2/large.onnx", "onnx-2/large.onnx.data"]
    assert (folder / "onnx" / "large.onnx.data").read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    "text", [b'{"colour": "red"}', b"not JSON", b"[]", b'{"schema_version": 99, "model": {}, "graphs": {}}', b'{"schema_version": 1}', b""]
)
def test_a_folder_with_another_programs_manifest_is_never_replaced(tmp_path: Path, text: bytes) -> None:
    folder = tmp_path / "elastic"
    folder.mkdir()
    (folder / MANIFEST).write_bytes(text)
    (folder / "data").write_text("precious")
    before = contents(folder)
    with pytest.raises(BundleError, match=r"is left alone\. Choose another -o/--output"):
        replace(folder)
    with pytest.raises(BundleError), writing(folder):
        pytest.fail("it must not come to this")
    assert contents(folder) == before


@pytest.mark.parametrize("change", [{"schema_version": 0}, {"new": 1}])
def test_a_bundle_of_ours_that_cannot_be_read_any_more_is_replaced_file_by_file(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_bundle(tmp_path / "b").folder
    mine = users(folder)
    victim = tmp_path / "victim"
    victim.write_text("outside")
    old = json.loads((folder / MANIFEST).read_text()) | change
    record = old["graphs"]["denoiser"]["artifacts"][0]["files"][0]
    old["more"] = [record | {"path": path} for path in ("../victim", str(victim), MANIFEST, f"./{MANIFEST}", "onnx", "nowhere")]
    (folder / MANIFEST).write_text(json.dumps(old))
    with pytest.raises(BundleError), writing(folder):
        pytest.fail("it must not come to this")
    bundle = replace(folder)
    assert contents(folder).keys() == {*mine, *paths(bundle), MANIFEST}
    assert victim.read_text() == "outside"
    Bundle.open(folder, hashes=True)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_removed_and_what_they_point_to_stays(tmp_path: Path) -> None:
    """A bundle in a model hub's cache, and one whose folder of graphs lies on a larger disk."""
    folder = write_bundle(tmp_path / "b").folder
    blob, disk = tmp_path / "blob", tmp_path / "disk"
    (folder / "onnx/denoiser.onnx").rename(blob)
    (folder / "onnx/denoiser.onnx").symlink_to(blob)
    extend(folder)
    assert blob.read_bytes() == OLD
    assert contents(folder).keys() == {MANIFEST, "onnx-2/denoiser.onnx"}
    (folder / "onnx-2").rename(disk)
    (folder / "onnx-2").symlink_to(disk, target_is_directory=True)
    assert paths(extend(folder, content=b"third")) == ["onnx/denoiser.onnx"]
    assert contents(disk) == {"denoiser.onnx": NEW}, "nothing is deleted through a link to a folder"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_stays_a_link_to_what_is_written(tmp_path: Path, there: bool) -> None:
    if there:
        write_bundle(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    bundle = Bundle.open(tmp_path / "b", hashes=True)
    assert contents(tmp_path / "b").keys() == {MANIFEST, *paths(bundle)}


simple = st.lists(st.sampled_from(["a", "b", "onnx", "onnx-2", "B"]), min_size=1, max_size=3).map("/".join)


@given(
    mine=st.dictionaries(simple, st.binary(max_size=2), max_size=5), first=st.sets(simple, min_size=1), second=st.sets(simple, min_size=1)
)
def test_whatever_the_names_each_write_keeps_what_is_not_ours(mine: dict[str, bytes], first: set[str], second: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write_twice(Path(folder), mine, first, second)


def _write_twice(folder: Path, mine: dict[str, bytes], first: set[str], second: set[str]) -> None:
    for names in (first, second):
        with writing(folder, overwrite=True) as draft:
            artifacts = []
            for name in sorted(names):
                with contextlib.suppress(OSError):  # a file where another name has a folder
                    artifacts.append(make(draft, name))
            bundle = draft.commit(manifest(artifacts=tuple(artifacts)))
        if names is first:
            kept = _placed(folder, mine)
    after = contents(folder)
    assert {name: after.get(name) for name in kept} == kept
    assert after.keys() == {*kept, *paths(bundle), MANIFEST}
    Bundle.open(folder, hashes=True)


def _placed(folder: Path, mine: dict[str, bytes]) -> dict[str, bytes]:
    """Put the user's files where they can go beside the bundle's."""
    kept = {}
    for name, content in mine.items():
        with contextlib.suppress(OSError):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as stream:
                stream.write(content)
            kept[name] = content
    return kept


# --- one writer at a time


def test_a_second_writer_is_refused_at_once_and_loses_nothing(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    with writing(folder) as draft:
        with pytest.raises(BundleError, match="is being written by another run; wait for it, or choose another -o/--output"):
            extend(folder)
        assert draft.old is not None
        draft.commit(draft.old.manifest.joined("denoiser", [make(draft, "onnx/b.onnx")]))
        with pytest.raises(BundleError, match="is being written by another run"):
            extend(folder)
    assert paths(extend(folder, "onnx/c.onnx")) == ["onnx/denoiser.onnx", "onnx/b.onnx", "onnx/c.onnx"]
    assert not (folder / LOCK).exists()


def test_without_locks_the_second_to_commit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = write_bundle(tmp_path / "b").folder
    with pytest.raises(BundleError, match="another run changed .* meanwhile; nothing of it was touched"), writing(folder) as draft:
        assert draft.old is not None
        partials = list(folder.glob(".partial-*"))
        extend(folder, "onnx/b.onnx")
        assert list(folder.glob(".partial-*")) == partials, "who may still be at it cannot be known, so nothing is cleared"
        after = contents(folder)
        draft.commit(draft.old.manifest.joined("denoiser", [make(draft, "onnx/b.onnx"), make(draft, "onnx/c.onnx")]))
    assert contents(folder) == {name: content for name, content in after.items() if not name.startswith(".")}
    Bundle.open(folder, hashes=True)


# --- where it goes wrong


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_lost(tmp_path: Path, code: int) -> None:
    folder = write_bundle(tmp_path / "b").folder
    before = contents(folder)
    with pytest.raises(BundleError, match="no space left on the disk of .*b; nothing was changed"), writing(folder) as draft:
        make(draft)
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    assert contents(folder) == before


def test_a_library_that_fails_on_a_full_disk_without_saying_why_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0))  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match="no space left"), writing(tmp_path / "b"):
        raise RuntimeError("Error reading protobuf spec.")
    with pytest.raises(BundleError, match="other"), writing(tmp_path / "b"):
        raise BundleError("other")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_a_large_array_is_said_too(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no space left"), writing(tmp_path / "b"), open("/dev/full", "wb", buffering=0) as stream:
        np.zeros(100_000).tofile(stream)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "no space left on the disk"), (errno.EIO, "cannot write in .*b: Input/output")])
def test_a_disk_that_fails_while_committing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    folder = write_bundle(tmp_path / "b").folder
    users(folder)
    before = contents(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(BundleError, match=words), writing(folder) as draft:
        assert draft.old is not None
        grown = draft.old.manifest.joined("denoiser", [make(draft), make(draft, "new/b.onnx")])
        # Python 3.10's paths hold os.mkdir since they were imported.
        monkeypatch.setattr(Path if call == "mkdir" else os, call, fail)
        draft.commit(grown)
    assert contents(folder) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot write in .*file/bundle: Not a directory"), writing(tmp_path / "file" / "bundle"):
        pytest.fail("the block must not run")


def test_read_only_files_can_be_kept(tmp_path: Path) -> None:
    with writing(tmp_path / "b") as draft:
        made = make(draft)
        (draft.stage / made.path).chmod(0o444)
        assert draft.commit(manifest(artifacts=(made,)))


def test_a_disk_that_was_just_mounted_is_empty_and_a_picture_makes_a_folder_one_that_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    (folder / "lost+found").mkdir(parents=True)
    (folder / "lost+found" / "inode").touch()
    assert standing(folder, overwrite=False).text is None
    (folder / ".partial-mine").mkdir()
    (folder / ".partial-mine" / "cat.jpg").write_text("cat")
    with pytest.raises(BundleError, match="exists and is not a bundle; it is left alone"), writing(folder, overwrite=True):
        pytest.fail("the block must not run")
    assert (folder / ".partial-mine" / "cat.jpg").read_text() == "cat"


def test_only_partial_folders_of_ours_are_swept_and_only_files_that_are_as_noted(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b").folder
    (folder / ".partial-theirs").mkdir()
    (folder / ".partial-theirs" / "file").write_text("theirs")
    (folder / "changed").write_text("by the user")
    (folder / "moved").write_text("by the killed run")
    noted = [entry(folder, folder / name) for name in ("changed", "moved", "onnx/denoiser.onnx")]
    (folder / "changed").write_text("by the user since")
    leftovers.note(leftovers.begin(folder), noted)
    extend(folder, "onnx/b.onnx")
    assert contents(folder).keys() == {".partial-theirs/file", "changed", MANIFEST, "onnx/denoiser.onnx", "onnx/b.onnx"}


def test_a_copy_shares_nothing_and_damage_is_not_copied(tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "a")
    with writing(tmp_path / "b") as draft:
        draft.copy(source)
        made: Manifest = draft.commit(source.manifest).manifest
    assert made == source.manifest
    for file in made.files():
        assert not os.path.samefile(tmp_path / "a" / file.path, tmp_path / "b" / file.path)
    (tmp_path / "a/onnx/denoiser.onnx").write_bytes(b"NOT really a graph")
    assert (tmp_path / "b/onnx/denoiser.onnx").read_bytes() == OLD
    with pytest.raises(BundleError, match=r"a/onnx/denoiser\.onnx is damaged"), writing(tmp_path / "c") as draft:
        draft.copy(source)
    assert not (tmp_path / "c").exists()
