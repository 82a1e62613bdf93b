"""One file is whole or as it was, and nothing that stands beside it is touched."""

import errno
import os
import stat
from pathlib import Path

import pytest
from PIL import Image

from elastic_export import pictures
from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.files import atomic, cache

posix = pytest.mark.skipif(os.name != "posix", reason="asks for links and rights as POSIX has them")


def test_a_file_is_written_with_its_folder_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    for content in (b"old", b"new"):
        atomic.write(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["in the block", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    if moment != "in the block":
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(type(error)), atomic.replacing(path) as stream:
        assert path.read_bytes() == b"old"
        stream.write(b"new")
        if moment == "in the block":
            raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_planted_link_under_a_temporary_name_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name cannot be foreseen; where it is, all the same, what stands there is not opened."""
    victim, folder = tmp_path / "victim", tmp_path / "pictures"
    victim.write_text("precious")
    folder.mkdir()
    os.symlink(victim, folder / f".x.png.{os.getpid()}")
    tokens = iter(["planted", "fresh"])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: next(tokens))
    os.symlink(victim, folder / ".x.png.planted")
    pictures.save(Image.new("L", (4, 4)), folder / "x.png")
    assert victim.read_text() == "precious"
    assert not (folder / "x.png").is_symlink()
    with Image.open(folder / "x.png") as picture:
        assert picture.size == (4, 4)


@posix
def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("theirs")
    os.symlink(tmp_path / "target", tmp_path / "file")
    atomic.write(tmp_path / "file", b"new")
    assert (tmp_path / "target").read_text() == "theirs"
    assert (tmp_path / "file").read_bytes() == b"new"


@posix
def test_a_file_gets_the_rights_that_files_get_here(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic.write(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device")
def test_what_is_no_ordinary_file_is_never_replaced() -> None:
    with pytest.raises(UsageError, match="/dev/null is no ordinary file: choose another name"):
        atomic.refuse_clobber(Path("/dev/null"), overwrite=True, option="name")


def test_a_place_that_cannot_be_written_is_refused_before_and_said_after(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write .*file is a file; choose another -o/--output"):
        atomic.refuse_clobber(tmp_path / "file" / "x.png", overwrite=False)
    with pytest.raises(UsageError, match="cannot write .*x.png: "):
        atomic.save(tmp_path / "file" / "x.png", b"")


def test_a_user_without_a_home_folder_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingError, match="no home folder to keep caches in: set XDG_CACHE_HOME"):
        cache.folder("trt")


def test_what_another_user_could_have_put_into_a_cache_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("x", encoding="utf-8")
    cache.guard(mine)
    cache.guard(tmp_path)
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(PermissionError, match="is a link, or another user owns it or may write it"):
        cache.guard(tmp_path / "link")
    mine.chmod(0o666)
    with pytest.raises(PermissionError):
        cache.guard(mine)
    mine.chmod(0o644)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    if own:  # what root owns is the system's
        with pytest.raises(PermissionError):
            cache.guard(mine)
    with pytest.raises(FileNotFoundError):
        cache.guard(tmp_path / "nothing")
