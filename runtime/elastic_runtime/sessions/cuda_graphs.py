"""ONNX Runtime on an NVIDIA GPU: one CUDA graph a shape, over arrays that stay where they are.

A step of a small batch is hundreds of kernels that each take less time than their launch; a CUDA graph launches all of them at once.
It is captured at the second run of a shape (of a budget, a batch, a size), and holds until the session is closed. The library keeps the
graphs of each thread apart: another one that runs the shape captures it again.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_runtime.sessions.session import Arrays

MOST = 64  # shapes that have a graph; each keeps its arrays on the GPU
PLAIN = "-1"  # the library's word for a run that is neither captured nor replayed
Providers = Sequence[tuple[str, Mapping[str, Any]]]
State = tuple[object, ...]
_log = logging.getLogger(__name__)


class Gpu:
    """What the threads of this process do on a GPU through the library. It captures in CUDA's global mode: no other thread may allocate or
    free memory meanwhile, and where one does, it fails and the capture with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working, self._capturing = 0, False

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Open, run or close a session in the block, which waits for the end of a capture."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1

    @contextlib.contextmanager
    def capture(self) -> Iterator[bool]:
        """Whether nobody works; then nobody begins to before the end of the block, which may capture."""
        with self._changed:
            alone = not (self._working or self._capturing)
            self._capturing |= alone
        try:
            yield alone
        finally:
            if alone:
                with self._changed:
                    self._capturing = False
                    self._changed.notify_all()


GPU = Gpu()


@dataclass(frozen=True)
class _Bound:
    """The arrays of one shape on the GPU, and how its graph is run; `thread` tells on which it is captured."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    binding: Any
    options: Any
    thread: threading.local = field(default_factory=threading.local)

    @property
    def captured(self) -> bool:
        """Whether it is on this thread."""
        return hasattr(self.thread, "captured")

    def run(self, session: Any, feeds: Arrays) -> dict[str, np.ndarray]:
        for name, value in self.inputs.items():
            value.update_inplace(np.asarray(feeds[name], order="C"))
        session.run_with_iobinding(self.binding, self.options)
        return {name: value.numpy() for name, value in self.outputs.items()}


class CudaGraphs:
    """A model of ONNX Runtime on a GPU, whose runs are captured where they can be. Threads run it one after the other.

    `library` is onnxruntime; `open_model(providers, asked)` opens the model and raises where a provider that was asked for does not come
    up; the first of `providers` is CUDA's; `outputs` are the names to answer. `session` is what is open and `captures` whether it captures:
    some models cannot be (control flow, work that is left to the CPU), which is seen when they are opened or when they are first captured.
    `run` raises what the library does.
    """

    def __init__(
        self, library: Any, open_model: Callable[[Providers, bool], Any], providers: Providers, asked: bool, outputs: Sequence[str]
    ):
        self._library, self._outputs = library, list(outputs)
        (name, options), *others = providers
        self._device = int(options.get("device_id", 0))
        self._open_plain = lambda: open_model(providers, asked)
        self._answers: dict[State, dict[str, tuple[tuple[int, ...], np.dtype]]] = {}
        self._bound: dict[State, _Bound] = {}
        self._lock = threading.Lock()
        self.captures = True
        self.session: Any = None
        try:
            self.session = open_model([(name, {**options, "enable_cuda_graph": 1}), *others], True)
        except Exception as error:  # it says why it cannot be captured, or what opening it again will say
            self._without(str(error))

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        # A graph may hold the value of a 0-d input, such as a loop's count: it counts as part of the shape.
        state = tuple((name, array.shape, array.item() if array.ndim == 0 else None) for name, array in feeds.items())
        with self._lock:
            bound = self._bound.get(state)
            if bound and bound.captured:
                with GPU.work():
                    return bound.run(self.session, feeds)
            if self.captures and state in self._answers and (bound or len(self._bound) < MOST):
                with GPU.capture() as alone:
                    if alone:
                        try:
                            bound = bound or self._bind(feeds, self._answers[state], len(self._bound))
                            answer = bound.run(self.session, feeds)
                        except Exception as error:
                            why = str(error)  # and not the error, whose frames hold the session
                        else:
                            self._bound[state], bound.thread.captured = bound, True
                            return answer
                        bound = None
                        self._bound.clear()
                        self._without(why)  # a stream that was being captured is of no more use
                        return self._plain(state, feeds)
            with GPU.work():
                return self._plain(state, feeds)

    def _without(self, why: str) -> None:
        self.captures, self.session = False, None  # the GPU may hold the model once
        self.session = self._open_plain()
        _log.info("runs without CUDA graphs: %s", why)

    def _plain(self, state: State, feeds: Arrays) -> dict[str, np.ndarray]:
        answer = dict(zip(self._outputs, self.session.run(self._outputs, dict(feeds), self._options(PLAIN)), strict=True))
        self._answers[state] = {name: (array.shape, array.dtype) for name, array in answer.items()}
        return answer

    def _bind(self, feeds: Arrays, answer: dict[str, tuple[tuple[int, ...], np.dtype]], number: int) -> _Bound:
        make = self._library.OrtValue
        inputs = {name: make.ortvalue_from_numpy(np.asarray(array, order="C"), "cuda", self._device) for name, array in feeds.items()}
        outputs = {
            name: make.ortvalue_from_shape_and_type(shape, dtype.type, "cuda", self._device) for name, (shape, dtype) in answer.items()
        }
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return _Bound(inputs, outputs, binding, self._options(str(number)))

    def _options(self, graph: str) -> Any:
        options = self._library.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        return options
