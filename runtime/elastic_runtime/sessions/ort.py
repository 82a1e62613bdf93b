"""ONNX Runtime: CPU and CUDA."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Artifact, Graph
from elastic_runtime.contract.precision import PRECISIONS
from elastic_runtime.device import Processor
from elastic_runtime.errors import BundleError, InferenceError, MissingError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.session import Arrays, Session

# What a provider computes on; one that is not listed is taken for a GPU's.
PROCESSORS: dict[str, Processor] = {
    "CPUExecutionProvider": "cpu",
    "DnnlExecutionProvider": "cpu",
    "OpenVINOExecutionProvider": "cpu",
    "XnnpackExecutionProvider": "cpu",
    "QNNExecutionProvider": "npu",
    "VitisAIExecutionProvider": "npu",
}


def obstacle(artifact: Artifact) -> str | None:
    """Why this backend cannot run the artifact here, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed: pip install 'elastic-export[ort]' (or [ort-gpu])"
    if "ort" not in (able := PRECISIONS[artifact.precision].backends):
        others = f"which are for {' and '.join(able)}" if able else "and nothing else has yet"
        return f"ONNX Runtime has no kernels for {artifact.precision} graphs of ours, {others}: open an artifact of another precision"
    return None


class OrtSession(Session):
    """An ONNX artifact in ONNX Runtime.

    `providers` are execution providers in order of preference, by default CUDA where it is built in, then CPU; `threads`
    is the number of intra-op threads (0: one a physical core); `spinning` lets waiting threads stay busy between operations.
    On a quiet machine that makes small models 1.2 to 1.6 times faster; beside another busy process or a second session it makes them
    1.3 to 3.5 times slower: turn it off there (docs/performance.md).
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        artifact: Artifact,
        providers: Sequence[str] | None = None,
        threads: int = 0,
        spinning: bool = True,
    ):
        super().__init__(graph)
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if providers is None:
            providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        elif missing := [name for name in providers if name not in available]:
            raise MissingError(f"this ONNX Runtime has no {', '.join(missing)}; it has {', '.join(available)}")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        settings.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(bundle.file(artifact.path)), settings, providers=list(providers))
        except Exception as error:  # its exception types are private
            raise BundleError(f"ONNX Runtime cannot open {bundle.file(artifact.path)}: {error}") from error
        self._outputs = [spec.name for spec in graph.outputs]
        provider = self._session.get_providers()[0]
        self.processor = PROCESSORS.get(provider, "gpu")
        self.where = f"onnxruntime {onnxruntime.__version__} {provider.removesuffix('ExecutionProvider')}"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._session is None:
            raise InferenceError("this session is closed")
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as error:  # its exception types are private
            raise InferenceError(f"ONNX Runtime failed: {error}") from error

    def close(self) -> None:
        self._session = None


BACKEND = Backend(
    name="ort",
    aliases=("onnxruntime",),
    opens=("onnx",),
    obstacle=obstacle,
    open=OrtSession,
    threads=True,
    ways={
        "onnxruntime": Way("cpu", {"providers": ["CPUExecutionProvider"]}),
        "onnxruntime-cuda": Way("gpu", {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}),
    },
)
