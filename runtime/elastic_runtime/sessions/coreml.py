"""Core ML: CPU, GPU and Neural Engine of a Mac, through coremltools.

A package is compiled once and kept in the user's cache folder, because macOS would otherwise compile it at each launch.
Its functions are loaded when they are first used: each takes memory of its own.
"""

import contextlib
import hashlib
import importlib.util
import logging
import platform
import shutil
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from elastic_runtime.contract.artifacts import Artifact, CoremlArtifact, CoremlCall, Graph, TensorSpec, open_sizes
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.device import Processor
from elastic_runtime.errors import BudgetError, BundleError, InferenceError, UsageError
from elastic_runtime.files.cache import folder as cache_folder
from elastic_runtime.files.cache import guard
from elastic_runtime.files.leftovers import PREFIX
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.session import Arrays, Session

# --compute-units word -> coremltools' name
COMPUTE_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu+gpu": "CPU_AND_GPU", "cpu+ane": "CPU_AND_NE"}
# Of `all`, Core ML decides for itself: the GPU has its float32 parts in any case.
PROCESSORS: dict[str, Processor] = {"all": "gpu", "cpu": "cpu", "cpu+gpu": "gpu", "cpu+ane": "npu"}
# The macOS that came with an iOS; from 26 on they count together.
_MACOS_OF_IOS = {15: 12, 16: 13, 17: 14, 18: 15}
ABANDONED = 86_400  # seconds after which no compilation still works in its folder
_log = logging.getLogger(__name__)


def obstacle(artifact: Artifact) -> str | None:
    """Why this backend cannot run an artifact here, or None."""
    assert isinstance(artifact, CoremlArtifact)
    if sys.platform != "darwin":
        return f"Core ML needs macOS, and this is {platform.system()}"
    needed, macos = _macos(artifact.deployment_target), int(platform.mac_ver()[0].split(".")[0])
    if macos < needed:
        return f"the package is for {artifact.deployment_target}, which is macOS {needed} or newer, and this is macOS {macos}"
    if importlib.util.find_spec("coremltools") is None:
        return "coremltools is not installed: pip install 'elastic-export[coreml]'"
    return None


def sizes(specs: Iterable[TensorSpec], feeds: Arrays) -> dict[str, int]:
    """What decides which call takes the feeds: open dimensions by letter, and 0-d inputs by name (a static function has
    its own).
    """
    return open_sizes(specs, feeds) | {spec.name: int(feeds[spec.name]) for spec in specs if not spec.shape}


def taken(specs: Iterable[TensorSpec], shapes: str) -> list[TensorSpec]:
    """Inputs that a package's functions take: a 0-d one is baked into static functions, and a vector of one value where
    `range` is open.
    """
    return [spec for spec in specs if spec.shape or shapes == "range"]


class PackageSession(Session):
    """What every way of running a Core ML package shares: a call is chosen by the feeds' sizes, and int64 becomes
    int32.

    Threads run it one after the other: a Core ML model is for one thread at a time. A subclass implements
    `_call(function, feeds)`.
    """

    def __init__(self, graph: Graph, artifact: CoremlArtifact):
        open_ended = any(not call.sizes for call in artifact.calls)
        budgets = None if open_ended else tuple(dict.fromkeys(Budget(**call.budget) for call in artifact.calls))
        super().__init__(graph, artifact.batch, budgets)
        self.artifact = artifact
        self._lock = threading.Lock()

    def function(self, feeds: Arrays) -> str:
        """Name of the function that takes these feeds; raises BudgetError listing what there is."""
        lengths = sizes(self.graph.inputs, feeds)
        for call in self.artifact.calls:
            if call.sizes == lengths or (not call.sizes and lengths["B"] in self.artifact.batch):
                return call.function
        raise BudgetError(
            f"{self.artifact.package} was not compiled for {_words(lengths)}; it takes {'; '.join(map(self._offer, self.artifact.calls))}. "
            "Choose one of these, or export again with --budgets."
        )

    def _offer(self, call: CoremlCall) -> str:
        return f"{Budget(**call.budget)} ({_words(call.sizes)})" if call.sizes else f"every budget in batches of {self.artifact.batch}"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        narrow = {}
        for spec in taken(self.graph.inputs, self.artifact.shapes):
            array = np.atleast_1d(feeds[spec.name])
            narrow[spec.name] = np.ascontiguousarray(array.astype(np.int32) if array.dtype == np.int64 else array)
        with self._lock:
            return self._call(self.function(feeds), narrow)

    @abstractmethod
    def _call(self, function: str, feeds: Arrays) -> dict[str, np.ndarray]: ...


