"""A short form of each long run: see the modules beside this one, `make fuzz`, `make soak` and `make crash`."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases import narrow

pytest.importorskip("torch", reason="the bundles are exported for it")
pytest.importorskip("onnxruntime", reason="the pictures are drawn through ONNX Runtime")
pytest.importorskip("diffusers", reason="some folders are diffusers'")

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="they watch and kill processes as Linux does")


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_bad_inputs_are_used_or_refused_in_a_sentence() -> None:
    assert "manifests         10 tries" in run("fuzz", "--tries", "10", "--seed", "1000000")


def test_pictures_come_out_the_same_again_and_memory_stays() -> None:
    assert "40 pictures" in run("soak", "--pictures", "40", "--backend", "ort")


def test_a_server_holds_as_much_after_some_hundred_pictures(digits: Path) -> None:
    pytest.importorskip("uvicorn", reason="serving needs uvicorn")
    pytest.importorskip("httpx2", reason="what talks to the server")
    report = run("soak_serve", str(digits), "--pictures", "400")
    assert "faults: none" in report
    assert " 0 differed" in report


@pytest.mark.parametrize("kind", narrow(["generate", "extend"]))
def test_what_is_killed_leaves_the_old_or_the_new(kind: str) -> None:
    assert kind in run("crash", kind, "--kills", "1", "--disks", "1")
