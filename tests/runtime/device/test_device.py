"""Probes of recorded machines, the catalogue, and NVML through a library made of Python."""

import re
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from recordings import GIB, MACHINES, RTX_4090

from elastic_runtime.choosing.cost import Rates
from elastic_runtime.device import Device, advice, busy_cores, catalogue, listed_peak, matched, peak, probe, runtimes, usable_cores
from elastic_runtime.device.nvml import read_gpus
from elastic_runtime.device.sources import System
from elastic_runtime.errors import UsageError


def machine(name: str) -> Device:
    return probe(MACHINES[name])


@pytest.mark.parametrize(
    ("name", "model", "cores", "vector", "flops_per_clock"),
    [
        ("xeon", "Intel(R) Xeon(R) Platinum 8488C", 8, "AVX-512", 64),
        ("zen4", "AMD EPYC 9R14", 4, "AVX-512", 32),
        ("zen5", "AMD EPYC", 2, "AVX-512", 64),
        ("laptop", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 4, "AVX2", 32),
        ("graviton3", "Neoverse-V1", 4, "Neon", 16),
        ("raspberry-pi-5", "Cortex-A76", 4, "Neon", 16),
        ("m1", "Apple M1", 4, "Neon", 32),
        ("intel-mac", "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", 6, "AVX2", 32),
        ("bare", "unknown", 3, None, 2),
        ("windows", "Intel(R) Core(TM) i5-10500", 12, "AVX2", 32),
    ],
)
def test_processors(name: str, model: str, cores: int, vector: str | None, flops_per_clock: int) -> None:
    cpu = machine(name).cpu
    assert (cpu.model, cpu.cores, cpu.vector, cpu.flops_per_clock) == (model, cores, vector, flops_per_clock)


def test_clocks_and_caches() -> None:
    assert machine("laptop").cpu.mhz == 3400  # what it can, not what it does while idle
    assert machine("xeon").cpu.caches == {"L1d": 48 << 10, "L2": 2 << 20, "L3": 36 << 20}
    assert machine("intel-mac").cpu.mhz == 2600
    assert machine("m1").cpu.caches == {"L2": 12 << 20}
    assert machine("m1").cpu.mhz is None


