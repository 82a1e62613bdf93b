"""A site is written whole or not at all, and nothing but a site's own files goes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.errors import BundleError, UsageError
from elastic_runtime.files import atomic
from elastic_runtime.files.site import FACTS, GENERATOR, embedded, standing, writing


def page(name: str, files: Sequence[FileEntry]) -> bytes:
    listed = [{"path": entry.path, "bytes": entry.bytes, "sha256": entry.sha256} for entry in files]
    text = embedded({"generator": GENERATOR, "folder": name, "files": listed})
    return f'<script type="application/json" id="site">{text}</script>'.encode()


def write(folder: Path, content: str, overwrite: bool = False) -> str:
    with writing(folder, overwrite) as draft:
        (draft.stage / "deep").mkdir()
        (draft.stage / "deep" / "a.js").write_text(content)
        files = draft.commit(page)
    return files[0].path.partition("/")[0]


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_named_by_its_content(tmp_path: Path) -> None:
    names = {write(tmp_path / place, content) for place, content in (("a", "one"), ("b", "one"), ("c", "two"))}
    assert len(names) == 2
    name = write(tmp_path / "a", "one", overwrite=True)
    assert listing(tmp_path / "a") == [f"{name}/deep/a.js", "index.html"]


def test_a_name_that_somebody_took_is_not_taken_again(tmp_path: Path) -> None:
    name = write(tmp_path / "a", "one")
    taken = tmp_path / "b" / name
    write(tmp_path / "b", "another")
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert write(tmp_path / "b", "one", overwrite=True) == f"{name}-2"
    assert listing(tmp_path / "b") == [f"{name}-2/deep/a.js", f"{name}/mine.txt", "index.html"]


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_failure_at_any_moment_leaves_the_old_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    write(tmp_path, "old")
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(atomic, "write", lambda path, content, beside: fails() if path.name == "index.html" else None)
        else:
            patch.setattr("os.rename", fails)
        with pytest.raises(BundleError, match="cannot write in .*: Input/output error; nothing was changed"):
            write(tmp_path, "new", overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    write(tmp_path, "old")
    program = """
import os, sys
from pathlib import Path
from elastic_runtime.files import atomic, site
whole = atomic.write
atomic.write = lambda path, *rest, **more: os._exit(9) if path.name == "index.html" else whole(path, *rest, **more)
with site.writing(Path(sys.argv[1]), overwrite=True) as draft:
    (draft.stage / "a.js").write_text("lost")
    draft.commit(lambda name, files: b"never written")
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert any(name.endswith("/a.js") for name in listing(tmp_path)), "it came as far as that"
    name = write(tmp_path, "new", overwrite=True)
    assert listing(tmp_path) == [f"{name}/deep/a.js", "index.html"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with writing(tmp_path / "a"), pytest.raises(BundleError, match="is being written by another run"):
        write(tmp_path / "a", "two")
    assert not (tmp_path / "a").exists(), "a folder that nothing was put into goes again"


def test_what_stands_there(tmp_path: Path) -> None:
    write(tmp_path, "old")
    with pytest.raises(UsageError, match="replace it with --overwrite"):
        standing(tmp_path, overwrite=False)
    assert len(standing(tmp_path, overwrite=True).files) == 1
    (tmp_path / "elastic.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a site of ours"):
        standing(tmp_path, overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BundleError, match="is not a site of ours"):
        standing(file, overwrite=True)


def test_no_text_ends_the_element_that_it_stands_in() -> None:
    text = embedded({"name": "</script><!-- &amp;"})
    assert not set("<>&") & set(text)
    assert FACTS.search(f'<script type="application/json" id="site">{text}</script>'.encode())
