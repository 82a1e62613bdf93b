"""`plan`, as users type it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models are described in torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("huggingface_hub", reason="names on the hub need its client")

import fake_hub
import folders


def test_a_name_on_the_hub_takes_json_alone(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folders.write(tmp_path / "flux", folders.flux(), text=True)
    files = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    with fake_hub.serving() as server:
        server.add("org/tiny", files)
        fake_hub.direct(monkeypatch, server, str(tmp_path / "cache"))
        outcome = run("plan", "org/tiny", "--device", "jetson-agx-orin-64", "--precision", "fp16,int4w", "--steps", "4", "--json")
        assert outcome.code == 0, outcome.err
        assert {Path(name).suffix for name, _ in server.asked} == {".json"}
        assert not [name for name, _ in server.asked if name.startswith("tokenizer")]
    document = json.loads(outcome.out)
    assert document["schema"].startswith("elastic-export/plan/")
    forecast = document["forecast"]
    assert (forecast["model"], forecast["device"]) == ("tiny", "jetson-agx-orin-64")
    assert [row["precision"] for row in forecast["memory"]] == ["fp16", "int4w"]
    assert {way["name"]: way["steps"] for way in forecast["ways"]}["full"] == 4
    assert set(forecast["parameters"]) == {"denoiser", "text_encoder", "text_encoder_2", "decoder"}


def test_tables_for_people(run: Callable[..., Any]) -> None:
    outcome = run("plan", "elit-mnist", "--device", "apple-m2", "--precision", "fp32")
    assert outcome.code == 0, outcome.err
    for word in ("elit-mnist (elit-sit), 32 x 32", "two branches of guidance", "apple-m2: Apple M2, 24 GB", "at once", "latents=256"):
        assert word in outcome.out
    wrong = run("plan", "elit-mnist", "--device", "m2")
    assert wrong.code == 2
    assert "apple-m2" in wrong.err
