"""The libraries that matter here, as package indexes know them: what a probe looks for, and what installs what is
missing.

This table is also the list of backends: a library that opens artifacts names the file of `elastic_runtime.sessions`
that does so, and their order is that of preference. It stands here because a probe must not import sessions, which
import the device.
"""

from dataclasses import dataclass
from typing import Literal

from elastic_runtime.device.sources import Sources, System


@dataclass(frozen=True)
class Package:
    """A library: `distributions` that bring it, of which the first one found counts, and the `extra` of ours that
    installs it.

    `backend` is the file in `sessions` that opens artifacts with it, or None; `needs` is the hardware without which it
    opens nothing.
    """

    name: str
    distributions: tuple[str, ...]
    extra: str
    backend: str | None = None
    needs: Literal["nvidia", "apple"] | None = None

    def version(self, sources: Sources | None = None) -> str | None:
        """The version that is installed, found without importing it; None where there is none, or none that an index
        knows.
        """
        sources = sources or System()
        return next(filter(None, map(sources.version, self.distributions)), None)


# One row a library. Backends come in the order of preference.
_ROWS = (
    Package("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "trt", "trt", "nvidia"),
    Package("tensorrt-rtx", ("tensorrt-rtx",), "rtx", "trt", "nvidia"),
    Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"), "ort", "ort"),
    Package("openvino", ("openvino",), "openvino", "openvino"),
    Package("coremltools", ("coremltools",), "coreml", "coreml", "apple"),
    Package("cuda-bindings", ("cuda-bindings",), "rtx"),
    Package("torch", ("torch",), "torch"),
    Package("onnx", ("onnx",), "torch"),
)
PACKAGES = {row.name: row for row in _ROWS}
BACKENDS = tuple(dict.fromkeys(row.backend for row in _ROWS if row.backend))