class CoremlSession(PackageSession):
    """A Core ML package on this Mac.

    `compute_units` is one of all, cpu, cpu+gpu, cpu+ane; `cache` is where the compiled package is kept (default: the
    user's cache folder). Where that cannot be, the session has a folder of its own, and the log says so.
    """

    def __init__(self, bundle: Bundle, graph: Graph, artifact: CoremlArtifact, compute_units: str = "all", cache: Path | None = None):
        super().__init__(graph, artifact)
        if compute_units not in COMPUTE_UNITS:
            raise UsageError(f"there are no compute units {compute_units!r}; there are {', '.join(COMPUTE_UNITS)}")
        import coremltools

        self._coremltools = coremltools
        self._units = getattr(coremltools.ComputeUnit, COMPUTE_UNITS[compute_units])
        self.compiled, self._own = compiled(bundle, artifact, cache or cache_folder("coreml"))
        self._functions: dict[str, Any] | None = {}
        self.processor = PROCESSORS[compute_units]
        self.where = f"Core ML {compute_units}, macOS {platform.mac_ver()[0]}, coremltools {coremltools.__version__}"

    def _call(self, function: str, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._functions is None:
            raise InferenceError("this session is closed")
        try:
            if function not in self._functions:
                # A package of one function is opened by no name: before iOS 18 there was none to give.
                name = None if function == "main" else function
                self._functions[function] = self._coremltools.models.CompiledMLModel(str(self.compiled), self._units, name)
            outputs = self._functions[function].predict(dict(feeds))
        except Exception as error:  # its exception types are private
            raise InferenceError(f"Core ML failed in function {function!r}: {error}") from error
        return {spec.name: np.asarray(outputs[spec.name], dtype=spec.dtype) for spec in self.graph.outputs}

    def close(self) -> None:
        with self._lock:
            self._functions = None
            if self._own:
                self._own.cleanup()


def compiled(bundle: Bundle, artifact: CoremlArtifact, cache: Path) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """Folder of the compiled package, compiled now if the cache has none for these bytes, this macOS and this
    coremltools; and, where the cache cannot be written or another user's stands there, the caller's own folder that holds it.

    Raises: BundleError where it cannot be compiled.
    """
    import coremltools

    parts = [entry.sha256 for entry in artifact.files] + [platform.mac_ver()[0], coremltools.__version__]
    name, source = f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.mlmodelc", bundle.file(artifact.package)

    def make(path: Path) -> Path:
        try:
            coremltools.models.utils.compile_model(str(source), str(path))
        except Exception as error:  # its exception types are private
            raise BundleError(f"Core ML cannot compile {source}: {error}") from error
        return path

    try:
        return _kept(cache / name, make), None
    except OSError as error:
        _log.warning("%s is compiled at each launch: %s. Set XDG_CACHE_HOME to a folder of your own to keep it", source, error)
    own = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    try:
        return make(Path(own.name) / name), own
    except BaseException:
        own.cleanup()
        raise


def _kept(path: Path, make: Callable[[Path], Path]) -> Path:
    """What the cache has at `path`, made there if there is none; raises OSError where it cannot be, or another user could have put it
    there."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path.parent))
        try:
            make(work / path.name).rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    guard(path)
    return path


def _sweep(cache: Path) -> None:
    """Take away what compilations left that were killed; one that may still run is left alone."""
    for left in cache.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            guard(left)
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _macos(target: str) -> int:
    number = int("".join(filter(str.isdigit, target)))
    return _MACOS_OF_IOS.get(number, number) if target.startswith("iOS") else number


def _words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


BACKEND = Backend(name="coreml", opens=("coreml",), obstacle=obstacle, open=CoremlSession, ways={"coreml": Way("gpu")})
