"""What the README and the docs tell people to type exists: Python compiles, commands and their options are real."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if path.exists()]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[tuple[str, str]]:
    return [
        (document.name, body)
        for document in DOCUMENTS
        for language, body in FENCE.findall(document.read_text(encoding="utf-8"))
        if language in languages
    ]


def commands() -> list[list[str]]:
    """Every `elastic-export ...` line of a shell block, with continued lines joined."""
    found = []
    for _, body in blocks("", "sh", "bash", "console", "shell"):
        for line in body.replace("\\\n", " ").splitlines():
            if match := re.match(r"\s*(?:\$ )?(?:optimum-cli export elastic|(?:\S*/)?elastic-export)\s(.*)", line):
                found.append(shlex.split(match[1], comments=True))
    return found


@cache
def help_of(command: str) -> str:
    program = "from elastic_export.cli import main; import sys; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", program, *([command] if command else []), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=None)
    assert done.returncode == 0, f"there is no command {command!r}: {done.stderr}"
    return done.stdout


def readme() -> None:
    if not DOCUMENTS:
        pytest.skip("the README is not part of an installed wheel")


def test_python_blocks_compile_and_name_what_exists() -> None:
    readme()
    import elastic_runtime

    for name, body in blocks("python", "py"):
        tree = ast.parse(body, filename=name)
        aliases = {
            alias.asname
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "elastic_runtime"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                assert node.attr in elastic_runtime.__all__, f"{name}: {ast.unparse(node)} does not exist"


def test_commands_exist_with_their_options() -> None:
    readme()
    for words in commands():
        command = words[0] if words and not words[0].startswith("-") else ""
        told = help_of(command)
        for option in (word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", told), f"{command} has no option {option}"


def test_make_targets_exist() -> None:
    readme()
    if not (ROOT / "Makefile").exists():
        pytest.skip("the Makefile is not part of an installed wheel")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match for document in DOCUMENTS for match in re.findall(r"`?\bmake ([a-z]+)`", document.read_text(encoding="utf-8"))}
    assert named <= targets


def test_files_that_are_linked_exist() -> None:
    readme()
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
