"""Peak figures of the device that was found: from `devices.toml` where it is listed, else estimated, and which of both."""

import re
from importlib.resources import files
from typing import Literal

import msgspec
import msgspec.toml

from elastic_runtime.contract.precision import EXACT, HALF, RATES
from elastic_runtime.device.record import Cpu, Device, Gpu, Processor

GB, TERA = 1e9, 1e12
# Where nothing tells a CPU's clock or a machine's memory bandwidth: values that few machines fall short of.
LEAST_MHZ = 2000.0
TWO_CHANNELS = 51.2e9  # DDR4-3200
# Tensor cores of a GPU that is not listed: at least twice the rate of its other cores since Turing (GeForce); data-centre ones give more.
TENSOR_CORES = 2


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number with its source and how far to trust it."""

    value: float
    source: str
    confidence: Literal["high", "medium", "low"]

    def __str__(self) -> str:
        return f"{self.value:g}"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device of the catalogue, in its units (see the head of `devices.toml`)."""

    id: str
    name: str
    kind: Literal["gpu", "jetson", "apple", "cpu"]
    match: str
    runtime: str
    memory: Figure
    bandwidth: Figure
    fp32: Figure
    power_mode: str | None = None
    compute_capability: str | None = None
    fp16: Figure | None = None
    fp8: Figure | None = None
    int8: Figure | None = None
    neural_engine: Figure | None = None
    power: Figure | None = None


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """What a processor could do at best: FLOP/s by the name of a rate, and bytes a second. `origin` says where the figures come from.

    Which rate a precision uses, and another where that one is not listed, the table of precisions tells (`contract.precision`).
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    origin: str
    listed: str | None = None


def catalogue() -> tuple[Entry, ...]:
    """Every listed device."""
    text = files("elastic_runtime.device").joinpath("devices.toml").read_text(encoding="utf-8")
    return msgspec.toml.decode(text, type=dict[str, tuple[Entry, ...]])["device"]


def matched(device: Device) -> Entry | None:
    """The catalogue's entry for the processor that backends would use here, or None where it is not listed."""
    gpu = device.gpus[0] if device.gpus else None
    name = device.board or (gpu.name if gpu else device.cpu.model)
    memory = (gpu.memory_total if gpu else None) or device.memory.machine or device.memory.total
    fitting = [entry for entry in catalogue() if re.search(entry.match, name)]
    modes = [entry for entry in fitting if entry.power_mode and re.search(entry.power_mode, device.power_mode or "", re.IGNORECASE)]
    fitting = modes or [entry for entry in fitting if not entry.power_mode] or fitting[:1]
    return min(fitting, key=lambda entry: abs(entry.memory.value * GB - (memory or 0)), default=None)


def listed_peak(entry: Entry) -> Peak:
    """An entry's figures in FLOP/s and bytes a second."""
    figures = {rate: getattr(entry, rate, None) for rate in RATES}
    flops = {rate: figure.value * TERA for rate, figure in figures.items() if figure}
    return Peak(name=entry.name, flops=flops, bandwidth=entry.bandwidth.value * GB, origin="the catalogue", listed=entry.id)


def peak(device: Device, processor: Processor) -> Peak:
    """Peak figures of the CPU or the first GPU of `device`, listed or estimated.

    An NPU, of which mostly nothing is known but its int8 rate, is taken for the GPU beside it; where there is no GPU either, for the CPU.
    """
    entry = matched(device)
    if entry and (entry.kind == "cpu") == (processor == "cpu"):
        return listed_peak(entry)
    if processor != "cpu" and device.gpus:
        return _gpu(device.gpus[0])
    return _cpu(device.cpu)


def _cpu(cpu: Cpu) -> Peak:
    mhz = cpu.mhz or LEAST_MHZ
    rate = cpu.usable * cpu.flops_per_clock * mhz * 1e6
    clock = f"{mhz:.0f} MHz" if cpu.mhz else f"{mhz:.0f} MHz (assumed)"
    origin = f"estimated from {cpu.usable:g} cores x {cpu.flops_per_clock} operations a clock ({cpu.vector or 'no vector unit'}) x {clock}"
    return Peak(
        name=cpu.model, flops={EXACT: rate}, bandwidth=TWO_CHANNELS,
        origin=f"{origin}; memory taken for two channels of DDR4-3200",
    )  # fmt: skip


def _gpu(gpu: Gpu) -> Peak:
    fp32 = gpu.fp32_flops or 5 * TERA
    tensor = fp32 * TENSOR_CORES
    basis = "its cores, clocks and bus" if gpu.fp32_flops and gpu.bandwidth else "little: the driver does not tell its cores or bus"
    return Peak(
        name=gpu.name,
        flops={EXACT: fp32, HALF: tensor},
        bandwidth=gpu.bandwidth or 200 * GB,
        origin=f"estimated from {basis}",
    )
