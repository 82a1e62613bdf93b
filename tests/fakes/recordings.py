"""Recorded probes of machines that are not here, in the formats that their systems have."""

from typing import Any

from elastic_runtime.device import Reading, Recording, windows

GIB = 1 << 30
NO_LIMIT = str(9223372036854771712)


def cpuinfo(
    model: str, flags: str, cores: int, threads: int = 1, vendor: str = "GenuineIntel", family: int = 6, mhz: float = 2500.0
) -> str:
    """/proc/cpuinfo of x86: a block for each logical processor."""
    blocks = []
    for logical in range(cores * threads):
        blocks.append(
            f"processor\t: {logical}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: {model}\ncpu MHz\t\t: {mhz}\n"
            f"physical id\t: 0\ncore id\t\t: {logical % cores}\nflags\t\t: {flags}\n"
        )
    return "\n".join(blocks)


def arm(part: str, cores: int, extra: str = "") -> str:
    """/proc/cpuinfo of 64-bit ARM."""
    block = (
        "BogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes{extra}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part}\n"
    )
    return "\n".join(f"processor\t: {i}\n" + block.format(part=part, extra=extra) for i in range(cores))


def meminfo(total: float, available: float) -> str:
    return f"MemTotal:       {int(total * 2**20)} kB\nMemFree:        1024 kB\nMemAvailable:   {int(available * 2**20)} kB\n"


