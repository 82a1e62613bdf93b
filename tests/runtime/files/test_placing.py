"""Folders that are put among others': whole or not at all, never in the place of what is not ours."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from fakes import write_bundle

from elastic_runtime import BundleError, UsageError
from elastic_runtime.files import leftovers, placing


def ours(path: Path) -> bool:
    return (path / "mark").is_file()


def place(folder: Path, names: Mapping[str, str], overwrite: bool = False) -> None:
    with placing.placing(folder, dict.fromkeys(names, ours), overwrite) as placed:
        for name, text in names.items():
            (placed.stage / name).mkdir()
            (placed.stage / name / "mark").write_text(text)
        placed.commit()


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_several_have_their_places_beside_others(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("x")
    place(tmp_path, {"a": "1", "b": "1"})
    place(tmp_path, {"a": "2"}, overwrite=True)
    assert content(tmp_path) == {"theirs/x": "x", "a/mark": "2", "b/mark": "1"}


def test_what_is_not_ours_or_not_to_be_replaced_is_left_alone(tmp_path: Path) -> None:
    place(tmp_path, {"a": "1"})
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "a")
    for names, overwrite, words in (
        ({"a": "2"}, False, "replace it with --overwrite"),
        ({"a": "2", "b": "2"}, True, "did not write"),
        ({"c": "2"}, True, "did not write"),
    ):
        with pytest.raises(UsageError, match=words):
            place(tmp_path, names, overwrite)
    assert content(tmp_path) == {"a/mark": "1"}


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path, {"a": "1"})
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "a" and leftovers.FILES in Path(source).parts:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(UsageError, match="cannot write in .*Input/output error"):
            place(tmp_path, {"a": "2"}, overwrite=True)
    assert content(tmp_path) == {"a/mark": "1"}


def test_what_a_killed_run_moved_aside_comes_back(tmp_path: Path) -> None:
    place(tmp_path, {"a": "1", "b": "1"})
    partial = leftovers.begin(tmp_path)
    os.rename(tmp_path / "a", partial / "before-a")
    (partial / leftovers.FILES / "a").mkdir()
    place(tmp_path, {"c": "1"})
    assert content(tmp_path) == {"a/mark": "1", "b/mark": "1", "c/mark": "1"}


def test_a_bundles_folder_is_no_place(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="is a bundle"):
        place(tmp_path / "b", {"a": "1"})


def test_what_a_hub_keeps_as_a_link_is_placed_as_the_file(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    (entry,) = bundle.manifest.graphs["denoiser"].artifacts[0].files
    file = bundle.file(entry.path)
    file.rename(tmp_path / "blob")
    file.symlink_to(os.path.relpath(tmp_path / "blob", file.parent))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    placing.link(bundle, entry, tmp_path / "deep" / "er" / "linked")
    assert not (tmp_path / "deep" / "er" / "linked").is_symlink()
    assert (tmp_path / "deep" / "er" / "linked").samefile(tmp_path / "blob")


def test_where_there_are_no_links_it_is_a_copy_that_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "b")
    (entry,) = bundle.manifest.graphs["denoiser"].artifacts[0].files
    placing.link(bundle, entry, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(bundle.file(entry.path))

    def none(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", none)
    placing.link(bundle, entry, tmp_path / "copied")
    assert not (tmp_path / "copied").samefile(bundle.file(entry.path))
    assert (tmp_path / "copied").read_bytes() == bundle.file(entry.path).read_bytes()
    bundle.file(entry.path).write_bytes(b"not really a Graph")
    with pytest.raises(BundleError, match="damaged"):
        placing.link(bundle, entry, tmp_path / "damaged")
