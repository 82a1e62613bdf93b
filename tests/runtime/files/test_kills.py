"""A run that is killed leaves the old bundle or the new one, and the next run clears up; another run is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import write_bundle

from elastic_runtime import Bundle, BundleError
from elastic_runtime.files.folder import writing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and sends SIGKILL, which only POSIX has")
KILLING = Path(__file__).parents[2] / "fakes" / "killing.py"


def run(*command: str | Path, **named: Any) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE, env=environment, **named)


def test_a_kill_at_any_moment_leaves_the_old_bundle_or_the_new_one_and_the_next_run_clears_up(tmp_path: Path) -> None:
    old = write_bundle(tmp_path / "old").folder
    (old / "onnx" / "cat.png").write_bytes(b"the user's")
    (tmp_path / "work").mkdir()
    with run(KILLING, old, tmp_path / "work") as program:
        rows = json.loads(program.communicate()[0])
    assert len(rows) > 100, "the calls are counted no more"
    replaced = {"onnx-2/denoiser.onnx", "trt/new.onnx"}
    for row in rows:
        if row["there"]:
            assert set(row["found"]) in ({"onnx/denoiser.onnx"}, replaced), row
            assert row["then"] == row["found"], row
            folders = {"onnx", *(Path(name).parent.as_posix() for name in row["found"])}
            assert set(row["every"]) == {"elastic.json", "onnx/cat.png", *folders, *row["found"]}, row
        elif row["found"] == ["onnx/denoiser.onnx", "trt/new.onnx"]:
            assert set(row["every"]) == {"elastic.json", "onnx", "trt", *row["found"]}, row
        else:
            assert "is not a bundle" in row["found"], row
            assert row["every"] == [], row
    for there in (True, False):
        assert len({str(row["found"]) for row in rows if row["there"] == there and "not exist" not in row["found"]}) >= 2, "old and new"


HOLD = """
import sys
from pathlib import Path
from elastic_runtime.files.folder import writing
with writing(Path(sys.argv[1])) as draft:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_another_process_is_refused_until_the_first_has_ended_however_it_ends(tmp_path: Path, end: str) -> None:
    folder = write_bundle(tmp_path / "b").folder
    with run("-c", HOLD, folder, stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BundleError, match="is being written by another run"), writing(folder):
            pytest.fail("both are at it")
        assert Bundle.open(folder, hashes=True)
        if end == "killed":
            holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with writing(folder) as draft:
        assert draft.old is not None
        assert len(list(folder.glob(".partial-*"))) == 1, "the other's is gone"
    assert not list(folder.glob(".*"))
