"""What a benchmark found: the records of its JSON file. Times are seconds, sizes bytes, rates per second, energies joules."""

import msgspec

from elastic_runtime.contract.artifacts import Verification
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.manifest import Quality
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.contract.records import read_record
from elastic_runtime.device import Processor
from elastic_runtime.errors import UsageError

SCHEMA_VERSION = 1
ROUNDS = 10  # turns that every row gets


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the report."""


class Machine(_Record, frozen=True, kw_only=True):
    """Where it ran. `versions` are of Python and of the packages that took part."""

    system: str
    architecture: str
    processor: str
    cores: int
    memory_bytes: int | None
    versions: dict[str, str]

    def __str__(self) -> str:
        words = f"{self.cores}-core {self.architecture} machine, {self.system}"
        return f"{words}, {self.processor}" if self.processor and self.processor != self.architecture else words


class Peaks(_Record, frozen=True, kw_only=True):
    """What this machine's processor reaches at best: a float32 matrix product, and a copy (bytes read and bytes written).

    `rates`: matrix products by the name of the rate in the table of precisions; none where numpy's alone was measured.
    """

    flops_per_second: float
    bytes_per_second: float
    rates: dict[str, float] = {}

    def at(self, precision: str) -> float:
        """The rate of products in a precision, where it was measured, or in the one that it falls back to; float32's where that is greater.

        Any precision's products may be computed in float32. Where a processor has no instructions for a rate, what was measured of it
        is a plain loop, and no peak.
        """
        rates = {PRECISIONS[EXACT].rate: self.flops_per_second} | self.rates
        return max(PRECISIONS[precision].peak(rates), self.flops_per_second)


class Settings(_Record, frozen=True, kw_only=True):
    """How it was measured. `duration` is the timing of each row; `guidance` and `steps` are those of pictures."""

    batch: int = 1
    steps: int = 20
    duration: float = 3.0
    guidance: float = 2.0
    threads: int = 1
    quality: bool = False
    single_stream: bool = False

    def check(self) -> None:
        """Raise UsageError for settings that measure nothing."""
        for name in ("batch", "steps", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.duration < float("inf"):
            raise UsageError(f"duration is the seconds of timing that each row gets, more than 0, got {self.duration:g}")
        if not 1 <= self.guidance < float("inf"):
            raise UsageError(f"guidance must be 1 (off) or more, got {self.guidance:g}")


class Summary(_Record, frozen=True, kw_only=True):
    """Of many samples: percentiles by linear interpolation. `spread` is (p75 - p25) / p50 of the rounds' medians."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    spread: float


class SingleStream(_Record, frozen=True, kw_only=True):
    """One picture after another, each asked for when the last is done. `complete`: all queries ran before the time limit."""

    queries: int
    seconds: float
    p90: float
    complete: bool


class Row(_Record, frozen=True, kw_only=True):
    """One runtime at one budget. `rounds` are the samples of each turn, of which `step` is the summary.

    flops, moved_bytes: of one step (one forward pass of the batch), from the manifest's cost.
    first_seconds: the first run at this budget in a new process. switch_seconds: the first run after another budget, less a steady one.
    agrees: how its outputs compare with those of the first runtime that passed; None for that one.
    joules: of one step, by source. pictures: seconds of whole guided pictures (of a batch of them).
    """

    budget: dict[str, int]
    flops: int | None
    moved_bytes: int | None
    first_seconds: float
    switch_seconds: float | None
    rounds: tuple[tuple[float, ...], ...]
    step: Summary
    agrees: Verification | None
    joules: dict[str, float]
    pictures: tuple[float, ...] = ()
    single_stream: SingleStream | None = None


class RuntimeReport(_Record, frozen=True, kw_only=True):
    """One runtime on one bundle. Where it could not run, `missing` says what is not here; where it was wrong or broke, `failure` says how.

    `where` is what it ran on and `processor` of which kind that is (None: it did not run, or an older version wrote this).
    `held` is the precision with how weights came to their bits, where the artifact says more than its precision.
    A runtime that failed has no rows. `started_bytes` and `peak_bytes` are its process's memory before it opened the bundle and at most,
    pictures included.
    `skipped` says for a budget (as in `budget.key`), or for `pictures`, why it has no figures.
    """

    runtime: str
    artifact: str | None
    precision: str
    held: str | None = None
    where: str | None = None
    processor: Processor | None = None
    missing: str | None = None
    failure: str | None = None
    load_seconds: float | None = None
    started_bytes: int | None = None
    peak_bytes: int | None = None
    checked: tuple[Verification, ...] = ()
    rows: tuple[Row, ...] = ()
    skipped: dict[str, str] = {}


class Trial(_Record, frozen=True, kw_only=True):
    """Pictures drawn one way: their time (a batch of them), and how near they come to those of the full budget from the same noise.

    `guidance_budget` is that of the weak branch where it is another. `plan` names the plan of a model that is drawn along one; its
    `budget` is then that of the whole picture's tokens. `front`: no other trial is both as fast and as near.
    """

    runtime: str
    budget: dict[str, int]
    guidance_budget: dict[str, int] | None
    steps: int
    seconds: float
    psnr_db: float
    cosine: float
    plan: str | None = None
    front: bool = False

    @property
    def where(self) -> str:
        """The plan, or the budget as in `budget.key`: what a card's figures are of."""
        return self.plan or key(self.budget)


class BundleReport(_Record, frozen=True, kw_only=True):
    """One bundle: its runtimes, and with quality, or where it is drawn along plans, its trials and the card's figures.

    `embedded_guidance`: guidance is an input of its denoiser, so that a guided picture takes one branch. `guidance` is that of its
    pictures, 1 where the model takes none (None: as the settings have it, by an older version).
    """

    name: str
    model: str
    family: str
    axis: str | None
    weights: str
    embedded_guidance: bool = False
    guidance: float | None = None
    runtimes: tuple[RuntimeReport, ...]
    trials: tuple[Trial, ...] = ()
    card: tuple[Quality, ...] = ()
    recommendation: str | None = None


class Report(_Record, frozen=True, kw_only=True):
    """The whole file. `energy` says of each source what it is or why it is absent."""

    schema_version: int
    created: str
    command: str
    machine: Machine
    peaks: Peaks
    energy: dict[str, str]
    settings: Settings
    bundles: tuple[BundleReport, ...]


def encode(report: msgspec.Struct) -> bytes:
    """A report as JSON, on one line: most of it are samples."""
    return msgspec.json.encode(report) + b"\n"


def decode(text: bytes, where: str) -> Report:
    """Read a report; raise UsageError naming the field or the schema that is wrong."""
    return read_record(text, where, Report, SCHEMA_VERSION, "benchmark report", "measure again", UsageError)
