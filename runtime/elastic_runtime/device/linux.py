"""Linux: /proc and /sys, control groups of both versions, and what a Jetson tells about itself."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from elastic_runtime.device.record import Cpu, Memory
from elastic_runtime.device.sources import Sources

UNLIMITED = 1 << 60  # control groups of version 1 write a number near 2^63 for "no limit"
GROUPS = "/sys/fs/cgroup"
# Names of ARM cores by implementer and part (MIDR_EL1), as /proc/cpuinfo gives them.
ARM = {
    ("0x41", "0xd0b"): "Cortex-A76", ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd42"): "Cortex-A78AE", ("0x41", "0xd49"): "Neoverse-N2", ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd83"): "Neoverse-V3AE", ("0x41", "0xd85"): "Cortex-X925",
}  # fmt: skip
# Float32 operations a clock by vector unit, with the two multiply-add units that such cores mostly have.
FLOPS_PER_CLOCK = {"AVX-512": 64, "AVX2": 32, "Neon": 16, "AVX": 16}
SSE2 = 8  # of x86-64 without any of them
ZEN4 = 25  # AMD's family of Zen 3 and Zen 4, whose AVX-512 runs in two halves


def cpu(sources: Sources) -> Cpu:
    """The processor, by /proc/cpuinfo and the cache folders of its first core."""
    blocks = [_fields(block) for block in re.split(r"\n\s*\n", sources.text("/proc/cpuinfo") or "") if block.strip()]
    first = next((block for block in blocks if "processor" in block), {})
    allowed = sources.cpus() or frozenset()
    logical = sum("processor" in block for block in blocks) or len(allowed) or 1
    places = {
        block["processor"]: (block.get("physical id"), block["core id"]) for block in blocks if {"processor", "core id"} <= block.keys()
    }
    cores = len(set(places.values())) or logical
    quota = _quota(sources)
    # Threads of one core share its vector units, so a process is not faster than the cores that it may run on.
    if allowed and all(str(number) in places for number in allowed):
        free = float(len({places[str(number)] for number in allowed}))
    else:  # where the system does not tell which processor is whose, as on ARM, or numbers a container's anew
        free = (len(allowed) or logical) * cores / logical
    usable = min(float(cores), free, quota or float(cores))
    vector, flops = _vector(first)
    model = first.get("model name") or ARM.get((first.get("CPU implementer", ""), first.get("CPU part", ""))) or "unknown"
    return Cpu(
        model=model, cores=cores, usable=round(usable, 2), vector=vector, flops_per_clock=flops, mhz=_mhz(sources, first),
        caches=dict(_caches(sources)),
    )  # fmt: skip


def _fields(block: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def _vector(fields: dict[str, str]) -> tuple[str | None, int]:
    """The widest vector unit, and float32 operations a clock."""
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    if "avx512f" in flags:
        halves = fields.get("vendor_id") == "AuthenticAMD" and fields.get("cpu family") == str(ZEN4)
        return "AVX-512", FLOPS_PER_CLOCK["AVX-512"] // (2 if halves else 1)
    name = "AVX2" if {"avx2", "fma"} <= flags else "Neon" if "asimd" in flags else "AVX" if "avx" in flags else None
    return name, FLOPS_PER_CLOCK[name] if name else SSE2 if "sse2" in flags else 2


def _mhz(sources: Sources, fields: dict[str, str]) -> float | None:
    highest = sources.text("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if highest and highest.strip().isdigit():
        return int(highest) / 1000
    try:
        return float(fields["cpu MHz"])
    except (KeyError, ValueError):
        return None


def _caches(sources: Sources) -> Iterator[tuple[str, int]]:
    for index in range(5):
        folder = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        level, kind, size = (sources.text(f"{folder}/{name}") for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KM]?)", (size or "").strip())
        if level and match and (kind or "").strip() != "Instruction":
            name = f"L{level.strip()}{'d' if (kind or '').strip() == 'Data' else ''}"
            yield name, int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2]]


def memory(sources: Sources) -> Memory:
    """Memory of the machine or, where it is less, of the container."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", sources.text("/proc/meminfo") or "", re.MULTILINE))
    total = int(sizes["MemTotal"]) * 1024 if "MemTotal" in sizes else None
    free = sizes.get("MemAvailable") or sizes.get("MemFree")
    available = int(free) * 1024 if free else None
    limits = [(limit, used) for limit, used in _limits(sources) if limit < UNLIMITED and (total is None or limit < total)]
    if not limits:
        return Memory(total=total, available=available)
    limit = min(limit for limit, _ in limits)
    left = min(max(limit - used, 0) for limit, used in limits)
    return Memory(total=limit, available=left if available is None else min(left, available), limit=limit, machine=total)


def _limits(sources: Sources) -> Iterator[tuple[int, int]]:
    """(limit, used) of every memory group that holds this process; file pages that can be dropped are not counted as used."""
    for folder, limit_name, used_name, cache_name in (
        *((folder, "memory.max", "memory.current", "inactive_file") for folder in _folders(sources, "")),
        *((folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") for folder in _folders(sources, "memory")),
    ):
        limit, used = (_integer(sources.text(f"{folder}/{name}")) for name in (limit_name, used_name))
        if limit is not None:
            cached = re.search(rf"^{cache_name} (\d+)", sources.text(f"{folder}/memory.stat") or "", re.MULTILINE)
            yield limit, max((used or 0) - (int(cached[1]) if cached else 0), 0)


def _quota(sources: Sources) -> float | None:
    """Processors that the container's quota comes to."""
    quotas = []
    for folder in _folders(sources, ""):
        words = (sources.text(f"{folder}/cpu.max") or "").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    for name in ("cpu", "cpu,cpuacct"):
        for folder in _folders(sources, name):
            quota, period = (_integer(sources.text(f"{folder}/cpu.cfs_{what}_us")) for what in ("quota", "period"))
            if quota and period and quota > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _folders(sources: Sources, controller: str) -> list[str]:
    """Folders of this process's group and those above it; the root too, since inside a container that is the group itself."""
    root = f"{GROUPS}/{controller}".rstrip("/")
    for line in (sources.text("/proc/self/cgroup") or "").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names == controller or controller in names.split(","):
            inner = PurePosixPath(path.lstrip("/"))
            return [root, *(f"{root}/{parent}" for parent in (*reversed(inner.parents), inner) if str(parent) != ".")]
    return [root]


def _integer(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def jetson(sources: Sources) -> tuple[str | None, str | None]:
    """Name and power mode of a Jetson, or None twice."""
    board = (sources.text("/proc/device-tree/model") or "").strip("\0\n ")
    if "jetson" not in board.lower() and tegra_release(sources) is None:
        return None, None
    return re.sub(r"^NVIDIA\s+", "", board) or "Jetson", _power_mode(sources)


def tegra_release(sources: Sources) -> str | None:
    """The release of Jetson Linux, R36.4.3, where this is one."""
    match = re.search(r"# (R\d+) \(release\), REVISION: ([\d.]+)", sources.text("/etc/nv_tegra_release") or "")
    return f"{match[1]}.{match[2]}" if match else None


def _power_mode(sources: Sources) -> str | None:
    asked = re.search(r"NV Power Mode\s*:\s*(\S+)", sources.output("nvpmodel", "-q") or "")
    if asked:
        return asked[1].removeprefix("MODE_")
    status = re.search(r"pmode:(\d+)", sources.text("/var/lib/nvpmodel/status") or "")  # nvpmodel itself may need rights
    modes = dict(re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", sources.text("/etc/nvpmodel.conf") or ""))
    return modes.get(str(int(status[1]))) if status else None
