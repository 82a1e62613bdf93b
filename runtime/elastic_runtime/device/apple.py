"""macOS: `sysctl`, `vm_stat` and `pmset`."""

import re

from elastic_runtime.device.record import Cpu, Memory
from elastic_runtime.device.sources import Sources


def _sysctl(sources: Sources) -> dict[str, str]:
    lines = (sources.output("sysctl", "hw", "machdep.cpu") or "").splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def cpu(sources: Sources) -> Cpu:
    """The processor. On Apple silicon only the performance cores count: a thread pool waits for its slowest."""
    values = _sysctl(sources)
    cores = int(values.get("hw.perflevel0.physicalcpu") or values.get("hw.physicalcpu") or len(sources.cpus() or ()) or 1)
    if sources.machine == "arm64":
        vector, flops = "Neon", 32  # four 128-bit units
    elif values.get("hw.optional.avx512f") == "1":
        vector, flops = "AVX-512", 64
    else:
        vector, flops = ("AVX2", 32) if values.get("hw.optional.avx2_0") == "1" else ("AVX", 16)
    caches = {"L1d": "hw.perflevel0.l1dcachesize", "L2": "hw.perflevel0.l2cachesize", "L3": "hw.l3cachesize"}
    older = {"L1d": "hw.l1dcachesize", "L2": "hw.l2cachesize"}
    sizes = {name: int(values.get(key) or values.get(older.get(name, ""), "0")) for name, key in caches.items()}
    hertz = values.get("hw.cpufrequency_max") or values.get("hw.cpufrequency")
    return Cpu(
        model=values.get("machdep.cpu.brand_string", "unknown"),
        cores=cores,
        usable=float(cores),
        vector=vector,
        flops_per_clock=flops,
        mhz=int(hertz) / 1e6 if hertz else None,
        caches={name: size for name, size in sizes.items() if size},
    )


def memory(sources: Sources) -> Memory:
    """Memory of the machine; what programs hold only as a cache counts as available."""
    total = _sysctl(sources).get("hw.memsize")
    pages = sources.output("vm_stat") or ""
    size = re.search(r"page size of (\d+) bytes", pages)
    counts = dict(re.findall(r"^Pages (free|inactive|speculative|purgeable):\s+(\d+)", pages, re.MULTILINE))
    available = sum(map(int, counts.values())) * int(size[1]) if size and counts else None
    return Memory(total=int(total) if total else None, available=available)


def chip(sources: Sources) -> str | None:
    """`Apple M4 Pro`, or None on an Intel Mac."""
    name = _sysctl(sources).get("machdep.cpu.brand_string", "")
    return name if name.startswith("Apple") else None


def power_mode(sources: Sources) -> str | None:
    """Low power or automatic, as `pmset` tells it."""
    mode = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", sources.output("pmset", "-g") or "", re.MULTILINE)
    return {"0": "automatic", "1": "low power", "2": "high power"}.get(mode[1]) if mode else None
