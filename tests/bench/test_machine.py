"""The machine's own figures, and its energy counters against stand-ins."""

import ctypes
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_bench import energy
from elastic_bench.machine import machine, peaks, versions
from elastic_bench.records import Peaks
from elastic_runtime.device import nvml


def test_the_machine_is_told_in_words_and_without_its_name() -> None:
    here = machine()
    assert str(here).startswith(f"{here.cores}-core {here.architecture} machine, {here.system}")
    assert here.versions["python"]
    assert versions("pytest", "no-such-package").keys() == {"python", "pytest"}


def test_peaks_count_the_work_of_the_fastest_run() -> None:
    ticks = iter([0.0, 2.0, 2.0, 3.0, 3.0, 7.0, 7.0, 9.0])  # two runs of each: products of 2 and 1 s, copies of 4 and 2 s
    peak = peaks(side=8, size=8000, runs=2, threads=2, clock=lambda: next(ticks))
    assert peak.flops_per_second == 2 * 8**3 / 1.0
    assert peak.bytes_per_second == 2 * 8000 / 2.0


def zone(folder: Path, name: str, microjoules: int, of: str = "package-0", most: int = 1000) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "name").write_text(f"{of}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / name / "energy_uj"


def test_rapl_adds_packages_not_their_parts_and_goes_on_where_a_counter_wraps(tmp_path: Path) -> None:
    one, two = zone(tmp_path, "intel-rapl:0", 900), zone(tmp_path, "intel-rapl:1", 100, "package-1")
    part, platform = zone(tmp_path, "intel-rapl:0:0", 50, "core"), zone(tmp_path, "intel-rapl:2", 10, "psys")
    read = energy.rapl(tmp_path)
    assert callable(read)
    assert read() == 0
    one.write_text("99")  # past 1000 and on
    two.write_text("300")
    part.write_text("999")
    platform.write_text("900")  # both packages are in it
    assert read() == pytest.approx(400e-6)
    one.write_text("199")
    assert read() == pytest.approx(500e-6)


def test_rapl_says_why_it_is_absent(tmp_path: Path) -> None:
    assert energy.rapl(tmp_path / "none") == "this system has no power capping interface"
    assert energy.rapl(tmp_path) == "the processor offers no counter"
    zone(tmp_path, "intel-rapl:1", 10, "psys")
    assert energy.rapl(tmp_path) == "the processor offers no counter"
    (tmp_path / "intel-rapl:0").mkdir()
    assert "cannot be read" in str(energy.rapl(tmp_path))


class Nvml:
    """The library's calls, with a GPU that has used `millijoules`."""

    def __init__(self, gpus: int = 1, counts: bool = True):
        self.gpus, self.counts, self.millijoules = gpus, counts, 5000

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        return 0 if index < self.gpus else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, pointer: Any) -> int:  # noqa: N802
        pointer._obj.value = self.millijoules
        return 0 if self.counts else 3


def test_nvml_reads_joules_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()
    read = nvml.energy(lambda: library)
    assert callable(read)
    assert read() == 5.0
    library.millijoules = 7500
    assert read() == 7.5
    assert nvml.energy(lambda: Nvml(gpus=0)) == "the NVIDIA driver sees no GPU"
    assert "counts no energy" in str(nvml.energy(lambda: Nvml(counts=False)))

    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert nvml.energy() == "there is no NVIDIA driver"


def test_powermetrics_is_added_up_from_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "*** Sampled system activity (Fri) ({}ms elapsed) ***\nCPU Power: 900 mW\nCombined Power (CPU + GPU + ANE): {} mW\n"
    read = energy.watch(io.StringIO(words.format("100.00", 2000) + words.format("200.00", 1000)))
    for _ in range(100):
        if read() >= 0.39:
            break
        time.sleep(0.01)
    assert read() == pytest.approx(0.4)
    monkeypatch.setattr(energy.sys, "platform", "linux")
    assert energy.powermetrics() == "it is a tool of macOS"
    monkeypatch.setattr(energy.sys, "platform", "darwin")
    monkeypatch.setattr(energy, "shutil", SimpleNamespace(which=lambda name: name))
    monkeypatch.setattr(energy.os, "geteuid", lambda: 501)
    assert energy.powermetrics() == "it needs root: run the command with sudo"


def test_every_source_is_either_there_or_says_why_not() -> None:
    counters, absent = energy.counters()
    assert counters.keys() | absent.keys() == {"RAPL", "NVML", "powermetrics"}
    assert not counters.keys() & absent.keys()
    assert all(absent.values())


def test_no_peak_is_below_that_of_floats() -> None:
    """A processor without instructions for bytes multiplies them one by one: a share of that would be 2000 %."""
    plain = Peaks(flops_per_second=2e11, bytes_per_second=1e9, rates={"fp32": 2e11, "fp16": 1e9, "int8": 5e9})
    assert {plain.at(name) for name in ("fp32", "int8", "bf16", "int4w")} == {2e11}
    assert Peaks(flops_per_second=2e11, bytes_per_second=1e9, rates={"int8": 8e11}).at("int8") == 8e11


def test_peaks_of_the_machine_are_the_best_of_each_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the rates below float32 are torch's")
    from elastic_export.bench import peaks as room

    monkeypatch.setenv(room.MISLEADING, "Prescott")
    peak = room.peaks(1)
    assert set(peak.rates) == {"fp32", "fp16", "int8"}
    assert peak.flops_per_second == peak.rates["fp32"] == peak.at("fp32") == peak.at("int8w")
    assert peak.at("int8") == max(peak.rates["int8"], peak.rates["fp32"])
    assert min(peak.rates.values()) > 1e8
    import os

    assert os.environ[room.MISLEADING] == "Prescott"
