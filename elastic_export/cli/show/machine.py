"""What `doctor` and `devices` print."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elastic_bench.trials import Trial
from elastic_export.cli.show import line, note, table
from elastic_runtime.device import Device, Entry, Peak


def device(here: Device, peaks: Mapping[str, Peak], runtimes: Mapping[str, str], todo: Iterable[str], calibrations: str) -> None:
    """What was found on this machine, and what is missing."""
    cpu, memory = here.cpu, here.memory
    caches = ", ".join(f"{name} {size / 2**10:.0f} KiB" for name, size in cpu.caches.items())
    clock = f" at {cpu.mhz:.0f} MHz" if cpu.mhz else ""
    line(f"{here.system} {here.machine}{f', {here.board}' if here.board else ''}")
    line(f"processor: {cpu.model}, {cpu.cores} cores ({cpu.usable:g} usable){clock}, {cpu.vector or 'vector unit unknown'}")
    if caches:
        line(f"caches of a core: {caches}")
    if memory.total is not None:
        whose = " (the container's limit)" if memory.limit is not None else ""
        free = f", {memory.available / 1e9:.1f} GB free" if memory.available is not None else ""
        line(f"memory: {memory.total / 1e9:.1f} GB{whose}{free}")
    for gpu in here.gpus:
        own = f", {gpu.memory_total / 1e9:.1f} GB" if gpu.memory_total else ", shares the memory" if gpu.integrated else ""
        free = f" ({gpu.memory_free / 1e9:.1f} GB free)" if gpu.memory_free else ""
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        line(f"GPU: {gpu.name}{own}{free}{capability}{f', driver {gpu.driver}' if gpu.driver else ''}")
    if here.power_mode:
        line(f"power mode: {here.power_mode}")
    for name, peak in peaks.items():
        rates = ", ".join(f"{precision} {rate / 1e12:.3g}" for precision, rate in peak.flops.items())
        line(f"peak of the {name}: {rates} TFLOP/s, {peak.bandwidth / 1e9:.0f} GB/s ({peak.origin})")
    line(f"runs bundles with: {', '.join(f'{name} {version}' for name, version in runtimes.items()) or 'nothing'}")
    line(f"calibrations: {calibrations}")
    for each in (*here.notes, *todo):
        note(each)


def trials(rows: Sequence[Trial]) -> None:
    """What ran here, a row a budget, and why the rest did not."""
    cells = []
    for row in (row for row in rows if not row.reason):
        bound = "-" if row.bound is None else f"{row.bound:.1e}"
        figures = (f"{row.max_abs:.1e}", bound, f"{row.milliseconds:.2f}", "ok" if row.passed else "FAILS")
        cells.append((row.graph, row.precision, row.where, row.budget, *figures))
    table("what ran here", ("graph", "precision", "on", "budget", "max abs", "bound", "ms a run", ""), cells)
    for way, reason in dict.fromkeys((row.way, row.reason) for row in rows if row.reason):
        note(f"not run with {way}: {reason}")


def devices(entries: Iterable[Entry], here: str | None, forecasts: Mapping[str, Mapping[str, Any]]) -> None:
    """The catalogue, this machine marked, and what a bundle's step would take at best on each."""
    ends = list(next(iter(forecasts.values()))["seconds"]) if forecasts else []
    rows = []
    for entry in entries:
        outlook = forecasts.get(entry.id)
        times = [f"{1e3 * outlook['seconds'][end]:.3f}" for end in ends] if outlook else []
        figures = ((entry.memory, "g"), (entry.bandwidth, "g"), (entry.fp16 or entry.fp32, "g"), (entry.fp8, "g"), (entry.int8, "g"))
        marked = f"{entry.id} <- this machine" if entry.id == here else entry.id
        cells = [f"{figure.value:{form}}" if figure else "-" for figure, form in figures]
        rows.append((marked, *cells, *times, *((outlook["knee"], f"{outlook['tokens']:.0f}") if outlook else ())))
    extra = [*(f"ms at {end}" for end in ends), "knee", "K*"] if forecasts else []
    table("devices", ("id", "memory GB", "GB/s", "fp16 TFLOP/s", "fp8", "int8 TOPS", *extra), rows)
    if forecasts:
        line("ms a step of one sample in fp16 by peak rates alone; up to the knee a larger budget takes no longer.")
        line("K*: tokens below which a block's weights take longer to read than its arithmetic takes, in any model.")
    if here is None:
        line("this machine is not listed; elastic-export doctor estimates its peaks")
