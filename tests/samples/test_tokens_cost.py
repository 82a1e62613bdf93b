"""`samples/tokens_cost.py` on a router made without torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_router import LENGTH, answer, described, graph

import tokens_cost
from elastic_runtime import Bundle, FakeSession


def opened(monkeypatch: pytest.MonkeyPatch, function: Any) -> FakeSession:
    fake = FakeSession(graph(), function)
    monkeypatch.setattr(tokens_cost.Bundle, "open", lambda folder: Bundle(folder, described()))
    monkeypatch.setattr(tokens_cost, "open_session", lambda *_, **__: fake)
    return fake


def test_both_ways_draw_and_the_counts_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = opened(monkeypatch, answer(lambda t, label: round(LENGTH * (0.5 - 0.3 * t / 999)), 1))
    tokens_cost.main(tokens_cost.parsed(["bundle", "--steps", "6", "--rounds", "2", "--guidance", "1.5", "--guidance-drop", "0.5"]))
    output = capsys.readouterr().out
    assert "1 at once, 6 steps, two branches" in output
    assert f"all {LENGTH} slots" in output
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    assert [row[2].strip() for row in rows] == ["13.0", "17.0", "20.0", "24.0", "28.0", "32.0"]
    assert [int(row[5]) for row in rows] == [7, 9, 10, 12, 14, 16]
    assert sum(call["slots"] == (LENGTH,) for call in fake.calls) == 3 * 6  # all slots, both branches in a run, with the warm-up round


def test_no_time_is_given_for_pictures_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(feeds: Any) -> dict[str, np.ndarray]:
        whole = answer(lambda t, label: 20, 1)(feeds)
        return whole | {"prediction": whole["prediction"] + 0.3 * (len(feeds["slots"]) == LENGTH)}

    opened(monkeypatch, broken)
    with pytest.raises(SystemExit, match="class 0: the pictures differ by"):
        tokens_cost.main(tokens_cost.parsed([str(Path("bundle")), "--steps", "4"]))
