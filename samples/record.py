"""The record of a trained sample: one JSON file beside its weights that training begins, evaluation completes and the card quotes."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> str:
    """This machine in a few words: cores, architecture, system and the processor's name where the system tells it."""
    name = platform.processor()
    if platform.system() == "Linux":  # platform.processor() is empty on most of them
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    words = f"{os.cpu_count()}-core {platform.machine()} machine, {platform.system()}"
    return f"{words}, {name}" if name and name != platform.machine() else words


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def update(path: Path, **fields: Any) -> dict[str, Any]:
    """Set `fields` of the record at `path`, keep its others, and write it in one step; return the whole record."""
    record: dict[str, Any] = (read(path) if path.exists() else {}) | fields
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
    return record


def read(path: Path) -> dict[str, Any]:
    """The record at `path`; SystemExit with a sentence where there is none."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"cannot read the record {path} ({error.strerror}): make it with samples/evaluate.py --output {path}") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}): delete it and run samples/evaluate.py --output {path} again") from None
    if not isinstance(record, dict):
        raise SystemExit(f"{path} holds a JSON {type(record).__name__}, not a record: give another --output")
    return record
