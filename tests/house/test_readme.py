"""What the README, the docs and the cards tell people to type exists: Python compiles, names, commands and options are real."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "elastic_export" / "pretrained"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")), *sorted(CARDS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}.*$", re.MULTILINE)


def blocks(*languages: str) -> list[tuple[str, str]]:
    return [
        (document.name, body)
        for document in DOCUMENTS
        for language, body in FENCE.findall(document.read_text(encoding="utf-8"))
        if language in languages
    ]


def indented() -> list[tuple[str, str]]:
    """The lines that are indented by four spaces, which Markdown shows as code, outside of fences."""
    texts = [(document.name, FENCE.sub("", document.read_text(encoding="utf-8"))) for document in DOCUMENTS]
    return [(name, "\n".join(INDENTED.findall(text))) for name, text in texts]


def shell_lines() -> list[tuple[str, str]]:
    """Every line of a shell block, fenced or indented, with continued lines joined."""
    bodies = blocks("", "sh", "bash", "console", "shell") + indented()
    return [(name, line.strip()) for name, body in bodies for line in body.replace("\\\n", " ").splitlines()]


def commands() -> list[list[str]]:
    """The words of every `elastic-export ...` line."""
    pattern = re.compile(r"(?:\$ )?(?:optimum-cli export elastic|(?:\S*/)?elastic-export)\s(.*)")
    matches = [pattern.match(line) for _, line in shell_lines()]
    return [shlex.split(match[1], comments=True) for match in matches if match]


@cache
def help_of(command: str) -> str:
    program = "from elastic_export.cli import main; import sys; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", program, *([command] if command else []), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=None)
    assert done.returncode == 0, f"there is no command {command!r}: {done.stderr}"
    return done.stdout


def readme() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("the README is not part of an installed wheel")


def test_python_blocks_compile_and_import_what_exists() -> None:
    readme()
    for name, body in blocks("python", "py"):
        for node in ast.walk(ast.parse(body, filename=name)):
            # The hall's modules need torch; the runtime's can be looked at anywhere.
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "elastic_runtime":
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], f"{name}: {ast.unparse(node)}"


@pytest.mark.parametrize("package", ["elastic_runtime", "elastic_export"])
def test_names_of_the_api_exist(package: str) -> None:
    readme()
    offered = getattr(importlib.import_module(package), "__all__", ())
    for name, body in blocks("python", "py"):
        tree = ast.parse(body, filename=name)
        imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        aliases = {alias.asname or alias.name for alias in imports if alias.name == package}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                assert node.attr in offered, f"{name}: {ast.unparse(node)} does not exist"


def test_calls_of_the_pipeline_take_what_they_are_given() -> None:
    readme()
    import elastic_runtime as er

    takes = {"pipe": er.ElasticPipeline.__call__, "Request": er.Request}
    for name, body in blocks("python", "py"):
        for node in ast.walk(ast.parse(body, filename=name)):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in takes:
                known = inspect.signature(takes[called]).parameters
                assert {word.arg for word in node.keywords if word.arg} <= set(known), f"{name}: {ast.unparse(node)}"


def test_commands_exist_with_their_options() -> None:
    readme()
    for words in commands():
        command = words[0] if words and not words[0].startswith("-") else ""
        help_text = help_of(command)
        for option in (word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text), f"{command} has no option {option}"


def test_indented_commands_are_seen() -> None:
    readme()
    fenced = [line for _, body in blocks("", "sh", "bash", "console", "shell") for line in body.splitlines()]
    lines = [line for name, line in shell_lines() if name == "budgets.md" and line.startswith("elastic-export generate")]
    assert lines
    assert set(lines).isdisjoint(fenced)


def test_scripts_exist_with_their_options() -> None:
    readme()
    if not (ROOT / "samples").exists():
        pytest.skip("the samples are not part of an installed wheel")
    shared = "".join((ROOT / "samples" / name).read_text(encoding="utf-8") for name in ("training.py", "grading.py"))
    seen = 0
    for name, line in shell_lines():
        if match := re.match(r"(?:\w+=\S+ )*python (samples/\S+\.py)(.*)", line):
            assert (ROOT / match[1]).exists(), f"{name}: there is no {match[1]}"
            text = (ROOT / match[1]).read_text(encoding="utf-8") + shared
            for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", match[2].partition("#")[0]):
                assert f'"{option}"' in text, f"{name}: {match[1]} has no option {option}"
            seen += 1
    assert seen > 5


def test_make_targets_exist() -> None:
    readme()
    if not (ROOT / "Makefile").exists():
        pytest.skip("the Makefile is not part of an installed wheel")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match for document in DOCUMENTS for match in re.findall(r"`?\bmake ([a-z]+)`", document.read_text(encoding="utf-8"))}
    assert named <= targets


def anchors(page: Path) -> set[str]:
    """What a link may name after #: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_and_headings_that_are_linked_exist() -> None:
    readme()
    for document in DOCUMENTS:
        for link, heading in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?", document.read_text(encoding="utf-8")):
            page = document.parent / link if link else document
            assert page.exists(), f"{document.name} links to {link}"
            assert not heading or heading in anchors(page), f"{document.name} links to {link}#{heading}"


def test_paths_that_are_named_exist() -> None:
    readme()
    rooms = "tests|samples|docs|runtime|targets|elastic_export"
    for document in DOCUMENTS:
        for path in re.findall(rf"`((?:{rooms})/[\w./-]+)`", document.read_text(encoding="utf-8")):
            assert (ROOT / path).exists() or "NAME" in path, f"{document.name} names {path}"
