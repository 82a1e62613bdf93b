"""The original run as people run it without us: in torch, eager or compiled, in its faster modes, and converted by OpenVINO."""

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_bench.runtimes import GRAPH, Opened
from elastic_export.bench.original import diffusers_folder, picture_sides, request
from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.errors import InferenceError, MissingError, ModelError
from elastic_runtime.sessions.lanes import example
from elastic_runtime.sessions.openvino import properties, require_precision, without_telemetry
from elastic_runtime.sessions.session import Arrays, Session


@dataclass(frozen=True)
class Peer:
    """How the original runs: with `package`, on torch's `device`, compiled or not, its products in `precision`."""

    package: str = "torch"
    compiled: bool = False
    precision: str = EXACT
    device: str = "cpu"


PEERS = {
    "torch": Peer(),
    "torch-compile": Peer(compiled=True),
    "torch-cuda": Peer(device="cuda"),
    "torch-compile-cuda": Peer(compiled=True, device="cuda"),
    "torch-bf16": Peer(compiled=True, precision="bf16"),
    "torch-int8": Peer(package="torchao", compiled=True, precision="int8"),
    "torch-openvino": Peer(package="openvino"),
    "torch-openvino-bf16": Peer(package="openvino", precision="bf16"),
}
# Those of the original's own precision in torch: what a benchmark takes where nothing is named. The others take minutes to compile.
USUAL = tuple(name for name, peer in PEERS.items() if peer.package == "torch" and peer.precision == EXACT)
EXTRAS = {"torch": "torch", "safetensors": "torch", "torchao": "peers", "openvino": "openvino"}


@dataclass(frozen=True)
class TorchRuntime:
    """`checkpoint` holds the weights (a file, or a diffusers folder) where the model is neither a packaged sample nor a random one."""

    name: str
    checkpoint: Path | None = None
    artifact: str | None = None

    @property
    def peer(self) -> Peer:
        return PEERS[self.name]

    @property
    def precision(self) -> str:
        return self.peer.precision

    def obstacle(self, bundle: Bundle) -> str | None:
        peer = self.peer
        if missing := [name for name in ("torch", "safetensors", peer.package) if importlib.util.find_spec(name) is None]:
            return f"{missing[0]} is not installed: pip install 'elastic-export[{EXTRAS[missing[0]]}]'"
        if peer.device != "cpu" and not _sees(peer.device):
            return f"this torch sees no {peer.device} device"
        if peer.compiled and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            return "torch.compile needs a C++ compiler, and there is none"
        if peer.package == "openvino" and (fixed := [axis.name for axis in bundle.manifest.axes if axis.carrier == "value"]):
            return f"OpenVINO traces the module, which fixes the number of {fixed[0]}"
        try:
            self._find(bundle.manifest)
        except (ModelError, MissingError) as error:
            return str(error)
        return None

    def open(self, bundle: Bundle, threads: int) -> Opened:
        import torch

        torch.set_num_threads(threads)
        module, graph = self._find(bundle.manifest)(), bundle.manifest.graphs[GRAPH]
        session: Session
        if self.peer.package == "openvino":
            session = ConvertedSession(graph, module, example(bundle.manifest, graph), self.precision, threads)
        else:
            session = TorchSession(graph, module, self.peer)
        # The bound of an artifact in this precision: eager torch wrote the recording, perhaps on another processor.
        return Opened(session, None, graph.tolerance(precision=self.precision))

    def _find(self, manifest: Manifest) -> Callable[[], Any]:
        """What loads the original; raises ModelError where its weights are not at hand."""
        from elastic_export.capture.zoo import load

        if manifest.model.patches is None and manifest.model.packed is None:
            wanted = request(manifest, self.checkpoint)
            return lambda: load(wanted).module
        from elastic_export.capture.folders import capture_folder

        path = diffusers_folder(manifest, self.checkpoint)
        return lambda: capture_folder(path, ("transformer",), picture_sides(manifest), Span(1, 1), digest=False).graphs[0].module


