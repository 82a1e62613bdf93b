"""What a server did under load: the records of its JSON file, and the figures that they give. Times are seconds."""

from collections.abc import Sequence

import msgspec
import numpy as np

from elastic_bench.records import Machine
from elastic_runtime.contract.records import read_record
from elastic_runtime.errors import UsageError

SCHEMA_VERSION = 1
LOADS = (0.5, 1.0, 2.0, 4.0)


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything in the report."""


class LoadSettings(_Record, frozen=True):
    """How it was measured: `duration` of each way at loads of 1 and more, and longer below, for as many requests; `steps` and `guidance`
    of pictures; `patience`: the deadline of a request, in times of one picture alone at the best budget."""

    duration: float = 10.0
    loads: tuple[float, ...] = LOADS
    steps: int = 20
    guidance: float = 2.0
    patience: float = 3.0

    def check(self) -> None:
        """Raise UsageError for settings that measure nothing."""
        if not 0 < self.duration < float("inf"):
            raise UsageError(f"duration is the seconds that each way is asked at each load, more than 0, got {self.duration:g}")
        if not self.loads or not all(0 < load < float("inf") for load in self.loads):
            raise UsageError(
                f"loads are multiples of what the best budget sustains, each more than 0, got {', '.join(map(str, self.loads))}"
            )
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}")
        if not 1 <= self.guidance < float("inf"):
            raise UsageError(f"guidance must be 1 (off) or more, got {self.guidance:g}")


class LoadRow(_Record, frozen=True):
    """One way at one load. `asked` requests came within `span` seconds (until the last was answered); `late_after` is their deadline.

    latencies: of what was drawn, from the request to the picture. refused: requests that were refused for their deadline or a full queue.
    failed: those that ended in another error. quality: mean over steps of what the card says of their budgets, where there is a card.
    """

    load: float
    way: str
    asked: int
    refused: int
    failed: int
    span: float
    late_after: float
    latencies: tuple[float, ...]
    quality: float | None

    @property
    def on_time(self) -> float:
        """Share of all requests: what is refused is not on time."""
        return self._timely / self.asked

    @property
    def kept(self) -> float | None:
        """Share on time of those drawn; None where none was."""
        return self._timely / len(self.latencies) if self.latencies else None

    @property
    def throughput(self) -> float:
        """Pictures on time a second."""
        return self._timely / self.span

    def percentile(self, share: float) -> float | None:
        """Seconds within which so many of the pictures that were drawn came; None where none was."""
        return float(np.quantile(self.latencies, share)) if self.latencies else None

    @property
    def _timely(self) -> int:
        return sum(latency <= self.late_after for latency in self.latencies)


class LoadReport(_Record, frozen=True):
    """The whole file. `alone`: seconds of one picture at the best budget, with nothing beside it.

    sustained: pictures a second where there are always some to draw, by way. where: what the server ran on.
    """

    schema_version: int
    created: str
    command: str
    machine: Machine
    bundle: str
    model: str
    where: str
    settings: LoadSettings
    alone: float
    sustained: dict[str, float]
    rows: tuple[LoadRow, ...]

    def of(self, way: str) -> Sequence[LoadRow]:
        """A way's rows, in the order of their loads."""
        return sorted((row for row in self.rows if row.way == way), key=lambda row: row.load)

    @property
    def ways(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.way for row in self.rows))

    @property
    def method(self) -> str:
        """How it was measured, in words."""
        settings, rates = self.settings, ", ".join(f"{way} {rate:.1f}" for way, rate in self.sustained.items())
        failed = ", ".join(f"{row.failed} of {row.asked} at load {row.load:g} ({row.way})" for row in self.rows if row.failed)
        return (
            "A server process was asked by an open loop: requests came at the times of a Poisson process, whether or not those before were "
            f"answered. One picture alone takes {1e3 * self.alone:.0f} ms at the best budget, and each was wanted within "
            f"{1e3 * settings.patience * self.alone:.0f} ms. Pictures a second where there are always some to draw: {rates}; load 1 is "
            f"what the best budget sustains. {settings.duration:g} s of each way, longer below load 1, in turns; {settings.steps} steps, "
            f"guidance {settings.guidance:g}." + (f" Ended in an error, and count as not on time: {failed}." if failed else "")
        )


COLUMNS = (
    "load", "way", "on time", "refused", "of those drawn", "p50 ms", "p95 ms", "p99 ms", "on time a second", "quality",
)  # fmt: skip


def cells(row: LoadRow) -> tuple[str, ...]:
    """A row under `COLUMNS`."""
    times = [row.percentile(share) for share in (0.5, 0.95, 0.99)]
    return (
        f"{row.load:g}", row.way, f"{row.on_time:.1%}", f"{row.refused / row.asked:.1%}", "-" if row.kept is None else f"{row.kept:.1%}",
        *("-" if seconds is None else f"{1e3 * seconds:.0f}" for seconds in times), f"{row.throughput:.1f}",
        "-" if row.quality is None else f"{row.quality:.1%}",
    )  # fmt: skip


def decode(text: bytes, where: str) -> LoadReport:
    """Read a report; raise UsageError naming the field or the schema that is wrong."""
    return read_record(text, where, LoadReport, SCHEMA_VERSION, "report of a server's load", "measure again", UsageError)
