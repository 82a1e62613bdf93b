"""The record of a trained sample: one JSON file beside its weights that training begins, evaluation completes and the card quotes."""

import json
from pathlib import Path
from typing import Any

from elastic_bench.machine import machine as here
from elastic_bench.machine import versions

__all__ = ["evaluation", "machine", "read", "versions", "write"]


def machine() -> str:
    """This machine in a few words."""
    return str(here())


def read(path: Path) -> dict[str, Any]:
    """The record at `path`; SystemExit with a sentence where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {path} ({error.strerror}): make it with samples/evaluate.py BUNDLE --output {path}") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}): delete it, or give another path") from None
    if not isinstance(record, dict):
        raise SystemExit(f"{path} holds a JSON {type(record).__name__}, not a record: delete it, or give another path")
    return record


def evaluation(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of a record; SystemExit where it has none yet."""
    if not record.get("evaluation"):
        raise SystemExit("the record holds no figures yet: make them with samples/evaluate.py BUNDLE --output RECORD.json")
    values: dict[str, Any] = record["evaluation"]
    return values


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one step, so that a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
