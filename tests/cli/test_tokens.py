"""The tokens axis from the command line: caps, drop fractions, and the picture of what a router kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import Outcome
from fake_router import LENGTH, answer, described
from fakes import write_bundle, write_manifest
from PIL import Image

from elastic_export.pictures import highlighted
from elastic_runtime import FakeSession
from elastic_runtime.contract.bundle import Bundle

Run = Callable[..., Outcome]


@pytest.fixture
def routed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose graph is a fake: its router keeps the more, the nearer the picture."""
    bundle = write_bundle(tmp_path / "routed", channels=1)
    graph = msgspec.structs.replace(described().graphs["denoiser"], artifacts=bundle.manifest.graphs["denoiser"].artifacts)
    write_manifest(bundle.folder, msgspec.structs.replace(described(), graphs={"denoiser": graph}))

    def opened(bundle: Bundle, *_: Any, **__: Any) -> FakeSession:
        return FakeSession(graph, answer(lambda t, label: round(LENGTH * (0.5 - 0.3 * t / 999)), 1))

    monkeypatch.setattr("elastic_runtime.choosing.artifacts.fastest", lambda *_: None)
    monkeypatch.setattr("elastic_runtime.choosing.artifacts.open_session", opened)
    return bundle.folder


def test_the_log_of_kept_tokens_comes_back(run: Run, routed: Path, tmp_path: Path) -> None:
    done = run("generate", routed, "-o", tmp_path / "a.png", "--steps", 4, "--guidance-drop", "0.9", "--classes", "1,2", "--json", "-q")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    steps = record["steps"]
    assert record["drop_fractions"] == [0.0, 0.9]
    assert [step["kept"] for step in steps] == [[13, 13], [19, 19], [26, 26], [32, 32]]
    assert [step["guidance_kept"] for step in steps] == [[2, 2], [2, 2], [3, 3], [4, 4]]
    assert all(step["slots"] >= 13 for step in steps)
    done = run("generate", routed, "-o", tmp_path / "b.png", "--steps", 4, "-q")
    assert "4 steps at tokens=64, kept 13 to 32 tokens, seed 0" in done.out


def test_caps_and_fractions(run: Run, routed: Path, tmp_path: Path) -> None:
    done = run(
        "generate",
        routed,
        "-o",
        tmp_path / "a.png",
        "--steps",
        2,
        "--tokens",
        "10,20",
        "--guidance-tokens",
        5,
        "--drop",
        "0.3",
        "--json",
        "-q",
    )
    assert done.code == 0, done.err
    steps = json.loads(done.out)["steps"]
    assert [(step["slots"], step["guidance_slots"]) for step in steps] == [(10, 5), (20, 5)]
    assert [step["kept"] for step in steps] == [[10], [23]]


def test_a_picture_of_what_was_kept(run: Run, routed: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "a.png", tmp_path / "kept.png"
    done = run("generate", routed, "-o", out, "--steps", 25, "--classes", "0-3", "--show-tokens", kept, "-q")
    assert done.code == 0, done.err
    with Image.open(kept) as sheet:
        assert sheet.mode == "RGB"
        assert sheet.height == 28 + 10 * (128 + 4) - 4
        assert sheet.width > 4 * 128
        assert json.loads(sheet.text["elastic-export"])["steps"][0]["kept"] == [13] * 4
        pixels = np.asarray(sheet).astype(int)
    tinted = pixels[..., 0] - pixels[..., 2] > 60
    assert tinted[28:156].mean() < tinted[-128:].mean(), "more is kept toward the picture"
    refused = run("generate", routed, "-o", tmp_path / "b.png", "--steps", 2, "--show-tokens", kept, "-q")
    assert (refused.code, "kept.png exists: choose another --show-tokens, or replace it with --overwrite" in refused.err) == (2, True)


def test_kept_cells_are_tinted_and_the_others_as_they_were() -> None:
    picture = Image.fromarray(np.full((4, 4), 100, np.uint8))
    shown = np.asarray(highlighted(picture, np.array([True, False, False, True])))
    assert shown.shape == (4, 4, 3)
    assert (shown[:2, 2:] == 100).all()
    assert (shown[2:, :2] == 100).all()
    assert (shown[:2, :2] == shown[2:, 2:]).all()
    assert shown[0, 0].tolist() == [177, 120, 50]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "65"], "tokens 65 is not available: this model offers 4-64; the nearest is 64"),
        (["--tokens", "0"], "the nearest is 4"),
        (["--guidance-tokens", "3"], "tokens 3 is not available"),
        (["--tokens", "10,20"], "2 budgets were given for 3 steps"),
        (["--drop", "1"], "drop_fraction is the share of the kept tokens to drop, 0 to below 1, got 1.0"),
        (["--guidance-drop", "-0.5"], "guidance_drop_fraction is the share"),
        (["--drop", "nan"], "got nan"),
        (["--show-tokens", "kept.jpg"], "pictures are written as .png"),
        (["--latents", "64"], "this model has no axis 'latents'; it has tokens"),
        (["--steps", "1001"], "at most 1000 steps, one a timestep, got 1001"),
    ],
)
def test_wishes_that_cannot_be(run: Run, routed: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = run("generate", routed, "-o", tmp_path / "a.png", "--steps", "3", "-q", *options)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "a.png").exists()


def test_two_pictures_have_two_names(run: Run, routed: Path, tmp_path: Path) -> None:
    done = run("generate", routed, "-o", tmp_path / "a.png", "--show-tokens", tmp_path / "a.png", "-q")
    assert (done.code, "give two names" in done.err) == (2, True)


def test_a_bundle_without_a_router_shows_no_tokens(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "plain", channels=1)
    monkeypatch.setattr("elastic_runtime.choosing.artifacts.fastest", lambda *_: None)
    monkeypatch.setattr(
        "elastic_runtime.choosing.artifacts.open_session",
        lambda *_, **__: FakeSession(bundle.manifest.graphs["denoiser"], lambda feeds: {}),
    )
    for options, message in ((["--show-tokens", tmp_path / "b.png"], "is for models with a router"), (["--drop", "0.3"], "has no router")):
        done = run("generate", bundle.folder, "-o", tmp_path / "a.png", "-q", *options)
        assert (done.code, message in done.err) == (2, True), done.err
