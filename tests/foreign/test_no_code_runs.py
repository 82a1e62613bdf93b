"""No code of a model folder runs, in whichever file it lies and whatever standard input answers."""

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")

import folders
import torch

from elastic_export.capture.folders import capture_folder
from elastic_export.foreign.checkpoint import read_checkpoint
from elastic_runtime import ElasticError, ModelError, Span
from elastic_targets.weights import filled

COMPONENTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "transformer", "vae", "scheduler")
CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
AUTO = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor")


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once any code of the folder has run; the terminal says yes to every question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "code-ran"


def edited(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def everything(folder: Path) -> None:
    """Read all of a folder, down to the weights."""
    captured = capture_folder(folder, None, None, Span(1, 1))
    for graph in captured.graphs:
        filled(graph.module)


def refusal(folder: Path) -> str | None:
    """Why the folder is refused, or None where all of it was read."""
    try:
        everything(folder)
    except ElasticError as error:
        return str(error)
    return None


def code(canary: Path) -> str:
    """A module that leaves the canary when it is imported, and has a class of every name that a config may ask for."""
    names = ("CanaryConfig", "CanaryModel", "CanaryTokenizer", "FluxTransformer2DModel", "AutoencoderKL")
    return f"open({str(canary)!r}, 'w').close()\n" + "".join(f"class {name}: pass\n" for name in names)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_module_that_a_config_names_is_not_imported(component: str, canary: Path, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux(), text=True)
    for place in (folder, folder / component):
        (place / "canary.py").write_text(code(canary))
    name = CONFIGS.get(component.split("_")[0], "config.json")
    auto = {each: ["canary.CanaryTokenizer"] * 2 if "Token" in each else "canary.CanaryModel" for each in AUTO}
    edited(folder / component / name, lambda config: config.update(auto_map=auto, tokenizer_class="CanaryTokenizer"))
    message = refusal(folder)
    assert message is None or component in message
    assert not canary.exists()


@pytest.mark.parametrize("component", [component for component in COMPONENTS if "tokenizer" not in component])
def test_a_class_of_the_folders_own_is_not_imported(component: str, canary: Path, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux(), text=True)
    (folder / component / "canary.py").write_text(code(canary))
    (folder / "canary.py").write_text(code(canary))
    edited(folder / "model_index.json", lambda index: index.update({component: ["canary", "CanaryModel"], "_class_name": ["canary", "C"]}))
    file = folder / component / CONFIGS.get(component, "config.json")
    edited(file, lambda config: config.update(_class_name=["canary", "CanaryModel"], architectures=["canary.CanaryModel"]))
    message = refusal(folder)
    assert message is None or component in message
    assert not canary.exists()


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside safetensors"])
def test_pickled_weights_are_not_loaded(component: str, beside: bool, canary: Path, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux(), text=True)
    (safe,) = (folder / component).glob("*.safetensors")
    stem = "pytorch_model" if component.startswith("text") else "diffusion_pytorch_model"
    (folder / component / f"{stem}.bin").write_bytes(pickle.dumps(Payload(canary)))
    if beside:
        everything(folder)
    else:
        safe.unlink()
        with pytest.raises(ModelError, match=r"\.bin"):
            everything(folder)
    assert not canary.exists()


def test_a_checkpoint_with_a_payload_is_refused(canary: Path, tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(1)}, "args": Payload(canary)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="could run code"):
        read_checkpoint(tmp_path / "a.pt")
    assert not canary.exists()


def test_a_tokenizer_with_code_is_refused_with_what_to_do(canary: Path, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux(), text=True)
    (folder / "tokenizer" / "canary.py").write_text(code(canary))
    auto = {"AutoTokenizer": ["canary.CanaryTokenizer", None]}
    edited(folder / "tokenizer" / "tokenizer_config.json", lambda config: config.update(auto_map=auto, tokenizer_class="CanaryTokenizer"))
    with pytest.raises(ModelError, match="no code of a model folder is run: save it there as a tokenizer.json that needs none"):
        capture_folder(folder, None, None, Span(1, 1))
    assert not canary.exists()