class TorchSession(Session):
    """A module as a session in torch, as `peer` says; compiled with dynamic shapes, when it first runs.

    Below float32 it is compiled with frozen weights, under autocast (bf16) or with torchao's dynamic activations and weights by channel
    (int8). Where bf16 code for 512-bit vectors answers with NaN, as inductor's does for ELIT on processors with AMX (torch 2.13), it is
    compiled once more for 256 bits, and `where` says so.
    """

    def __init__(self, graph: Graph, module: Any, peer: Peer = Peer()):
        super().__init__(graph)
        import torch

        from elastic_targets.weights import filled

        self._torch, self._peer = torch, peer
        self.processor = "cpu" if peer.device == "cpu" else "gpu"  # whose peaks its figures are shares of
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # what the compiler thinks of a graph is not the benchmark's to tell
        if peer.precision == EXACT:  # and not TF32, which convolutions on a GPU otherwise are
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._module: Any = filled(module).to(peer.device)
        if peer.precision != EXACT:
            import torch._inductor.config as inductor

            inductor.freezing = True
        if peer.package == "torchao":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name in ("torchao", "torch.utils._pytree"):  # of kernels for GPUs, which are not asked for, and of enums
                    logging.getLogger(name).setLevel(logging.ERROR)
                from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

                quantize_(self._module, Int8DynamicActivationInt8WeightConfig())
        self._call: Any = torch.compile(self._module, dynamic=True) if peer.compiled else self._module
        self._narrow = False
        name = "CPU" if peer.device == "cpu" else torch.cuda.get_device_name()
        how = ["compiled" if peer.compiled else "eager", *([peer.precision] if peer.precision != EXACT else [])]
        self.where = f"torch {torch.__version__.split('+')[0]} {name} {' '.join(how)}"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._module is None:
            raise InferenceError("this session is closed")
        outputs = self._forward(feeds)
        if self._peer.precision == "bf16" and not self._narrow and not all(np.isfinite(array).all() for array in outputs.values()):
            import torch._inductor.config as inductor

            inductor.cpp.simdlen = 256
            self._torch._dynamo.reset()
            self._call, self._narrow = self._torch.compile(self._module, dynamic=True), True
            self.where += " for 256-bit vectors"
            return self._forward(feeds)
        return outputs

    def _forward(self, feeds: Arrays) -> dict[str, np.ndarray]:
        tensors = {name: self._torch.from_numpy(np.ascontiguousarray(array)).to(self._peer.device) for name, array in feeds.items()}
        # Frozen weights need gradients off, and lose their constants under inference mode.
        with self._torch.no_grad(), self._torch.autocast(self._peer.device, self._torch.bfloat16, enabled=self._peer.precision == "bf16"):
            result = self._call(**tensors)
        results = result if isinstance(result, tuple) else (result,)
        return {spec.name: value.float().cpu().numpy() for spec, value in zip(self.graph.outputs, results, strict=True)}

    def close(self) -> None:
        self._module = self._call = None


class ConvertedSession(Session):
    """A module that OpenVINO converts from torch by itself, tracing it on `feeds`, and runs on the processor."""

    def __init__(self, graph: Graph, module: Any, feeds: Arrays, precision: str, threads: int):
        super().__init__(graph)
        import torch

        from elastic_targets.weights import filled

        with without_telemetry():
            import openvino
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, of sizes that become constants
            model = openvino.convert_model(filled(module), example_input=tensors)
        compiled = openvino.Core().compile_model(model, "CPU", properties(precision, threads=threads))
        require_precision(compiled, precision, "CPU")
        self._request: Any = compiled.create_infer_request()
        self.where = f"openvino {openvino.__version__.split('-')[0]} CPU {precision}, converted from torch"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._request is None:
            raise InferenceError("this session is closed")
        results = self._request.infer(dict(feeds))
        return {spec.name: np.array(results[index]) for index, spec in enumerate(self.graph.outputs)}

    def close(self) -> None:
        self._request = None


def _sees(device: str) -> bool:
    import torch

    return device == "cuda" and torch.cuda.is_available()
