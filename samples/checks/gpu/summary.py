"""What a check came to, in a few lines: python summary.py TABLE..."""

import json
import sys
from typing import Any

from rows import RESULTS

Rows = list[dict[str, Any]]
ABOUT = ("bundle", "graph", "precision")
TORCH = ("model", "dtype", "way", "batch")


def rows(name: str) -> Rows:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def groups(table: Rows, names: tuple[str, ...]) -> list[tuple[tuple[Any, ...], Rows]]:
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in table)
    return [(group, [row for row in table if tuple(row[name] for name in names) == group]) for group in keys]


def sessions(table: Rows) -> None:
    for about, here in groups(table, ABOUT):
        words = []
        for check in ("plain", "captured", "replayed", "tf32"):
            if proven := [row for row in here if row["check"] == check]:
                worst, passed = max(row["max_abs"] for row in proven), all(row["passed"] for row in proven)
                words.append(f"{check} {worst:.1e} of {proven[0]['limit']:.0e} {'ok' if passed else 'FAILS'}")
        print(" ".join(about), "|", "; ".join(words))
        for row in here:
            if row.get("failed") or row.get("said"):
                print("   ", (row.get("failed") or row["said"][0])[:300])
            if row["check"] == "graph against plain":
                print(f"    batch {row['batch']}: a graph differs from a plain run by {row['max_abs']:.1e}")
        for (batch,), timings in groups([row for row in here if "ms" in row], ("batch",)):
            cells = []
            for (budget,), pair in groups(timings, ("budget",)):
                ms = {row["check"]: row["ms"] for row in pair}
                cells.append(f"{budget.split('=')[-1]}: {ms.get('time, plain', 0):.2f}/{ms.get('time', 0):.2f}")
            print(f"    batch {batch:<3} ms plain/graph  ", "  ".join(cells))


def originals(table: Rows) -> None:
    for about, here in groups(table, TORCH):
        cells = []
        for (budget,), pair in groups([row for row in here if "ms" in row], ("budget",)):
            ms = {row["graph"]: row["ms"] for row in pair}
            cells.append(f"{budget.split('=')[-1]}: {ms.get(False, 0):.2f}/{ms.get(True, 0):.2f}")
        print(*about, "| ms plain/graph |", "  ".join(cells))


def plain(table: Rows) -> None:
    for row in table:
        print("  ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items())[:400])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        kind = name.split("-")[0]
        {"sessions": sessions, "originals": originals}.get(kind, plain)(rows(name))
