"""`optimum-cli export elastic`: the real optimum finds the command and runs it."""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("optimum.commands", reason="the plugin is for optimum: pip install 'elastic-export[optimum]'")

CLI = Path(sysconfig.get_path("scripts")) / "optimum-cli"


def optimum(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(CLI), "export", "elastic", *arguments], capture_output=True, text=True, timeout=300)


def test_the_same_command_writes_the_same_bundle(golden: Path, tmp_path: Path) -> None:
    model = ("elit-sit", "--checkpoint", str(golden / "elit-c.pt"), "--config", str(golden / "elit-c.json"))
    done = optimum("onnx", *model, "-o", str(tmp_path / "out"), "--latents", "8-32", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    assert (manifest["axes"][0]["min"], manifest["axes"][0]["max"]) == (8, 32)
    assert manifest["provenance"]["command"].startswith("optimum-cli export elastic onnx elit-sit")
    assert (tmp_path / "out" / "onnx" / "denoiser.onnx").is_file()


def test_its_errors_and_help_are_those_of_the_command() -> None:
    help_ = optimum("onnx", "--help")
    assert help_.returncode == 0
    assert "--latents" in help_.stdout
    wrong = optimum("onnx", "nowhere", "-o", "nowhere")
    assert wrong.returncode == 2
    assert "there is no model 'nowhere'" in wrong.stderr
