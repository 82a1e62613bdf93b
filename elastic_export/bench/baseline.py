"""The original in torch, eager and compiled, as runtimes of a benchmark: what people compare with."""

import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic_bench.runtimes import GRAPH, Opened
from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle, sha256
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.errors import InferenceError, MissingError, ModelError
from elastic_runtime.sessions.session import Arrays, Session

if TYPE_CHECKING:
    from elastic_export.capture.zoo import Request

# name -> whether it is compiled, and torch's device
BASELINES = {
    "torch": (False, "cpu"), "torch-compile": (True, "cpu"), "torch-cuda": (False, "cuda"), "torch-compile-cuda": (True, "cuda"),
}  # fmt: skip


@dataclass(frozen=True)
class TorchRuntime:
    """`checkpoint` holds the weights (a file, or a diffusers folder) where the model is neither a packaged sample nor a random one."""

    name: str
    checkpoint: Path | None = None
    artifact: str | None = None
    precision: str = EXACT

    def obstacle(self, bundle: Bundle) -> str | None:
        if missing := [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]:
            return f"{missing[0]} is not installed: pip install 'elastic-export[torch]'"
        compiled, device = BASELINES[self.name]
        if device != "cpu" and not _sees(device):
            return f"this torch sees no {device} device"
        if compiled and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            return "torch.compile needs a C++ compiler, and there is none"
        try:
            self._find(bundle.manifest)
        except (ModelError, MissingError) as error:
            return str(error)
        return None

    def open(self, bundle: Bundle, threads: int) -> Opened:
        import torch

        torch.set_num_threads(threads)
        module = self._find(bundle.manifest)()
        # The bound of float32, as for an artifact: eager torch wrote the recording, perhaps on another processor.
        session = TorchSession(bundle.manifest.graphs[GRAPH], module, *BASELINES[self.name])
        return Opened(session, None, PRECISIONS[EXACT].tolerance)

    def _find(self, manifest: Manifest) -> Callable[[], Any]:
        """What loads the original; raises ModelError where its weights are not at hand."""
        from elastic_export.capture.zoo import load

        if manifest.model.patches is None:
            wanted = request(manifest, self.checkpoint)
            return lambda: load(wanted).module
        from elastic_export.capture.folders import capture_folder

        path = diffusers_folder(manifest, self.checkpoint)
        return lambda: capture_folder(path, ("transformer",), None, Span(1, 1), digest=False).graphs[0].module


class TorchSession(Session):
    """A module as a session on one of torch's devices; compiled with dynamic shapes where `compiled`, when it first runs."""

    def __init__(self, graph: Graph, module: Any, compiled: bool = False, device: str = "cpu"):
        super().__init__(graph)
        import torch

        from elastic_targets.weights import filled

        self._torch = torch
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # what the compiler thinks of a graph is not the benchmark's to tell
        module = filled(module).to(device)
        self._device, self._module = device, torch.compile(module, dynamic=True) if compiled else module
        name = "CPU" if device == "cpu" else torch.cuda.get_device_name()
        self.where = f"torch {torch.__version__.split('+')[0]} {name} {'compiled' if compiled else 'eager'}"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._module is None:
            raise InferenceError("this session is closed")
        with self._torch.inference_mode():
            result = self._module(
                **{name: self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for name, array in feeds.items()}
            )
        results = result if isinstance(result, tuple) else (result,)
        return {spec.name: value.cpu().numpy() for spec, value in zip(self.graph.outputs, results, strict=True)}

    def close(self) -> None:
        self._module = None


def _sees(device: str) -> bool:
    import torch

    return device == "cuda" and torch.cuda.is_available()


def diffusers_folder(manifest: Manifest, checkpoint: Path | None = None) -> Path:
    """The very diffusers folder that a bundle was made from: a packaged sample's, or `checkpoint`.

    Raises: ModelError where it is not at hand, or `checkpoint` is another one.
    """
    from elastic_export.capture.zoo import locate, samples
    from elastic_export.foreign.folder import Folder

    name, wanted = manifest.model.name, manifest.provenance.checkpoint_sha256
    path = checkpoint or (locate(name) if name in samples() else None)
    if path is None:
        named = f" ({manifest.provenance.checkpoint})" if manifest.provenance.checkpoint else ""
        raise ModelError(f"the bundle does not hold the original's weights{named}: give its diffusers folder with --checkpoint DIR")
    if not path.is_dir():
        raise ModelError(f"there is no folder {path}")
    if Folder.open(path).component("transformer").sha256() != wanted:
        raise ModelError(f"{path} is not what the bundle was made from: the SHA-256 of its transformer is not the manifest's")
    return path


def request(manifest: Manifest, checkpoint: Path | None = None) -> "Request":
    """How the zoo loads the very model that a bundle was made from.

    Raises: ModelError where its weights are not at hand, or `checkpoint` holds other ones.
    """
    from elastic_export.capture.zoo import FAMILIES, Request, samples
    from elastic_export.foreign.weights import checkpoint_files, digest

    model, wanted = manifest.model, manifest.provenance.checkpoint_sha256
    if model.name in samples() and sha256(samples()[model.name].with_suffix(".safetensors")) == wanted:
        return Request(model.name)
    if model.family not in FAMILIES:
        raise ModelError(f"this version has no family {model.family!r}; it has {', '.join(FAMILIES)}")
    if model.weights == "random":
        return Request(model.family, random_weights=True, overrides=model.config)
    if checkpoint is None:
        named = f" ({manifest.provenance.checkpoint})" if manifest.provenance.checkpoint else ""
        raise ModelError(f"the bundle does not hold the original's weights{named}: give them with --checkpoint FILE")
    if not checkpoint.exists():
        raise ModelError(f"there is no file {checkpoint}")
    if digest(checkpoint_files(checkpoint)) != wanted:
        raise ModelError(f"{checkpoint} is not what the bundle was made from: its SHA-256 is not the manifest's")
    return Request(model.family, checkpoint, overrides=model.config)