@pytest.mark.parametrize(
    ("name", "total", "available", "limit", "usable"),
    [
        ("xeon", 64 * GIB, 60 * GIB, None, 8),
        ("container-v2", 2 * GIB, 2 * GIB - GIB // 2, 2 * GIB, 1.5),
        ("slice-v2", 4 * GIB, 3 * GIB, 4 * GIB, 8),
        ("container-v1", GIB, GIB - GIB // 4, GIB, 2),
        ("unlimited-v1", 64 * GIB, 60 * GIB, None, 8),
        ("m1", 16 * GIB, 160000 * 16384, None, 4),
        ("bare", None, None, None, 3),
    ],
)
def test_memory_and_processors_within_a_containers_limits(
    name: str, total: int | None, available: int | None, limit: int | None, usable: float
) -> None:
    device = machine(name)
    assert (device.memory.total, device.memory.available, device.memory.limit) == (total, available, limit)
    assert device.cpu.usable == usable


@pytest.mark.parametrize(
    ("name", "board", "power_mode", "listed"),
    [
        ("orin-nano", "Jetson Orin Nano Developer Kit", "15W", "jetson-orin-nano-8"),
        ("orin-nano-super", "Jetson Orin Nano Engineering Reference Developer Kit Super", "MAXN_SUPER", "jetson-orin-nano-8-super"),
        ("agx-orin-64", "Jetson AGX Orin Developer Kit", "30W", "jetson-agx-orin-64"),
        ("thor", "Jetson AGX Thor Developer Kit", "120W", "jetson-thor-t5000"),
        ("m1", "Apple M1", "automatic", "apple-m1"),
        ("m4-max", "Apple M4 Max", "low power", "apple-m4-max"),
        ("rtx-4090", None, None, "rtx-4090"),
        ("raspberry-pi-5", None, None, "raspberry-pi-5"),
        ("unlisted-gpu", None, None, None),
        ("zen5", None, None, None),
        ("intel-mac", None, "automatic", None),
        ("windows", None, None, None),
    ],
)
def test_boards_and_the_catalogues_entry(name: str, board: str | None, power_mode: str | None, listed: str | None) -> None:
    device, entry = machine(name), matched(machine(name))
    assert (device.board, device.power_mode, entry.id if entry else None) == (board, power_mode, listed)


def test_a_smaller_board_of_the_same_name_is_told_by_its_memory() -> None:
    recording = MACHINES["agx-orin-64"]
    small = probe(type(recording)(**{**_fields(recording), "files": {**recording.files, "/proc/meminfo": "MemTotal: 31000000 kB\n"}}))
    entry = matched(small)
    assert entry is not None
    assert entry.id == "jetson-agx-orin-32"


def _fields(recording: Any) -> dict[str, Any]:
    return {name: getattr(recording, name) for name in recording.__struct_fields__}


def test_a_gpu_is_read_from_the_driver() -> None:
    (gpu,) = machine("rtx-4090").gpus
    assert (gpu.name, gpu.compute_capability, gpu.power_limit_watts, gpu.integrated) == ("GeForce RTX 4090", "8.9", 450, False)
    assert gpu.bandwidth == pytest.approx(1008e9, rel=0.001)
    (orin,) = machine("orin-nano").gpus
    assert (orin.integrated, orin.memory_total, orin.driver) == (True, None, "R36.4.3")


def test_peaks_are_the_catalogues_or_estimated_and_say_which() -> None:
    listed = peak(machine("rtx-4090"), "gpu")
    assert (listed.flops["fp16"], listed.bandwidth, listed.listed) == (pytest.approx(165.2e12), 1008e9, "rtx-4090")
    assert listed.flops["fp32"] == pytest.approx(82.6e12), "float32 itself, not TF32"
    unlisted = peak(machine("unlisted-gpu"), "gpu")
    assert unlisted.listed is None
    assert unlisted.flops["fp32"] == pytest.approx(9728 * 2 * 2.04e9)
    assert "estimated" in unlisted.origin
    cpu = peak(machine("rtx-4090"), "cpu")
    assert cpu.flops["fp32"] == pytest.approx(8 * 64 * 2.5e9)
    assert "8 cores x 64" in cpu.origin
    assert "assumed" in peak(machine("bare"), "cpu").origin
    half = peak(machine("container-v2"), "cpu")
    assert half.flops["fp32"] == pytest.approx(1.5 * 64 * 2.5e9)


def test_the_catalogue_is_whole() -> None:
    entries = catalogue()
    assert len({entry.id for entry in entries}) == len(entries) >= 30
    for entry in entries:
        re.compile(entry.match)
        assert Rates.of(listed_peak(entry), "fp16").flops > 0
        assert entry.bandwidth.source in ("datasheet", "computed", "press")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("laptop", "pip install 'elastic-export[ort]'"),
        ("laptop", "MB of memory are free"),
        ("orin-nano", "cannot run without the CUDA bindings"),
        ("thor", "sudo apt install nvidia-jetpack"),
        ("unlisted-gpu", "pip install 'elastic-export[rtx]'"),
        ("m4-max", "the power mode is low power"),
        ("container-v2", "may use 1.5 of 8 cores"),
        ("xeon", "pip install 'elastic-export[torch]'"),
    ],
)
def test_advice_names_the_line_to_paste(name: str, hint: str) -> None:
    assert any(hint in line for line in advice(machine(name)))


def test_a_gpu_that_tensorrt_rtx_does_not_serve_is_sent_to_tensorrt() -> None:
    device = machine("unlisted-gpu")
    hopper = msgspec.structs.replace(device, gpus=(msgspec.structs.replace(device.gpus[0], compute_capability="9.0"),))
    (line,) = [line for line in advice(hopper) if "TensorRT" in line]
    assert "pip install 'elastic-export[trt]'" in line
    assert "[rtx]" not in line


def test_what_can_run_a_bundle() -> None:
    assert runtimes(machine("laptop")) == {}
    assert runtimes(machine("xeon")) == {"onnxruntime": "1.31.1"}
    assert runtimes(machine("orin-nano")) == {}  # no CUDA bindings
    assert runtimes(machine("orin-nano-super")) == {"tensorrt": "10.3.0"}
    assert runtimes(machine("m1")) == {"coremltools": "9.0"}
    assert not [line for line in advice(machine("rtx-4090")) if "TensorRT" in line]


def test_a_fingerprint_changes_with_what_changes_times() -> None:
    assert machine("orin-nano").fingerprint != machine("orin-nano-super").fingerprint
    assert machine("xeon").fingerprint != machine("container-v2").fingerprint
    assert machine("xeon").fingerprint == machine("xeon").fingerprint


@pytest.mark.parametrize("name", MACHINES)
def test_no_machine_is_beyond_the_probe(name: str) -> None:
    device = machine(name)
    assert peak(device, "cpu").flops["fp32"] > 0
    assert device.cpu.usable > 0


def test_this_machine() -> None:
    device = probe()
    assert device.cpu.cores >= 1
    assert peak(device, "cpu").bandwidth > 0


