"""The whole benchmark: every bundle, by every runtime that was asked for."""

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elastic_bench.drawing import Album
from elastic_bench.energy import counters
from elastic_bench.machine import machine
from elastic_bench.measure import OnStage, measure, points, suited
from elastic_bench.process import Process
from elastic_bench.records import SCHEMA_VERSION, Report, Settings
from elastic_bench.runtimes import Runtime, runtimes, ways
from elastic_export.bench.peaks import peaks
from elastic_export.bench.peers import PEERS, USUAL, TorchRuntime
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import BundleError, MissingError, UsageError

NAMES = (*ways(), *PEERS)
DEFAULT = (*ways(), *USUAL)


def bench(
    folders: Sequence[Path],
    names: Sequence[str],
    values: Sequence[int] | None,
    settings: Settings,
    command: str,
    checkpoint: Path | None = None,
    on_stage: OnStage = lambda what: None,
    start: Any = Process,
) -> tuple[Report, list[Album]]:
    """Measure the bundles in `folders`; return the report, and each bundle's pictures.

    Raises: UsageError and its kinds, and MissingError where no runtime can run, before anything is measured.
    """
    settings.check()
    if unknown := [name for name in names if name not in NAMES]:
        raise UsageError(f"there is no runtime {unknown[0]!r}; there are {', '.join(NAMES)}")
    bundles = [Bundle.open(folder) for folder in folders]
    if twice := [name for name, count in Counter(bundle.name for bundle in bundles).items() if count > 1]:
        raise UsageError(
            f"two bundles have the same name, {twice[0]}, by which the report knows them: rename a folder, or measure one at a time"
        )
    for bundle in bundles:
        if "denoiser" not in bundle.manifest.graphs:
            raise BundleError(
                f"{bundle.folder} has no graph 'denoiser', it has {', '.join(bundle.manifest.graphs)}: there is nothing to time"
            )
        suited(settings, bundle)
    wanted = [(bundle, points(bundle, values), _runtimes(bundle, names, checkpoint)) for bundle in bundles]
    obstacles = [(each.name, each.obstacle(bundle)) for bundle, _, asked in wanted for each in asked]
    if all(obstacle for _, obstacle in obstacles):
        raise nothing(f"{name}: {obstacle}" for name, obstacle in obstacles)
    on_stage("measuring the processor's peaks")
    most = peaks(settings.threads)
    sources, absent = counters()
    measured = [measure(bundle, asked, budgets, settings, start, on_stage) for bundle, budgets, asked in wanted]
    return Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=machine(),
        peaks=most,
        energy=dict.fromkeys(sources, "counted") | {name: f"absent: {why}" for name, why in absent.items()},
        settings=settings,
        bundles=tuple(report for report, _ in measured),
    ), [album for _, album in measured]


def nothing(reasons: Iterable[str]) -> MissingError:
    """The error where nothing could be measured."""
    return MissingError(f"nothing here can run what was asked for. {' '.join(dict.fromkeys(reasons))}")


def _runtimes(bundle: Bundle, names: Sequence[str], checkpoint: Path | None) -> list[Runtime]:
    entries: list[Runtime] = []
    for name in dict.fromkeys(names):
        entries += [TorchRuntime(name, checkpoint)] if name in PEERS else runtimes(name, bundle)
    return entries
