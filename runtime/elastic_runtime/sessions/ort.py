"""ONNX Runtime: CPU, CUDA, and whatever other execution providers are built in."""

import contextlib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, Graph, OnnxArtifact
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.device import PACKAGES, Processor, busy_cores, thread_limit
from elastic_runtime.device.memory import give_back
from elastic_runtime.errors import BundleError, InferenceError, MissingError, UsageError
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.cuda_graphs import GPU, CudaGraphs
from elastic_runtime.sessions.lanes import SMALL, Lanes, splits, wanted
from elastic_runtime.sessions.session import Arrays, Session

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What a provider computes on; one that is not listed is taken for a GPU's.
PROCESSORS: dict[str, Processor] = {
    CPU: "cpu",
    "DnnlExecutionProvider": "cpu",
    "OpenVINOExecutionProvider": "cpu",
    "XnnpackExecutionProvider": "cpu",
    "QNNExecutionProvider": "npu",
    "VitisAIExecutionProvider": "npu",
}
# Versions from which on an opset is opened, newest first, by the ONNX release that each was built with; all of ours
# have IR version 10, which came with 1.18. Opset 23 (Attention) is refused by 1.22.
OPSETS = (((1, 23), 23), ((1, 21), 22), ((1, 18), 21))
# What the library calls an error that lies in the file, not in the machine.
DAMAGED = ("InvalidGraph", "InvalidProtobuf", "NoSuchFile")
# What to do where a provider does not come up.
ADVICE = {
    CUDA: "The CUDA libraries did not load, or there is no GPU: pip install 'elastic-export[ort-gpu]' brings the former; pip uninstall "
    "onnxruntime before, which stands in its way. Or ask for device='cpu'",
}
LARGE = 1_000_000_000  # bytes of an artifact that is not to take more memory than it must,
MIDDLING = 16_000_000  # and of one that is no denoiser: a decoder's values take many times its weights
Provider = str | tuple[str, Mapping[str, Any]]
_log = logging.getLogger(__name__)


def obstacle(artifact: Artifact) -> str | None:
    """Why this backend cannot run the artifact here, or None."""
    assert isinstance(artifact, OnnxArtifact)
    if reason := absence(artifact.opset):
        return reason
    if "ort" not in (able := PRECISIONS[artifact.precision].backends):
        others = f"which are for {' and '.join(able)}" if able else "and nothing else has yet"
        return f"ONNX Runtime has no kernels for {artifact.precision} graphs of ours, {others}: open an artifact of another precision"
    return None


def absence(opset: int) -> str | None:
    """Why the library cannot open graphs of an opset here, whatever their precision, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed: pip install 'elastic-export[ort]' (or [ort-gpu])"
    version = PACKAGES["onnxruntime"].version()
    if version and (newest := newest_opset(version)) is not None and opset > newest:
        needed = next((since for since, opens in reversed(OPSETS) if opens >= opset), OPSETS[0][0])
        return (
            f"opset {opset} needs onnxruntime >= {needed[0]}.{needed[1]}, and here is {version}: "
            "pip install -U onnxruntime, or export with --opset 20 too"
        )
    return None


def newest_opset(version: str) -> int | None:
    """The newest opset that a version opens, 0 for one that opens none of ours; None where it opens every one that we
    make.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else OPSETS[0][0]
    if release >= OPSETS[0][0]:
        return None
    return next((opset for since, opset in OPSETS if release >= since), 0)


def limit(version: str) -> str | None:
    """What a version cannot open, and what to do; None where it opens everything."""
    newest = newest_opset(version)
    if newest is None:
        return None
    opens = f"opens opsets up to {newest}" if newest else "opens none of our graphs"
    return f"{opens}, and exports have {OPSETS[0][1]} unless made with --opset 20: pip install -U onnxruntime"