def test_a_missing_command_file_or_package_is_none() -> None:
    here = System()
    assert here.text("/nowhere/at/all") is None
    assert here.output("no-such-command-anywhere") is None
    assert here.version("no-such-package-anywhere") is None


class Library:
    """NVML for one GPU, as ctypes calls it; functions in `broken` answer with an error."""

    def __init__(self, broken: tuple[str, ...] = (), absent: tuple[str, ...] = (), count: int = 1):
        self.broken, self.absent, self.count = broken, absent, count
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        if name in self.absent:
            raise AttributeError(name)
        return lambda *arguments: 3 if name in self.broken else self._answer(name, arguments)

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        clock = {1: RTX_4090.sm_clock, 2: RTX_4090.memory_clock}
        numbers = {
            "nvmlDeviceGetCount_v2": self.count, "nvmlDeviceGetEnforcedPowerLimit": RTX_4090.power_limit,
            "nvmlDeviceGetMemoryBusWidth": RTX_4090.bus_width, "nvmlDeviceGetNumGpuCores": RTX_4090.cores,
        }  # fmt: skip
        texts = {"nvmlDeviceGetName": RTX_4090.name, "nvmlSystemGetDriverVersion": RTX_4090.driver}
        if name in numbers:
            arguments[-1]._obj.value = numbers[name]
        elif name in texts:
            arguments[-2].value = texts[name].encode()
        elif name == "nvmlDeviceGetMaxClockInfo":
            arguments[-1]._obj.value = clock[arguments[1].value]
        elif name == "nvmlDeviceGetMemoryInfo":
            memory = arguments[1]._obj
            memory.total, memory.free = RTX_4090.memory_total, RTX_4090.memory_free
        elif name == "nvmlDeviceGetCudaComputeCapability":
            arguments[1]._obj.value, arguments[2]._obj.value = 8, 9
        elif name == "nvmlShutdown":
            self.closed = True
        return 0


def test_nvml_is_read_and_closed() -> None:
    library = Library()
    assert read_gpus(lambda: library) == (RTX_4090,)
    assert library.closed


def test_what_a_gpu_does_not_tell_is_none() -> None:
    quiet = Library(broken=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetEnforcedPowerLimit"), absent=("nvmlDeviceGetNumGpuCores",))
    readings = read_gpus(lambda: quiet)
    assert not isinstance(readings, str)
    assert (readings[0].memory_total, readings[0].power_limit, readings[0].cores, readings[0].fp32_flops) == (None, None, None, None)


def test_why_there_are_no_gpus() -> None:
    def absent() -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert read_gpus(absent) == "there is no NVIDIA driver"
    assert "does not answer" in read_gpus(lambda: Library(broken=("nvmlInit_v2",)))
    assert read_gpus(lambda: Library(count=0)) == "the NVIDIA driver sees no GPU"


def test_probing_imports_no_backend() -> None:
    program = (
        "import sys, elastic_runtime.device as d; d.probe(); d.catalogue();"
        "print([n for n in sys.modules if n.split('.')[0] in ('onnxruntime', 'torch', 'tensorrt', 'tensorrt_rtx', 'openvino', 'cuda')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("allowed", "usable"),
    [
        ((0, 1, 2, 3), 4),  # of 8 cores with two threads each: 8 is the other thread of core 0
        ((0, 8), 1),
        ((0, 1, 8, 15), 3),
        ((3,), 1),
        ((40, 41), 1),  # of numbers that /proc/cpuinfo does not have, as a container's may be: a share of the cores
    ],
)
def test_cores_are_those_of_the_threads_that_a_process_may_run_on(allowed: tuple[int, ...], usable: float) -> None:
    assert probe(msgspec.structs.replace(MACHINES["xeon"], allowed=allowed)).cpu.usable == usable


def test_a_board_is_known_by_its_own_memory_not_by_a_containers() -> None:
    recording = MACHINES["agx-orin-64"]
    limited = recording.files | {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{16 * GIB}\n"}
    device = probe(msgspec.structs.replace(recording, files=limited))
    entry = matched(device)
    assert (device.memory.total, entry.id if entry else None) == (16 * GIB, "jetson-agx-orin-64")
    assert device.fingerprint == machine("agx-orin-64").fingerprint


@pytest.mark.parametrize("threads", [-1, 1.5, "2", True])
def test_threads_are_a_whole_number(threads: Any) -> None:
    assert (busy_cores(3), busy_cores(0)) == (3, usable_cores())
    with pytest.raises(UsageError, match=f"threads is a whole number, 0 for one a core, got {threads!r}"):
        busy_cores(threads)
