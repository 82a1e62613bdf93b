"""The record of a trained sample: one JSON file beside its weights that training begins, evaluation completes and the card quotes."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> str:
    """This machine in a few words: cores, architecture, system, and the processor's name where the system tells it."""
    name = platform.processor()
    if platform.system() == "Linux":  # where platform.processor() is mostly empty
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    words = f"{os.cpu_count()}-core {platform.machine()} machine, {platform.system()}"
    return f"{words}, {name}" if name and name != platform.machine() else words


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    """The record at `path`; SystemExit with a sentence where there is none."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"cannot read {path} ({error.strerror}): make it with samples/evaluate.py BUNDLE --output {path}") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}): delete it, or give another path") from None
    if not isinstance(record, dict):
        raise SystemExit(f"{path} holds a JSON {type(record).__name__}, not a record: delete it, or give another path")
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one step, so that a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