AVX2 = "fpu sse2 avx fma avx2"
AVX512 = AVX2 + " avx512f avx512bw"
CACHES = {
    f"/sys/devices/system/cpu/cpu0/cache/index{i}/{name}": value + "\n"
    for i, row in enumerate((("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "36M")))
    for name, value in zip(("level", "type", "size"), row, strict=True)
}
ONNX = {"onnxruntime": "1.31.1"}


def linux(files: dict[str, str], **more: Any) -> Recording:
    return Recording(system="Linux", machine=more.pop("machine", "x86_64"), files=files, packages=more.pop("packages", ONNX), **more)


XEON = {"/proc/cpuinfo": cpuinfo("Intel(R) Xeon(R) Platinum 8488C", AVX512, 8, 2), "/proc/meminfo": meminfo(64, 60), **CACHES}
JETSON_FILES = {
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n",
    "/etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
}
RTX_4090 = Reading(
    name="NVIDIA GeForce RTX 4090", driver="580.65.06", memory_total=25757220864, memory_free=24000000000, compute_capability=(8, 9),
    power_limit=450000, sm_clock=3105, memory_clock=10501, bus_width=384, cores=16384,
)  # fmt: skip


def mac(chip: str, memory: int, cores: int, machine: str = "arm64", mode: str = "0", **more: str) -> Recording:
    values = {"machdep.cpu.brand_string": chip, "hw.memsize": str(memory), "hw.physicalcpu": str(cores), **more}
    return Recording(
        system="Darwin", machine=machine, processor="arm", cpu_count=cores, packages={"coremltools": "9.0"},
        commands={
            "sysctl hw machdep.cpu": "\n".join(f"{name}: {value}" for name, value in values.items()),
            "vm_stat": "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:   100000.\nPages inactive:   50000.\n"
            "Pages wired down:   90000.\nPages speculative:  10000.\n",
            "pmset -g": f"Currently in use:\n standby              1\n lowpowermode         {mode}\n",
        },
    )  # fmt: skip


MACHINES: dict[str, Recording] = {
    "xeon": linux(XEON, cpu_count=16),
    "zen4": linux(
        {"/proc/cpuinfo": cpuinfo("AMD EPYC 9R14", AVX512, 4, 2, "AuthenticAMD", 25), "/proc/meminfo": meminfo(32, 30)}, cpu_count=8
    ),
    "zen5": linux({"/proc/cpuinfo": cpuinfo("AMD EPYC", AVX512, 2, 1, "AuthenticAMD", 26), "/proc/meminfo": meminfo(24, 21)}, cpu_count=2),
    "laptop": linux(
        {
            "/proc/cpuinfo": cpuinfo("Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", AVX2, 4, 2, mhz=800.0),
            "/proc/meminfo": meminfo(8, 0.7),
            "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3400000\n",
        },
        cpu_count=8, packages={},
    ),
    "graviton3": linux({"/proc/cpuinfo": arm("0xd40", 4, " sve"), "/proc/meminfo": meminfo(8, 7)}, machine="aarch64", cpu_count=4),
    "raspberry-pi-5": linux(
        {
            "/proc/cpuinfo": arm("0xd0b", 4) + "\nRevision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
            "/proc/meminfo": meminfo(8, 7),
            "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
        },
        machine="aarch64", cpu_count=4,
    ),
    "orin-nano": linux(
        JETSON_FILES | {
            "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0", "/proc/cpuinfo": arm("0xd42", 6),
            "/proc/meminfo": meminfo(7.4, 5), "/var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n",
        },
        machine="aarch64", cpu_count=6, packages={"tensorrt": "10.3.0"},
    ),
    "orin-nano-super": linux(
        JETSON_FILES | {
            "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "/proc/cpuinfo": arm("0xd42", 6), "/proc/meminfo": meminfo(7.4, 5),
        },
        machine="aarch64", cpu_count=6, commands={"nvpmodel -q": "NV Power Mode: MAXN_SUPER\n2\n"},
        packages={"tensorrt": "10.3.0", "cuda-bindings": "12.6.0"},
    ),
    "agx-orin-64": linux(
        JETSON_FILES | {
            "/proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0", "/proc/cpuinfo": arm("0xd42", 12),
            "/proc/meminfo": meminfo(61.4, 50),
        },
        machine="aarch64", cpu_count=12, commands={"nvpmodel -q": "NV Power Mode: MODE_30W\n2\n"},
    ),
    "thor": linux(
        {
            "/proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0", "/proc/cpuinfo": arm("0xd83", 14),
            "/proc/meminfo": meminfo(122, 110),
        },
        machine="aarch64", cpu_count=14, commands={"nvpmodel -q": "NV Power Mode: 120W\n1\n"},
        gpus=(Reading(name="NVIDIA Thor", driver="580.00", compute_capability=(11, 0)),),
    ),
    "rtx-4090": linux(XEON, cpu_count=16, gpus=(RTX_4090,), packages=ONNX | {"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5.0"}),
    "unlisted-gpu": linux(
        XEON, cpu_count=16,
        gpus=(Reading(
            name="NVIDIA GeForce RTX 4090 Laptop GPU", driver="580.65.06", memory_total=16 * GIB, memory_free=15 * GIB,
            compute_capability=(8, 9), power_limit=150000, sm_clock=2040, memory_clock=9001, bus_width=256, cores=9728,
        ),),
    ),
    "m1": mac("Apple M1", 16 * GIB, 8, **{"hw.perflevel0.physicalcpu": "4", "hw.perflevel0.l2cachesize": "12582912"}),
    "m4-max": mac("Apple M4 Max", 128 * GIB, 16, mode="1", **{"hw.perflevel0.physicalcpu": "12"}),
    "intel-mac": mac(
        "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", 16 * GIB, 6, "x86_64",
        **{"hw.optional.avx2_0": "1", "hw.cpufrequency_max": "2600000000", "hw.l3cachesize": "12582912"},
    ),
    "container-v2": linux(
        XEON | {
            "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{2 * GIB}\n", "/sys/fs/cgroup/memory.current": f"{GIB}\n",
            "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
        cpu_count=16,
    ),
    "slice-v2": linux(  # a limit two levels up, none on the group itself
        XEON | {
            "/proc/self/cgroup": "0::/user.slice/app.scope\n", "/sys/fs/cgroup/user.slice/memory.max": f"{4 * GIB}\n",
            "/sys/fs/cgroup/user.slice/memory.current": f"{GIB}\n", "/sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
            "/sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000\n",
        },
        cpu_count=16,
    ),
    "container-v1": linux(
        XEON | {
            "/proc/self/cgroup": "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n0::/\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n", "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 4}\n",
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        cpu_count=16,
    ),
    "unlimited-v1": linux(XEON | {"/sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT + "\n"}, cpu_count=16),
    "bare": Recording(system="Linux", machine="riscv64", cpu_count=3),
    "windows": Recording(
        system="Windows", machine="AMD64", processor="Intel64 Family 6 Model 165", cpu_count=12, packages=ONNX,
        kernel=windows.Reading(
            memory_total=17_000_000_000, memory_available=9_000_000_000, vector="AVX2", model="Intel(R) Core(TM) i5-10500", mhz=3096.0
        ),
    ),
}  # fmt: skip
