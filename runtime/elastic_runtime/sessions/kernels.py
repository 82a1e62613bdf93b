"""Kernels that TensorRT-RTX compiled on this machine, kept for the next process, which would compile them again at each new shape."""

import logging
from pathlib import Path
from typing import Any

from elastic_runtime.errors import MissingError
from elastic_runtime.files import atomic, cache

KERNELS = "kernels-"  # how the names of their files begin
_log = logging.getLogger(__name__)


class KernelCache:
    """The library's runtime cache of one engine, by the engine's SHA-256, in the user's cache folder.

    What cannot be read or written there, or is refused as another machine's, costs time and nothing else: the log says so.
    """

    def __init__(self, digest: str):
        self._name = f"{KERNELS}{digest[:32]}"
        self._cache: Any = None  # made with the first configuration
        self._read = b""

    def attach(self, config: Any) -> None:
        """Let the contexts that are made with this runtime configuration use it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read = self._kept()
            if self._read and not self._cache.deserialize(self._read):
                _log.info("%s is of another GPU, driver or version: its kernels are compiled anew", self._path())
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what is not there yet."""
        if self._cache is None:
            return
        try:
            content = bytes(memoryview(self._cache.serialize()))
            if content != self._read:
                atomic.write(self._path(), content)
        except (OSError, MissingError) as error:
            _log.info("compiled kernels are not kept: %s", error)

    def _kept(self) -> bytes:
        try:
            path = self._path()
            cache.guard(path)
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except (OSError, MissingError) as error:
            _log.info("compiled kernels are not read: %s", error)
            return b""

    def _path(self) -> Path:
        return cache.folder("trt") / self._name
