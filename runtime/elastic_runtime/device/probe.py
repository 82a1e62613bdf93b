"""Find out what this machine is, from small files and the system's own commands; no compiler or backend is imported."""

import re

from elastic_runtime.device import apple, linux
from elastic_runtime.device.cores import processor
from elastic_runtime.device.nvml import Reading
from elastic_runtime.device.packages import PACKAGES
from elastic_runtime.device.record import Device, Gpu, Memory
from elastic_runtime.device.sources import Sources, System


def probe(sources: Sources | None = None) -> Device:
    """The device that `sources` describe, by default this machine. It never fails: what is not found out is None, and noted."""
    sources = sources or System()
    notes: list[str] = []
    power_mode = board = None
    memory = memory_now(sources)
    if sources.system == "Linux":
        board, power_mode = linux.jetson(sources)
    elif sources.system == "Darwin":
        board, power_mode = apple.chip(sources), apple.power_mode(sources)
    elif sources.system != "Windows":
        notes.append(f"on {sources.system} neither memory nor the processor's vector units are read; figures of the CPU are guesses")
    gpus, why = _gpus(sources, board)
    if why and not (board or "").startswith("Apple"):
        notes.append(why)
    if memory.total is None and sources.system in ("Linux", "Darwin", "Windows"):
        notes.append("the system does not tell how much memory there is")
    versions = {name: package.version(sources) for name, package in PACKAGES.items()}
    return Device(
        system=sources.system,
        machine=sources.machine,
        cpu=processor(sources),
        memory=memory,
        gpus=gpus,
        board=board,
        power_mode=power_mode,
        backends={name: version for name, version in versions.items() if version},
        notes=tuple(notes),
    )


def memory_now(sources: Sources | None = None) -> Memory:
    """The memory that there is now, and is free."""
    sources = sources or System()
    if sources.system == "Linux":
        return linux.memory(sources)
    if sources.system == "Darwin":
        return apple.memory(sources)
    if sources.system == "Windows":
        facts = sources.windows()
        return Memory(total=facts.memory_total, available=facts.memory_available)
    return Memory(total=None, available=None)


def _gpus(sources: Sources, board: str | None) -> tuple[tuple[Gpu, ...], str | None]:
    if board and board.startswith("Apple"):
        return (Gpu(name=f"{board} GPU", integrated=True),), None
    readings = sources.nvml()
    if board:  # a Jetson: its driver answers with less or, before JetPack 6, not at all
        driver = readings[0].driver if not isinstance(readings, str) else linux.tegra_release(sources)
        return (Gpu(name=board, integrated=True, driver=driver),), None
    if isinstance(readings, str):
        return (), readings
    return tuple(map(_gpu, readings)), None


def _gpu(reading: Reading) -> Gpu:
    capability = ".".join(map(str, reading.compute_capability)) if reading.compute_capability else None
    return Gpu(
        name=re.sub(r"^NVIDIA\s+", "", reading.name),
        integrated=reading.memory_total is None,
        memory_total=reading.memory_total,
        memory_free=reading.memory_free,
        compute_capability=capability,
        driver=reading.driver,
        power_limit_watts=reading.power_limit / 1000 if reading.power_limit else None,
        bandwidth=reading.bandwidth,
        fp32_flops=reading.fp32_flops,
    )
