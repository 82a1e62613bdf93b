"""Which wheels the runtime would be installed from on machines that are not here, as the package index has them today.

    python samples/platforms.py [--extra ort]        (or: make platforms)

One row a platform: the versions that pip resolves for it, without building anything. Exit code 1: one that cannot be installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib
from rich.console import Console
from rich.table import Table

SHOWN = ("numpy", "msgspec", "pillow", "onnxruntime", "openvino", "coremltools", "tomli")
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass(frozen=True)
class Platform:
    """A device's system, its Python, what pip calls its wheels, and the extra that it draws with."""

    name: str
    python: str
    tags: tuple[str, ...]
    extra: str = "ort"


def glibc(machine: str, newest: int) -> tuple[str, ...]:
    """Tags of wheels that run on a Linux with glibc 2.`newest`."""
    return (*(f"manylinux_2_{minor}_{machine}" for minor in range(newest, 16, -1)), f"manylinux2014_{machine}")


PLATFORMS = (
    Platform("Jetson, JetPack 6 (Linux aarch64)", "3.10", glibc("aarch64", 35)),
    Platform("Jetson, JetPack 7 (Linux aarch64)", "3.12", glibc("aarch64", 39)),
    Platform("Raspberry Pi OS 12 (Linux aarch64)", "3.11", glibc("aarch64", 36)),
    Platform("Mac with Apple silicon", "3.12", tuple(f"macosx_{major}_0_arm64" for major in range(14, 10, -1)), "coreml"),
    Platform("Windows x86-64", "3.12", ("win_amd64",)),
    Platform("Linux x86-64", "3.13", glibc("x86_64", 39)),
)


def requirements(extra: str, python: str) -> list[str]:
    """What the project asks for on a Python, with an extra; markers on the Python's version are resolved here, for pip resolves those of
    the machine that it runs on.
    """
    from packaging.requirements import Requirement

    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"][extra])]
    for requirement in wanted:
        if requirement.marker and requirement.marker.evaluate({"python_version": python}):
            requirement.marker = None
    return [str(requirement) for requirement in wanted if requirement.marker is None]


def versions(platform: Platform) -> dict[str, str]:
    """Name -> version of every package that would be installed; raises RuntimeError with pip's words where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run", "--ignore-installed",
            "--only-binary=:all:", "--implementation", "cp", "--python-version", platform.python, "--target", folder,
            "--report", str(report),
            *(word for tag in platform.tags for word in ("--platform", tag)), *requirements(platform.extra, platform.python),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-300:]))
        installed = json.loads(report.read_text())["install"]
    return {row["metadata"]["name"].lower(): row["metadata"]["version"] for row in installed}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", help="for every platform, in place of its own")
    options = parser.parse_args(arguments)
    table = Table("platform", "Python", "extra", *SHOWN)
    failures = []
    for platform in PLATFORMS:
        chosen = Platform(platform.name, platform.python, platform.tags, options.extra or platform.extra)
        try:
            resolved = versions(chosen)
        except RuntimeError as error:
            failures.append(f"{chosen.name}: {error}")
            continue
        table.add_row(chosen.name, chosen.python, chosen.extra, *(resolved.get(name, "") for name in SHOWN))
    Console(width=140).print(table)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
