"""What several tests share. Torch and the compilers are imported only by the fixtures that need them."""

import json
import logging
import os
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

# pytest (9) gives every logger that does not propagate its handlers, torch's own trace among them, which then writes down each graph that
# is traced: a tenth to a fifth of an export.
logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]

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
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Folders by name, each made by the process that asks first and shared by all: an export is most of what these tests take."""
    exporter()  # which brings the lock's library
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                make(shared / name)
        return shared / name

    return folder


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def golden_bundle(once: Once) -> Callable[..., Bundle]:
    """Bundles of the golden ELIT checkpoints `a`, `uvit-a`, ... and an opset, through the real export path. Tests must not change them."""
    elastic_export = exporter()

    def bundle(name: str, opset: int = 23) -> Bundle:
        config = GOLDEN / f"elit-{name}.json"
        family, checkpoint = json.loads(config.read_text())["family"], config.with_suffix(".pt")
        words = {"checkpoint": checkpoint, "config": config, "opset": opset, "command": f"elastic-export onnx {family}"}
        return Bundle.open(once(f"elit-{name}-{opset}", lambda folder: elastic_export.export(family, output=folder, **words)))

    return bundle


@pytest.fixture(scope="session")
def rounded(once: Once) -> Bundle:
    """The smallest golden ELIT in every precision of TensorRT's Q/DQ, each proven: fp8 by the export path, the others beside it."""
    exporter()

    def make(folder: Path) -> None:
        from fakes import write_manifest

        from elastic_export.capture.capture import capture
        from elastic_export.capture.zoo import Request, load
        from elastic_export.exporting import export_capture
        from elastic_export.verifying import verify_artifact
        from elastic_runtime import Span
        from elastic_targets.onnx.lower import OnnxOptions, lower
        from elastic_targets.onnx.qdq import FORMS

        model = load(Request("elit-sit", GOLDEN / "elit-c.pt", GOLDEN / "elit-c.json"))
        captured, aside = capture(model, {}, Span(1, 2)), folder.with_name("aside")
        others = [OnnxOptions(precision=name) for name in FORMS if name != "fp8"]
        made = [lower(captured.graphs[0], options, aside)[0] for options in others]  # of one graph in floats, which takes the time
        bundle = export_capture(captured, "onnx", OnnxOptions(precision="fp8"), folder, "elastic-export onnx", verify="ends")
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        proven = [verify_artifact(bundle, "denoiser", artifact) for artifact in made]
        write_manifest(folder, bundle.manifest.joined("denoiser", proven))

    return Bundle.open(once("elit-c-rounded", make))


@pytest.fixture(scope="session")
def backbone_bundle(once: Once, backbone: Callable[[str], Any]) -> Callable[[str, int], Bundle]:
    """The same of the recorded plain backbones."""
    elastic_export = exporter()

    def bundle(name: str, opset: int) -> Bundle:
        recorded = backbone(name)
        words = {"checkpoint": recorded.checkpoint, "config": recorded.config, "opset": opset}
        return Bundle.open(once(f"{name}-{opset}", lambda folder: elastic_export.export(recorded.family, output=folder, **words)))

    return bundle


def exporter() -> Any:
    """The package that exports; where it cannot, tests that need it are skipped."""
    pytest.importorskip("torch", reason="exporting needs torch")
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    import elastic_export

    return elastic_export


@pytest.fixture
def bundle_copy(golden_bundle: Callable[[str], Bundle], tmp_path: Path) -> Path:
    """A copy of the smallest golden bundle, to damage or extend."""
    return Path(shutil.copytree(golden_bundle("c").folder, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def digits(once: Once) -> Path:
    """A bundle that draws one-channel pictures, with random weights."""
    elastic_export = exporter()
    config = {
        "input_size": 16, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2,
        "num_classes": 10, "group_size": 2, "head_blocks": 1, "tail_blocks": 1,
    }  # fmt: skip

    def make(folder: Path) -> None:
        file = folder.with_suffix(".json")
        file.write_text(json.dumps(config))
        elastic_export.export("elit-sit", output=folder, config=file, random_weights=True)

    return once("digits", make)


@pytest.fixture(scope="session")
def in_two(once: Once, digits: Path) -> Path:
    """The bundle of the digits with the same model in two files beside its own, in float32, in few bits and as TensorRT takes few bits."""
    elastic_export = exporter()

    def make(folder: Path) -> None:
        shutil.copytree(digits, folder)
        words: dict[str, Any] = {"config": digits.with_suffix(".json"), "random_weights": True, "verify": "ends"}
        elastic_export.export("elit-sit", output=folder, precision="int4w", **words)
        for precision in ("fp32", "int4w", "fp8"):
            elastic_export.export("elit-sit", output=folder, precision=precision, conditions_apart=True, **words)

    return once("digits-in-two", make)


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
