"""A subject in a process of its own: only its libraries are loaded there, its threads are its own, and so is its memory."""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from elastic_bench.energy import counters
from elastic_bench.records import Settings
from elastic_bench.runtimes import Runtime, sentence
from elastic_bench.subject import Subject
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import ElasticError, InferenceError

REST = 0.02  # seconds for the threads of the runtime before to fall asleep


def ignore_interrupts() -> None:
    """What a process does first that was started to measure: Ctrl-C reaches it, too, and whoever started it ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started within hear no Ctrl-C from their first moment on, where the system can do that; one that comes meanwhile is heard
    here afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would be started within, and lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: Connection, runtime: Runtime, folder: Path, settings: Settings) -> None:
    """The process: answer each (method, arguments) with (True, result) or (False, error) until told None."""
    ignore_interrupts()
    subject: Subject | None = None
    while (asked := pipe.recv()) is not None:
        name, arguments = asked
        try:
            if subject is None:
                subject = Subject(runtime, Bundle.open(folder), settings, counters()[0])
            pipe.send((True, getattr(subject, name)(*arguments)))
        except ElasticError as error:
            pipe.send((False, error))
        except Exception as error:  # whatever a runtime's library throws is a finding, not the end of the benchmark
            pipe.send((False, InferenceError(sentence(error))))
    if subject:
        subject.close()


class Process:
    """`Subject`, elsewhere: the same methods. A process that dies is an InferenceError; `close` ends it."""

    def __init__(self, runtime: Runtime, bundle: Bundle, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self._name = runtime.name
        self._pipe, theirs = context.Pipe()
        # no daemon: torch.compile has children of its own
        self._process = context.Process(target=serve, args=(theirs, runtime, bundle.folder, settings))
        with deaf():
            self._process.start()
        theirs.close()

    def __getattr__(self, method: str) -> Any:
        def ask(*arguments: Any) -> Any:
            time.sleep(REST)
            try:
                self._pipe.send((method, arguments))
                done, result = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                code = self._process.exitcode
                why = ", as systems end one when memory runs out" if code == -9 else ""
                raise InferenceError(f"the process of {self._name} died with exit code {code}{why}") from None
            except KeyboardInterrupt:  # nobody waits for what it was asked
                self._process.kill()
                raise
            if not done:
                raise result
            return result

        return ask

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has died
            self._pipe.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
