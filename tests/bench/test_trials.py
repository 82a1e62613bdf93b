"""What a device check sends back names nobody's folders."""

import sys
from pathlib import Path

import pytest
from fakes import write_bundle

from elastic_bench.trials import trials
from elastic_runtime import FakeSession
from elastic_runtime.sessions.backend import Backend, Way


def test_reasons_name_no_folder_of_whoever_ran_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/somebody")
    monkeypatch.setattr(sys, "prefix", "/data/somebody/.venv")
    bundle = write_bundle(tmp_path / "b")
    reason = f"{bundle.folder}/x, /data/somebody/.venv/lib/t.so, /data/somebody/y, /data/somebody-else/z, /usr/lib/c.so"
    record = Backend("none", ("onnx",), lambda artifact: reason, FakeSession, {"none": Way("cpu")})
    monkeypatch.setattr("elastic_bench.trials.backends", lambda: iter([record]))
    (trial,) = trials(bundle)
    assert trial.reason == "BUNDLE/x, PYTHON/lib/t.so, HOME/y, /data/somebody-else/z, /usr/lib/c.so"
