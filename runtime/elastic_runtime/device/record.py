"""What was found on this machine, as records: `probe` fills them, the catalogue adds figures, calibrations are keyed by them."""

from typing import Literal

import msgspec

Processor = Literal["cpu", "gpu", "npu"]  # the kinds of processors that sessions run on


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that was found. None stands for what the system did not tell."""


class Cpu(_Record, frozen=True, kw_only=True):
    """`cores` are physical ones; `usable` is how many the process may keep busy at once, by affinity and quota.

    `vector` is the widest unit that float32 code uses; `flops_per_clock` counts a core's multiply-adds twice; caches are in bytes.
    """

    model: str
    cores: int
    usable: float
    vector: str | None
    flops_per_clock: int
    mhz: float | None = None
    caches: dict[str, int] = {}


class Memory(_Record, frozen=True, kw_only=True):
    """Bytes. `total` and `available` respect the limit of a container, which is `limit` where there is one; `machine` is then what the
    machine has, by which a board is known."""

    total: int | None
    available: int | None
    limit: int | None = None
    machine: int | None = None


class Gpu(_Record, frozen=True, kw_only=True):
    """A graphics processor. An `integrated` one shares the machine's memory, and its own figures are None.

    `bandwidth` (bytes a second) and `fp32_flops` (a second) are what its clocks, bus and cores come to.
    """

    name: str
    integrated: bool = False
    memory_total: int | None = None
    memory_free: int | None = None
    compute_capability: str | None = None
    driver: str | None = None
    power_limit_watts: float | None = None
    bandwidth: float | None = None
    fp32_flops: float | None = None


class Device(_Record, frozen=True, kw_only=True):
    """A machine. `board` is a Jetson's or Apple chip's own name; `backends` are installed packages and their versions.

    `notes` say what could not be found out, and why.
    """

    system: str
    machine: str
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...] = ()
    board: str | None = None
    power_mode: str | None = None
    backends: dict[str, str] = {}
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> dict[str, object]:
        """What a measured time depends on and free memory does not: the key of calibrations."""
        return {
            "system": self.system,
            "machine": self.machine,
            "cpu": self.cpu.model,
            "cores": self.cpu.cores,
            "usable": self.cpu.usable,
            "gpus": [[gpu.name, gpu.driver, gpu.power_limit_watts] for gpu in self.gpus],
            "board": self.board,
            "power_mode": self.power_mode,
        }
