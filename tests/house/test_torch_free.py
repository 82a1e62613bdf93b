"""Nothing at the doors imports torch or a compiler, and their absence is advice."""

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import write_bundle

import elastic_export

BLOCKED = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "coremltools",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "diffusers",
    "safetensors",
    "optimum",
)
FOLDER = Path(elastic_export.__file__).parent / "cli"
# A command's file holds the function of its name.
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if f"\ndef {path.stem}(" in path.read_text(encoding="utf-8"))


def without(program: str, *arguments: str, blocked: tuple[str, ...] = BLOCKED) -> "subprocess.CompletedProcess[str]":
    """Run a program in a Python where these packages are not to be found."""
    head = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", head + program, *arguments], capture_output=True, text=True, check=False)


def command(*arguments: str, blocked: tuple[str, ...] = BLOCKED) -> "subprocess.CompletedProcess[str]":
    return without("from elastic_export.cli import main\nmain(sys.argv[1:])", *arguments, blocked=blocked)


def test_the_runtime_draws_without_any_of_them() -> None:
    program = """
import pkgutil, importlib, elastic_runtime
for module in pkgutil.walk_packages(elastic_runtime.__path__, 'elastic_runtime.'):
    importlib.import_module(module.name)
import elastic_export, elastic_targets
assert not [name for name in sys.modules if name.split('.')[0] in ('typer', 'rich') and sys.modules[name]], 'the runtime prints nothing'
print(len(elastic_runtime.__all__))
"""
    done = without(program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_needs_none_of_them(name: str) -> None:
    done = command(*[name] * bool(name), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: elastic-export" in done.stdout
    assert name in done.stdout
    if name:
        assert f"elastic-export {name}" in done.stdout.split("Example")[1], "the help shows an example"


@pytest.mark.parametrize(
    ("arguments", "blocked", "advice"),
    [
        (["onnx", "-o", "out"], BLOCKED, "pip install 'elastic-export[torch]'"),
        (["onnx", "-o", "out"], ("torch",), "pip install 'elastic-export[torch]'"),
        (["onnx", "-o", "out"], ("safetensors",), "pip install 'elastic-export[torch]'"),
        (["onnx", "-o", "out"], ("onnxscript",), "pip install 'elastic-export[torch]'"),
        (["models"], BLOCKED, "pip install 'elastic-export[torch]'"),
        (["demo", "-o", "out"], BLOCKED, "pip install 'elastic-export[torch]'"),
        (["generate", "BUNDLE", "-o", "x.png"], BLOCKED, "pip install 'elastic-export[ort]'"),
        (["verify", "BUNDLE"], BLOCKED, "pip install 'elastic-export[ort]'"),
    ],
)
def test_what_is_missing_is_answered_with_the_line_that_installs_it(
    arguments: list[str], blocked: tuple[str, ...], advice: str, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", channels=1).folder
    words = {"BUNDLE": str(bundle), "out": str(tmp_path / "out"), "x.png": str(tmp_path / "x.png")}
    done = command(*(words.get(word, word) for word in arguments), blocked=blocked)
    assert done.returncode == 3, done.stderr
    assert advice in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_looking_into_a_bundle_needs_none_of_them(tmp_path: Path) -> None:
    done = command("inspect", str(write_bundle(tmp_path / "bundle").folder))
    assert done.returncode == 0, done.stderr
    assert "axis latents: 4-64" in done.stdout
