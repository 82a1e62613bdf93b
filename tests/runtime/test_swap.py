import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastic_runtime import BundleError
from elastic_runtime.swap import exchange, recover, staging

posix = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL, which only POSIX has")


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def old(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system whose C library knows no atomic exchange."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


def killed_while(program: str, folder: Path) -> None:
    """Run a program that stages a new folder at `folder` and is killed by SIGKILL where the program says so."""
    head = "import os, signal\nfrom pathlib import Path\nfrom elastic_runtime import swap\n"
    head += "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", head + program, str(folder)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er" / "bundle"
    with staging(folder) as stage:
        (stage / "file").write_text("new")
        assert not folder.exists()
    assert contents(folder) == {"file": "new"}
    assert list(folder.parent.iterdir()) == [folder]


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = old(tmp_path)
    with staging(folder) as stage:
        (stage / "other").write_text("new")
        assert contents(folder) == {"file": "old"}
    assert contents(folder) == {"other": "new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = old(tmp_path)
    with pytest.raises(KeyError), staging(folder) as stage:
        (stage / "file").write_text("half")
        raise KeyError("any")
    assert contents(folder) == {"file": "old"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_lost(tmp_path: Path, code: int) -> None:
    folder = old(tmp_path)
    with pytest.raises(BundleError, match="no space left on the disk of .*bundle; nothing was changed"), staging(folder) as stage:
        (stage / "file").write_text("half")
        raise OSError(code, os.strerror(code))
    assert contents(folder) == {"file": "old"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_a_large_array_is_said_too(tmp_path: Path) -> None:
    folder = old(tmp_path)
    with pytest.raises(BundleError, match="no space left"), staging(folder), open("/dev/full", "wb", buffering=0) as stream:
        np.zeros(100_000).tofile(stream)
    assert contents(folder) == {"file": "old"}


def test_a_disk_that_fills_up_while_flushing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = old(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="no space left"), staging(folder) as stage:
        (stage / "file").write_text("new")
    assert contents(folder) == {"file": "old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot write beside .*file/bundle: File exists"), staging(tmp_path / "file" / "bundle"):
        pytest.fail("the block must not run")


def test_read_only_files_can_be_kept(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    with staging(folder) as stage:
        (stage / "file").write_text("new")
        (stage / "file").chmod(0o444)
    assert contents(folder) == {"file": "new"}


def test_a_link_to_a_folder_stays_a_link_to_what_replaced_it(tmp_path: Path) -> None:
    folder, link = old(tmp_path), tmp_path / "link"
    os.symlink(folder, link)
    with staging(link) as stage:
        (stage / "file").write_text("new")
    assert link.is_symlink()
    assert contents(folder) == {"file": "new"}
    assert sorted(tmp_path.iterdir()) == [folder, link]


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    for folder in (left, right):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    exchange(left, right)
    assert (contents(left), contents(right)) == ({"file": "right"}, {"file": "left"})


def test_exchange_works_where_the_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    folder = old(tmp_path)
    with staging(folder) as stage:
        (stage / "file").write_text("new")
    assert contents(folder) == {"file": "new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    folder = old(tmp_path)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), staging(folder) as stage:
        (stage / "file").write_text("new")
    assert contents(folder) == {"file": "old"}


@posix
@pytest.mark.parametrize(
    "moment", ["(stage / 'file').write_text('half'); die()", "swap.os.fsync = die; (stage / 'file').write_text('half')"]
)
def test_a_kill_leaves_the_old_folder_and_the_next_write_sweeps_up(tmp_path: Path, moment: str) -> None:
    folder = old(tmp_path)
    killed_while(f"import sys\nwith swap.staging(Path(sys.argv[1])) as stage:\n    {moment}\n", folder)
    assert contents(folder) == {"file": "old"}
    assert len(list(tmp_path.iterdir())) == 2, "the killed run left its unfinished folder"
    with staging(folder) as stage:
        (stage / "file").write_text("new")
    assert contents(folder) == {"file": "new"}
    assert list(tmp_path.iterdir()) == [folder]


KILL_BETWEEN_RENAMES = """
import ctypes, sys
ctypes.CDLL = lambda *_, **__: object()
real, count = Path.rename, 0
def rename(self, target):
    global count
    count += 1
    real(self, target)
    if count == {after}:
        die()
Path.rename = rename
with swap.staging(Path(sys.argv[1])) as stage:
    (stage / 'file').write_text('new')
"""


@posix
@pytest.mark.parametrize(("after", "found"), [(1, "old"), (2, "new"), (3, "new")])
def test_a_kill_between_the_renames_of_the_fallback_loses_nothing(tmp_path: Path, after: int, found: str) -> None:
    folder = old(tmp_path)
    killed_while(KILL_BETWEEN_RENAMES.format(after=after), folder)
    with pytest.raises(KeyError), staging(folder):
        raise KeyError("the next write fails, and still the folder is back")
    assert contents(folder) == {"file": found}
    assert list(tmp_path.iterdir()) == [folder]


@posix
def test_what_a_living_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    folder = old(tmp_path)
    theirs = tmp_path / f".bundle.partial-{os.getppid()}"
    theirs.mkdir()
    with staging(folder) as stage:
        (stage / "file").write_text("new")
    assert theirs.is_dir()
    assert contents(folder) == {"file": "new"}


def test_what_a_kill_put_aside_is_given_its_name_back_and_nothing_else_is_touched(tmp_path: Path) -> None:
    aside, unfinished = tmp_path / ".b[1].partial-4194999.old", tmp_path / ".b[1].partial-4194999"
    for folder in (aside, unfinished):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    recover(tmp_path / "b[1]")
    assert contents(tmp_path / "b[1]") == {"file": aside.name}
    assert unfinished.is_dir()
    recover(tmp_path / "b[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [unfinished.name, "b[1]"]
