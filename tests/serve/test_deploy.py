"""The image: what it is built from. Docker is not asked."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_image_holds_what_is_installed_and_no_checkout() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    dockerfile = ROOT / "samples" / "deploy" / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("the samples are not part of an installed wheel")
    assert "COPY . " not in dockerfile.read_text(encoding="utf-8"), "a layer of its own, though it be removed later"
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {package.partition("/")[0] for package in project["tool"]["hatch"]["build"]["packages"]}
    assert lines[1] == "*"
    assert kept == packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
