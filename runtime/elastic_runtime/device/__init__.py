"""The device: what is here, and what it can do at best. Nothing in this folder imports a backend's library."""

from elastic_runtime.device.advice import advice, runtimes
from elastic_runtime.device.catalogue import Entry, Figure, Peak, catalogue, listed_peak, matched, peak
from elastic_runtime.device.cores import busy_cores, thread_limit, usable_cores
from elastic_runtime.device.memory import peak_bytes, resident_bytes
from elastic_runtime.device.nvml import Reading
from elastic_runtime.device.packages import PACKAGES, Package
from elastic_runtime.device.probe import memory_now, probe
from elastic_runtime.device.record import Cpu, Device, Gpu, Memory, Processor
from elastic_runtime.device.sources import Clock, Recording, Sources, System

__all__ = [
    "Clock",
    "Cpu",
    "Device",
    "Entry",
    "Figure",
    "Gpu",
    "Memory",
    "PACKAGES",
    "Package",
    "Peak",
    "Processor",
    "Reading",
    "Recording",
    "Sources",
    "System",
    "advice",
    "busy_cores",
    "catalogue",
    "listed_peak",
    "matched",
    "memory_now",
    "peak",
    "peak_bytes",
    "probe",
    "resident_bytes",
    "runtimes",
    "thread_limit",
    "usable_cores",
]
