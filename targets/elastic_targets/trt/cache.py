"""Engines that were built before, kept in the user's cache folder, so that the same build again takes no time.

trt/<key>/engine + facts.json    an engine and what was seen while building it
trt/timings-<builder>-sm<n>      the builder's own timing cache (full TensorRT only)
trt/rates.json                   seconds a layer and profile by builder version, for estimates
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from elastic_runtime.contract.artifacts import FileEntry, Network
from elastic_runtime.contract.bundle import sha256
from elastic_runtime.files import atomic, cache
from elastic_runtime.sessions.kernels import KERNELS

MOST_BYTES = 8_000_000_000
# Seconds a layer and profile on two CPU cores (docs/tensorrt.md), until a build here tells better.
DEFAULT_RATE = 1.5e-3
_log = logging.getLogger(__name__)


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a cached engine's folder records beside it; `key` is the build that made it."""

    key: str
    file: FileEntry
    network: Network


def folder() -> Path:
    """Where built engines are kept; deleting it makes them be built again."""
    return cache.folder("trt")


def key(parts: Mapping[str, Any]) -> str:
    """Name of a build: a hash over everything that decides its result."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:32]


def fetch(name: str, target: Path) -> Network | None:
    """Place a cached engine at `target` and return its facts; None where there is none, or it is damaged."""
    home = folder() / name
    try:
        engine = home / "engine"
        for path in (home, home / "facts.json", engine):
            cache.guard(path)
        facts = msgspec.json.decode((home / "facts.json").read_bytes(), type=Facts)
        if facts.key != name:
            raise ValueError("it is another build's")
        if engine.stat().st_size != facts.file.bytes or sha256(engine) != facts.file.sha256:
            raise ValueError("its engine is damaged")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        _log.info("the cached engine %s is not used: %s", home, error)
        return None
    os.utime(home)  # used just now: the last to be cleared
    shutil.copyfile(engine, target)  # never a link: a bundle shares nothing with the cache
    return facts.network


def store(name: str, engine: Path, network: Network) -> None:
    """Keep a built engine. A cache that cannot be written costs time later, never the build: it is logged."""
    try:
        root = folder()
        root.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
        try:
            shutil.copyfile(engine, stage / "engine")
            entry = FileEntry(path="engine", bytes=engine.stat().st_size, sha256=sha256(engine))
            (stage / "facts.json").write_bytes(msgspec.json.encode(Facts(name, entry, network)))
            shutil.rmtree(root / name, ignore_errors=True)
            stage.rename(root / name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        _clear(root, keep=name)
    except OSError as error:
        _log.warning("the engine was not cached: %s", error)


def load_timings(name: str) -> bytes:
    """The builder's timing cache of that name, empty at first."""
    path = folder() / f"timings-{name}"
    try:
        cache.guard(path)
        return path.read_bytes()
    except OSError:
        return b""


def store_timings(name: str, timings: bytes) -> None:
    if timings:
        _write(folder() / f"timings-{name}", timings)


def estimate(builder: str, layers: int, profiles: int) -> float:
    """Seconds that a build of `layers` layers with `profiles` profiles is likely to take here."""
    return _rates().get(builder, DEFAULT_RATE) * layers * profiles


def learn(builder: str, layers: int, profiles: int, seconds: float) -> None:
    """Remember what a build took, for the next estimate."""
    rates = _rates() | {builder: seconds / max(layers * profiles, 1)}
    _write(folder() / "rates.json", msgspec.json.encode(rates))


def _rates() -> dict[str, float]:
    try:
        cache.guard(folder() / "rates.json")
        return msgspec.json.decode((folder() / "rates.json").read_bytes(), type=dict[str, float])
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: bytes) -> None:
    try:
        atomic.write(path, content)
    except OSError as error:
        _log.warning("%s was not written: %s", path, error)


def _clear(root: Path, keep: str) -> None:
    """Drop the engines, and the kernels that were compiled of engines, that were used longest ago until the cache is within its bound; and
    what killed runs left."""
    entries = [(path.stat().st_mtime, path) for path in root.iterdir() if path.is_dir() or path.name.startswith(KERNELS)]
    total = 0
    for _, path in sorted(entries, reverse=True):
        with contextlib.suppress(OSError):
            total += sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else (path,)))
        if total > MOST_BYTES and path.name != keep:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
