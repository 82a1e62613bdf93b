"""The cache of built engines: the same build again, another's engine, and what others may have put there."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from elastic_runtime import Bundle, Span
from elastic_targets.capture import BundleGraph
from elastic_targets.trt import cache as engines

Tiny = Callable[..., Bundle]


def add_one(tiny: Tiny) -> Bundle:
    from onnx import helper

    return tiny([helper.make_node("Add", ["sample", "sample"], ["prediction"])])


def test_the_same_build_again_comes_from_the_cache_and_another_does_not(
    room: ModuleType, tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, options = add_one(tiny), room.TrtOptions(sms=(86,))
    first = room.lower(BundleGraph(bundle, "denoiser"), options, tmp_path / "one")
    # From here on nothing can build: what still works did not need to.
    monkeypatch.setattr(sys.modules["elastic_targets.trt.lower"], "build", lambda *_: pytest.fail("it was built again"))
    stages: list[str] = []
    again = room.lower(BundleGraph(bundle, "denoiser"), options, tmp_path / "two", lambda stage, *_: stages.append(stage))
    assert again == first
    assert stages == ["denoiser sm86 from the cache"]
    for change in ({"sms": (89,)}, {"batch": Span(1, 2)}, {"weight_streaming": True}):
        with pytest.raises(pytest.fail.Exception, match="built again"):
            room.lower(BundleGraph(bundle, "denoiser"), room.TrtOptions(**{"sms": (86,)} | change), tmp_path / "three")
    (kept,) = [path for path in cache.iterdir() if path.is_dir()]
    (kept / "engine").write_bytes(b"damaged")
    with pytest.raises(pytest.fail.Exception, match="built again"):
        room.lower(BundleGraph(bundle, "denoiser"), options, tmp_path / "four")


def test_an_engine_under_another_builds_name_is_not_taken(
    room: ModuleType, tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = add_one(tiny)
    for sm in (86, 89):
        room.lower(BundleGraph(bundle, "denoiser"), room.TrtOptions(sms=(sm,)), tmp_path / str(sm))
    one, two = (path for path in cache.iterdir() if path.is_dir())
    for name in ("engine", "facts.json"):
        (one / name).write_bytes((two / name).read_bytes())
    monkeypatch.setattr(sys.modules["elastic_targets.trt.lower"], "build", lambda *_: pytest.fail("it was built again"))
    built = 0
    for sm in (86, 89):
        try:
            room.lower(BundleGraph(bundle, "denoiser"), room.TrtOptions(sms=(sm,)), tmp_path / f"{sm}-again")
        except pytest.fail.Exception:
            built += 1
    assert built == 1


def test_an_engine_that_others_may_write_is_not_taken(
    room: ModuleType, tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, options = add_one(tiny), room.TrtOptions(sms=(86,))
    room.lower(BundleGraph(bundle, "denoiser"), options, tmp_path / "one")
    next(cache.rglob("engine")).chmod(0o666)
    monkeypatch.setattr(sys.modules["elastic_targets.trt.lower"], "build", lambda *_: pytest.fail("it was built again"))
    with pytest.raises(pytest.fail.Exception, match="built again"):
        room.lower(BundleGraph(bundle, "denoiser"), options, tmp_path / "two")


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    room: ModuleType, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert room.lower(BundleGraph(add_one(tiny), "denoiser"), room.TrtOptions(sms=(86,)), tmp_path / "out")
    assert "the engine was not cached" in caplog.text


def test_what_was_used_longest_ago_goes_first_kernels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MOST_BYTES", 250)
    for age, name in enumerate(("kernels-new", "engine-new", "engine-old", "kernels-old")):
        path = tmp_path / name
        if name.startswith("engine"):
            path.mkdir()
            (path / "engine").write_bytes(b"x" * 100)
        else:
            path.write_bytes(b"x" * 100)
        os.utime(path, (10_000 - age, 10_000 - age))
    (tmp_path / "rates.json").write_bytes(b"{}")
    engines._clear(tmp_path, keep="")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine-new", "kernels-new", "rates.json"]
