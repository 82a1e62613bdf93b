"""What a command reads and writes besides files: full disks behind pipes, narrow terminals, locales that know no Unicode."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import write_bundle

from elastic_export.cli import show

RUN = (sys.executable, "-c", "from elastic_export.cli import main; main()")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [("inspect", "{}"), ("inspect", "{}", "--json"), ("doctor",), ("devices", "{}"), ("--help",)])
def test_a_full_disk_behind_the_output_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    bundle = str(write_bundle(tmp_path / "b").folder)
    with Path("/dev/full").open("w") as full:
        arguments = [word.format(bundle) for word in words]
        done = subprocess.run([*RUN, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.strip().splitlines() == ["error: No space left on device"], done.stderr


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    bundle = str(write_bundle(tmp_path / "b").folder)
    with subprocess.Popen([*RUN, "inspect", bundle, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode in (0, 1)  # the latter is typer's


def test_figures_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    show.table(
        "errors",
        ("budget", "max abs", "cosine", "PSNR dB", "bound"),
        [("latents=64,loops=12", "2.2e-07", "0.9999999", "140.3", "1e-05")],
    )
    out = capsys.readouterr().out
    assert all(figure in out for figure in ("2.2e-07", "0.9999999", "140.3", "1e-05"))
    assert "…" not in out


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_json_is_utf_8_whatever_the_locale_says(locale: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="exporting reads the file")
    config = tmp_path / "größe.json"
    config.write_bytes(json.dumps({"family": "elit-sit", "größe": "グ"}, ensure_ascii=False).encode())
    words = ("onnx", "elit-sit", "--random-weights", "--config", str(config), "-o", str(tmp_path / "b"), "--dry-run")
    environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-X", "utf8=0", *RUN[1:], *words], capture_output=True, check=False, env=environment)
    message = done.stderr.decode()
    assert (done.returncode, "has an unknown field 'größe'" in " ".join(message.split())) == (2, True), message
