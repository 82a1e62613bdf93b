"""What platforms.py asks the package index for; the index itself is not asked here."""

import pytest

import platforms

pytest.importorskip("packaging", reason="it comes with pytest")


@pytest.mark.parametrize(("python", "asked"), [("3.10", True), ("3.12", False)])
def test_markers_are_those_of_the_platforms_python(python: str, asked: bool) -> None:
    wanted = platforms.requirements("ort", python)
    assert any(name.startswith("tomli") for name in wanted) is asked
    assert any(name.startswith("onnxruntime") for name in wanted)
    assert not any(";" in name for name in wanted)


def test_a_platform_that_cannot_be_served_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def versions(platform: platforms.Platform) -> dict[str, str]:
        if "Jetson" in platform.name:
            raise RuntimeError("ERROR: No matching distribution found for onnxruntime")
        return {"numpy": "2.0.0"}

    monkeypatch.setattr(platforms, "versions", versions)
    assert platforms.main([]) == 1
    out, err = capsys.readouterr()
    assert "Windows" in out
    assert err.count("No matching distribution") == 2


def test_older_wheels_run_on_a_newer_system() -> None:
    assert platforms.glibc("aarch64", 19) == (
        "manylinux_2_19_aarch64",
        "manylinux_2_18_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    )
