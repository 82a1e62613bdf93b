"""Where a probe reads from: files, commands, installed packages, the GPU driver. `Recording` replays another machine."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import msgspec

from elastic_runtime.device import windows
from elastic_runtime.device.nvml import Reading, read_gpus

Clock = Callable[[], float]  # seconds since some moment
SECONDS = 5  # a command that takes longer is taken for absent


class Sources(Protocol):
    """Everything that `probe` reads. A method answers None where there is nothing to read."""

    @property
    def system(self) -> str:
        """Linux, Darwin or Windows."""

    @property
    def machine(self) -> str:
        """x86_64, aarch64, arm64 or AMD64."""

    @property
    def processor(self) -> str:
        """The processor's name as Python knows it, often empty."""

    def text(self, path: str) -> str | None:
        """Content of a text file."""

    def output(self, *command: str) -> str | None:
        """What a command printed."""

    def version(self, package: str) -> str | None:
        """Version of an installed distribution, found without importing it."""

    def cpus(self) -> frozenset[int] | None:
        """Logical processors that this process may run on, by number."""

    def nvml(self) -> tuple[Reading, ...] | str:
        """What the NVIDIA driver says of each GPU, or why it says nothing."""

    def windows(self) -> windows.Reading:
        """What Windows says of memory and processor."""


class System:
    """This machine."""

    @property
    def system(self) -> str:
        return platform.system()

    @property
    def machine(self) -> str:
        return platform.machine()

    @property
    def processor(self) -> str:
        return platform.processor()

    def text(self, path: str) -> str | None:
        with contextlib.suppress(OSError):
            return Path(path).read_text(errors="replace")
        return None

    def output(self, *command: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            return done.stdout if done.returncode == 0 else None
        return None

    def version(self, package: str) -> str | None:
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
        return None

    def cpus(self) -> frozenset[int] | None:
        if hasattr(os, "sched_getaffinity"):
            return frozenset(os.sched_getaffinity(0))
        count = os.cpu_count()
        return frozenset(range(count)) if count else None

    def nvml(self) -> tuple[Reading, ...] | str:
        return read_gpus()

    def windows(self) -> windows.Reading:
        return windows.read()


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """Another machine, replayed: what its files, commands and packages said. `commands` are keyed by their words. `allowed` are the
    processors that the process may run on, where they are not the first `cpu_count`."""

    system: str
    machine: str
    processor: str = ""
    files: dict[str, str] = {}
    commands: dict[str, str] = {}
    packages: dict[str, str] = {}
    cpu_count: int | None = None
    allowed: tuple[int, ...] | None = None
    gpus: tuple[Reading, ...] | str = "there is no NVIDIA driver"
    kernel: windows.Reading = windows.Reading()

    def text(self, path: str) -> str | None:
        return self.files.get(path)

    def output(self, *command: str) -> str | None:
        return self.commands.get(" ".join(command))

    def version(self, package: str) -> str | None:
        return self.packages.get(package)

    def cpus(self) -> frozenset[int] | None:
        if self.allowed is not None:
            return frozenset(self.allowed)
        return None if self.cpu_count is None else frozenset(range(self.cpu_count))

    def nvml(self) -> tuple[Reading, ...] | str:
        return self.gpus

    def windows(self) -> windows.Reading:
        return self.kernel
