"""`push`, and commands that take a name on the hub, as users type them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="names on the hub need its client")

import fake_hub
import fakes

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way to send a file


@pytest.fixture
def server() -> Iterator[fake_hub.Hub]:
    with fake_hub.serving() as server:
        yield server


def test_push_shows_what_it_did(server: fake_hub.Hub, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.direct(monkeypatch, server, str(tmp_path / "cache"), fake_hub.TOKEN)
    bundle = fakes.write_bundle(tmp_path / "digits").folder
    shown = run("push", bundle, "me/digits", "--private")
    assert (shown.code, "pushed 3 files" in shown.out, "add the one that the model's weights came with" in shown.err) == (0, True, True)
    document = json.loads(run("push", bundle, "me/digits", "-m", "again", "--json").out)
    assert document["schema"].startswith("elastic-export/push/")
    assert document["pushed"]["repository"] == "me/digits"
    assert server.repos["me/digits"].messages[-1] == "again"
    inspected = run("inspect", "me/digits", "--json")
    assert json.loads(inspected.out)["manifest"]["model"]["name"] == fakes.manifest().model.name
    assert run("push", bundle, "digits").code == 2
    assert run("inspect", "me/nothing").code == 2


def test_a_bundle_is_drawn_by_its_name_and_by_its_cache_alone(server: fake_hub.Hub, digits: Path, tmp_path: Path) -> None:
    """With the real client's own settings, in processes of their own."""
    files = {path.relative_to(digits).as_posix(): path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    server.add("me/digits", files, private=True)

    def cli(*arguments: str, **words: Any) -> subprocess.CompletedProcess[str]:
        settings = fake_hub.environment(server, str(tmp_path / "home"), **words)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
        command = [sys.executable, "-c", "from elastic_export.cli import main; main()", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    drawn = cli("generate", "me/digits", "-o", "7.png", "--classes", "7", "--latents", "16", "--steps", "2", token=fake_hub.TOKEN)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "7.png").is_file()
    assert (tmp_path / "home" / "hub" / "models--me--digits").is_dir()
    refused = cli("inspect", "me/digits", token="hf_wrong")
    assert (refused.returncode, "Traceback" in refused.stderr) == (0, False)  # the cache has it, as the client has it
    server.repos.clear()
    offline = cli("inspect", "me/digits", "--json", offline=True)
    assert json.loads(offline.stdout)["manifest"]["model"]["weights"] == "random"
    lacking = cli("inspect", "me/other", offline=True)
    assert lacking.returncode == 3
    assert "HF_HUB_OFFLINE is set" in " ".join(lacking.stderr.split())