class OrtSession(Session):
    """An ONNX artifact in ONNX Runtime. Threads run it at once on the CPU, and one after the other through CUDA graphs.

    `device` is `cpu`, `cuda` or one of several GPUs, `cuda:1`; or `providers` are execution providers in order of
    preference, each a name or a pair of name and options, `("CUDAExecutionProvider", {"device_id": 1})`. By default
    CUDA where it is built in and its libraries load, else the CPU; the log says so where they do not. A float32
    artifact is computed in float32, not in TF32, unless its provider's options say otherwise. `cuda_graphs` captures a
    graph at the second run of a shape; the log says so where the model cannot be captured. `threads` is the number
    of intra-op threads (0: one a core, of those that the process may use); `spinning` lets waiting threads stay busy
    between operations. On a quiet machine that makes small models 1.2 to 1.6 times faster; beside another busy process
    or a second session it makes them 1.3 to 3.5 times slower: turn it off there (docs/performance.md). By default the
    denoiser's threads do, and those of what runs in between, such as the decoder, do not. `lanes` is how many rows of a
    batch may run side by side on the CPU, each on one thread (1: none do); by default it is measured for a denoiser of
    less than 256 MB, whose weights are then held twice.

    Raises: UsageError for an unknown device, or for providers or threads that are none; MissingError for a provider that
    is not built in, or that does not come up though it was asked for; BundleError for a file that is no graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        artifact: Artifact,
        providers: Sequence[Provider] | None = None,
        device: str | None = None,
        threads: int = 0,
        spinning: bool | None = None,
        lanes: int | None = None,
        cuda_graphs: bool = True,
    ):
        super().__init__(graph)
        cores = busy_cores(threads)
        count = wanted(bundle, graph, artifact, cores, lanes)
        onnxruntime = library()
        available = onnxruntime.get_available_providers()
        chosen = _providers(providers, device, available)
        for name, options in chosen:
            if name == CUDA and artifact.precision == EXACT:
                options.setdefault("use_tf32", 0)  # on by default, from Ampere on, and off by 1e-3
        if any(name == CUDA for name, _ in chosen):
            _preload(onnxruntime)
        settings = session_options(onnxruntime)
        settings.intra_op_num_threads = threads or thread_limit()
        # Its arena grows to the next power of two and gives nothing back: a fifth of what a model of 2 billion weights holds as it draws,
        # and nearly half of what a decoder does; and it brings nothing in time, where a run takes a second.
        size, denoiser = sum(file.bytes for file in artifact.files), graph is bundle.manifest.graphs.get("denoiser")
        others = [each for name, each in bundle.manifest.graphs.items() if name != "denoiser"]  # a denoiser may come in two halves
        settings.enable_cpu_mem_arena = size < (MIDDLING if any(graph is each for each in others) else LARGE)
        if spinning is None:
            spinning = denoiser
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        self._outputs = [spec.name for spec in graph.outputs]
        path, asked = bundle.file(artifact.path), providers is not None or device is not None
        self._graphs = None
        alone = PRECISIONS[artifact.precision].by_batch
        with _working(chosen[0][0]):
            if cuda_graphs and chosen[0][0] == CUDA and not alone:  # whose products of bytes are left to the CPU
                self._graphs = CudaGraphs(onnxruntime, partial(_open, onnxruntime, path, settings), chosen, asked, self._outputs)
            self._session = self._graphs.session if self._graphs else _open(onnxruntime, path, settings, chosen, asked)
        self._large = size >= SMALL
        if self._large:
            give_back()
        provider = self._provider = self._session.get_providers()[0]
        self.processor, self.fell_back = PROCESSORS.get(provider, "gpu"), provider != chosen[0][0]
        self.where = f"onnxruntime {onnxruntime.__version__} {provider.removesuffix('ExecutionProvider')}"
        if self._graphs and (provider != CUDA or not self._graphs.captures):
            self._graphs = None
        if self._graphs:
            self._session = self._graphs  # which hold what is open: a second hand on it would keep it beside the one that follows
        self._lanes = None
        count = count if provider == CPU else 1
        if not splits(graph) or (count == 1 and not alone):
            return
        lane = self._session
        if count > 1:
            settings.intra_op_num_threads = 1
            lane = _open(onnxruntime, path, settings, [(CPU, {})], asked=True)
        self._lanes = Lanes(graph, partial(self._infer, self._session), partial(self._infer, lane), count, alone)
        self._lanes.choose(bundle.manifest, graph, lanes is not None)

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        session, lanes, graphs = self._session, self._lanes, self._graphs
        if session is None:
            raise InferenceError("this session is closed")
        if graphs:
            with _failures():
                return graphs.run(feeds)
        return lanes.run(feeds) if lanes else self._infer(session, feeds)

    def _several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        lanes = self._lanes
        return lanes.several(runs) if lanes else super()._several(runs)

    def _infer(self, session: Any, feeds: Arrays) -> dict[str, np.ndarray]:
        with _failures(), _working(self._provider):
            return dict(zip(self._outputs, session.run(self._outputs, dict(feeds)), strict=True))

    def close(self) -> None:
        with _working(self._provider):
            self._session, self._graphs, lanes, self._lanes = None, None, self._lanes, None
        if lanes:
            lanes.close()
        if self._large:
            del lanes  # which hold the session
            give_back()


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """The library's errors as ours."""
    try:
        yield
    except Exception as error:  # its exception types are private
        raise InferenceError(f"ONNX Runtime failed: {error}") from error


