"""What several tests share. Torch and the compilers are imported only by the fixtures that need them."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from elastic_runtime import Bundle

# The same examples in every run, and no deadline: a test must not fail because the machine is busy.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder is left alone: tests have one of their own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded checkpoints, inputs and outputs."""
    return GOLDEN


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Recorded plain backbones by name, `uvit-a`, `hdit-b`: see `backbones.Backbone`."""
    from backbones import Backbone

    folder = tmp_path_factory.mktemp("configs")
    return lambda name: Backbone.read(GOLDEN, name, folder)


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Bundles of the golden ELIT checkpoints `a`, `uvit-a`, ... and an opset, each made once through the real export path. Tests must not
    change them."""
    pytest.importorskip("torch", reason="exporting needs torch")
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    import elastic_export

    made: dict[tuple[str, int], Bundle] = {}

    def bundle(name: str, opset: int = 23) -> Bundle:
        if (name, opset) not in made:
            config = GOLDEN / f"elit-{name}.json"
            family = json.loads(config.read_text())["family"]
            made[name, opset] = elastic_export.export(
                family,
                output=tmp_path_factory.mktemp("bundles") / f"elit-{name}",
                checkpoint=config.with_suffix(".pt"),
                config=config,
                opset=opset,
                command=f"elastic-export onnx {family}",
            )
        return made[name, opset]

    return bundle


@pytest.fixture
def bundle_copy(golden_bundle: Callable[[str], Bundle], tmp_path: Path) -> Path:
    """A copy of the smallest golden bundle, to damage or extend."""
    return Path(shutil.copytree(golden_bundle("c").folder, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that draws one-channel pictures, with random weights."""
    pytest.importorskip("torch", reason="exporting needs torch")
    pytest.importorskip("onnxruntime", reason="drawing needs ONNX Runtime")
    import elastic_export

    folder = tmp_path_factory.mktemp("digits")
    config = {
        "input_size": 16, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2,
        "num_classes": 10, "group_size": 2, "head_blocks": 1, "tail_blocks": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return elastic_export.export("elit-sit", output=folder / "bundle", config=folder / "config.json", random_weights=True).folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run `elastic-export` with arguments in this process, as its entry point does."""
    from elastic_export.cli import main

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["elastic-export", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "240")
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return command
