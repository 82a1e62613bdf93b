"""Export and draw models of real size in every precision, and fill the table of docs/real-size.md.

    python samples/real_sizes.py elit-xl sd3-medium flux-dev --folder build/real --page docs/real-size.md

Weights are random, of the published shapes (`random_folder.py`); FOLDER needs 80 GB for all three. A row is kept in FOLDER/rows.json as
soon as it is there, so that a run goes on where it was stopped; delete the file to begin anew. Nothing else should run meanwhile. Every
command is a process of its own, whose largest memory the system tells (Linux).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from card import filled
from elastic_runtime import Budget, Bundle
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.reference import compare
from elastic_runtime.files.atomic import save
from precisions import backend
from record import machine, versions

HERE = Path(__file__).parent
HEAD = (
    "| model | precision | on disk | export | peak | run peak (steps) | a step | over fp32 | step dB | picture dB |",
    "|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
)


@dataclass(frozen=True)
class Subject:
    """A model: how it is exported and drawn, after `elastic-export onnx SOURCE` and `real_size.py BUNDLE`."""

    title: str
    precisions: tuple[str, ...]
    export: tuple[str, ...]
    draw: tuple[str, ...]
    zoo: str | None = None  # whose checkpoint the source is, where it is no folder


SUBJECTS = {
    "elit-xl": Subject(
        "ELIT-SiT-XL/2, 256 px (0.7 billion)", ("fp32", "fp16", "bf16", "int8", "int8w", "int4w"),
        ("--batch", "1-2", "--verify", "ends"), ("--budgets", "16,64,128,256", "--steps", "5"), zoo="elit-sit-xl-256",
    ),
    "sd3-medium": Subject(
        "SD3-medium's shape with decoder, 512 px (2.1 billion)", ("fp32", "fp16", "int8", "int8w", "int4w"),
        ("--components", "transformer,vae", "--size", "512", "--batch", "1-2", "--verify", "ends"), ("--plan", "7x", "--side", "512"),
    ),
    "flux-dev": Subject(
        "FLUX.1-dev's shape with decoder, 512 px (11.9 billion)", ("int8", "int4w"),
        ("--components", "transformer,vae", "--size", "512", "--batch", "1", "--verify", "ends"), ("--plan", "7x", "--side", "512"),
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=SUBJECTS)
    parser.add_argument("--folder", type=Path, required=True, help="for models, bundles and rows")
    parser.add_argument("--precisions", type=lambda given: given.split(","), help="of these alone: fp32,int8 (default: all of the models')")
    parser.add_argument("--page", type=Path, help="Markdown page to fill: docs/real-size.md")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    kept = given.folder / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in given.models:
        for precision in given.precisions or SUBJECTS[name].precisions:
            if (key := f"{name} {precision}") not in rows:
                rows[key] = row(name, SUBJECTS[name], precision, given.folder)
                save(kept, json.dumps(rows, indent=1).encode())
                print(key, rows[key], flush=True)
    written = section(rows)
    if given.page:
        save(given.page, filled(given.page.read_text(encoding="utf-8"), "real size", written, str(given.page)).encode())
    else:
        print(written)


def row(name: str, subject: Subject, precision: str, folder: Path) -> dict[str, Any]:
    """What exporting and drawing took."""
    source = folder / (f"{name}.safetensors" if subject.zoo else name)
    if not source.exists():
        part = source.with_name(f"part-{source.name}")  # what a run left that was stopped is made anew
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        timed([sys.executable, str(HERE / "random_folder.py"), name, str(part)])
        part.rename(source)
    model = [subject.zoo, "--checkpoint", str(source)] if subject.zoo else [str(source)]
    bundle = folder / f"{name}-{precision}"
    command = ["elastic-export", "onnx", *model, "-o", str(bundle), "--precision", precision, *subject.export]
    _, seconds, peak = timed([str(Path(sys.executable).with_name(command[0])), *command[1:], "--overwrite", "-q"])
    drawn = folder / f"{name}-{precision}.npz"
    draw = [sys.executable, str(HERE / "real_size.py"), str(bundle), *subject.draw, "--backend", backend(precision)]
    output, _, run_peak = timed([*draw, "--precision", precision, "-o", str(drawn)])
    run = json.loads(output.splitlines()[-1])
    manifest = Bundle.open(bundle).manifest
    (artifact,) = (each for each in manifest.graphs["denoiser"].artifacts if isinstance(each, OnnxArtifact))
    return {
        "bytes": sum(file.bytes for graph in manifest.graphs.values() for each in graph.artifacts for file in each.files),
        "export_s": seconds,
        "export_peak": peak,
        "run_peak": run_peak,
        "steps_peak": 1e9 * run["steps_gb"],
        "steps_ms": [run[key] for key in run if "=" in key] or [1e3 * each for each in run["steps_s"]],
        "whole_s": None if any("=" in key for key in run) else run["total_s"],
        "step_db": min((each.psnr_db for each in artifact.verified), default=None),
        "picture_db": nearest(drawn, folder / f"{name}-fp32.npz") if precision != "fp32" else None,
        "machine": machine(),
        "versions": versions("onnxruntime", "openvino", "torch"),
    }


def timed(command: Sequence[str]) -> tuple[str, float, int]:
    """What a command printed, its seconds, and the most bytes that it held (no less than this process does); SystemExit where it fails."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"this failed: {' '.join(command)}")
    return output, time.monotonic() - begun, usage.ru_maxrss * 1024


def nearest(drawn: Path, exact: Path) -> float | None:
    """Decibels of the worst picture against float32's of the same noise; None where float32 was not drawn."""
    if not exact.exists():
        return None
    ours, wanted = np.load(drawn), np.load(exact)
    return min(compare(ours[key], wanted[key], Budget(), 0.0, key).psnr_db for key in wanted.files)


def section(rows: dict[str, dict[str, Any]]) -> str:
    """The table, and how it was made."""
    lines = list(HEAD)
    for name, subject in SUBJECTS.items():
        title = subject.title
        for precision in subject.precisions:
            if (cost := rows.get(f"{name} {precision}")) is None:
                continue
            exact = rows.get(f"{name} fp32")
            cells = [title, precision, _gb(cost["bytes"]), f"{cost['export_s']:.0f} s", _gb(cost["export_peak"])]
            cells += [f"{_gb(cost['run_peak'])} ({cost['steps_peak'] / 1e9:.2f})"]
            cells += [_steps(cost), "-" if exact is None else f"{_pace(exact) / _pace(cost):.2f}"]
            cells += ["-" if cost[each] is None else f"{cost[each]:.1f}" for each in ("step_db", "picture_db")]
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    made = " ".join(name for name in SUBJECTS if any(key.startswith(f"{name} ") for key in rows))
    places: dict[str, list[str]] = {}
    for key, cost in rows.items():
        libraries = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in sorted(cost["versions"].items()))
        places.setdefault(f"on a {cost['machine']}; {libraries}", []).append(key)
    where = [place + (f" ({', '.join(keys)})" if len(places) > 1 else "") for place, keys in places.items()]
    lines += ["", f"`python samples/real_sizes.py {made} --folder build/real` {'; and '.join(where)}."]
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _steps(cost: dict[str, Any]) -> str:
    steps = cost["steps_ms"]
    if cost["whole_s"] is None:
        return f"{', '.join(f'{each:.0f}' for each in steps)} ms"
    return f"{min(steps) / 1e3:.1f} to {max(steps) / 1e3:.1f} s; {cost['whole_s']:.0f} s in all"


def _pace(cost: dict[str, Any]) -> float:
    return float(sum(cost["steps_ms"]))


if __name__ == "__main__":
    main()