def _working(provider: str) -> contextlib.AbstractContextManager[None]:
    """A block that works on what `provider` runs on."""
    return contextlib.nullcontext() if provider == CPU else GPU.work()


def library() -> Any:
    """The library, which on Linux reports its use to its vendor unless told not to before it is imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def session_options(onnxruntime: Any) -> Any:
    """What every model of ours is opened with."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # Without VNNI (x86 before Ice Lake and Zen 4) its products of bytes add two at a time into 16 bits, which overflow without a word:
    # pictures in int8 were 21 dB from float32's, and are 44 with its slower kernels. Elsewhere the entry changes nothing.
    settings.add_session_config_entry("session.x64quantprecision", "1")
    # Graphs with Q/DQ are TensorRT's; here they are computed as they are written, to prove them. Moving and fusing the pairs is no gain in
    # that, and puts float8 into operators that do not take it (Transpose of opset 20).
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


def _providers(providers: Sequence[Provider] | None, device: str | None, available: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Providers with options of their own, in order of preference."""
    if providers is not None and device is not None:
        raise UsageError(f"give device or providers, not both: device={device!r}, providers={list(providers)!r}")
    if device is not None:
        match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
        if not match:
            raise UsageError(f"ONNX Runtime's device is cpu, cuda or cuda:N, got {device!r}")
        providers = [CPU] if device == "cpu" else [(CUDA, {"device_id": int(match[1] or 0)}), CPU]
    elif providers is None:
        providers = [name for name in (CUDA, CPU) if name in available]
    if isinstance(providers, str) or not all(map(_is_provider, providers)):
        raise UsageError(f"providers is a list, of names or pairs of name and options: [{CUDA!r}, {CPU!r}], got {providers!r}")
    pairs = [(entry, {}) if isinstance(entry, str) else (entry[0], dict(entry[1])) for entry in providers]
    if not pairs:
        raise UsageError(f"providers is empty: give at least one; this ONNX Runtime has {', '.join(available)}")
    if missing := [name for name, _ in pairs if name not in available]:
        raise MissingError(f"this ONNX Runtime has no {', '.join(missing)}; it has {', '.join(available)}")
    return pairs


def _is_provider(entry: object) -> bool:
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return isinstance(entry[0], str) and isinstance(entry[1], Mapping)
    return isinstance(entry, str)


def _preload(onnxruntime: Any) -> None:
    """Load the CUDA libraries that pip installed, which the provider finds in no other way; and keep the library from warning of what is
    no fault: 1.31 does at each session, of a provider that is no plugin.
    """
    onnxruntime.set_default_logger_severity(3)
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # it prints what it does not find; results go there
            onnxruntime.preload_dlls()
        if printed.getvalue():
            _log.info("%s", printed.getvalue().strip())


def _open(onnxruntime: Any, path: Path, settings: Any, providers: list[tuple[str, dict[str, Any]]], asked: bool) -> Any:
    """The library's session on the first of the providers, or on the CPU where no other was asked for and the first
    does not come up.
    """
    first = providers[0][0]
    advice = ADVICE.get(first, "Ask for another provider, or for device='cpu'")
    try:
        # Without its own fallback, which prints to stdout and goes on.
        session = onnxruntime.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
    except Exception as error:  # its exception types are private
        if first == CPU or type(error).__name__ in DAMAGED:
            raise BundleError(f"ONNX Runtime cannot open {path}: {error}") from error
        if asked:
            raise MissingError(f"ONNX Runtime cannot open {path} with {first}: {error}. {advice}") from error
        _log.warning("%s runs on the CPU: %s. %s", path, error, advice)
        return _open(onnxruntime, path, settings, [(CPU, {})], asked)
    if (got := session.get_providers()[0]) != first:  # left out without an error
        if asked:
            raise MissingError(f"ONNX Runtime was asked for {first} and would run {path} with {got}. {advice}")
        _log.warning("%s runs with %s: %s was left out. %s", path, got, first, advice)
    return session


BACKEND = Backend(
    name="ort",
    aliases=("onnxruntime",),
    opens=("onnx",),
    obstacle=obstacle,
    limit=limit,
    open=OrtSession,
    threads=True,
    ways={"onnxruntime": Way("cpu", {"device": "cpu"}), "onnxruntime-cuda": Way("gpu", {"device": "cuda"})},
)
