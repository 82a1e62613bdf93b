"""What is committed: no file too long to read in one sitting, none too large, none that knows the machine it was written on."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400
SOURCES = (".py", ".js", ".css")
LARGEST = 5_000_000
# A folder of somebody's machine, where a text starts or after a quote, a space or an equals sign.
FOREIGN = re.compile(r"""(?:^|[\s"'`=(:])(/(?:work|root|home|Users|mnt)/[\w.-]+)""", re.MULTILINE)


def committed() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says what is committed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_no_source_is_longer_than_one_sitting() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len((text(path) or "").splitlines()) for path in committed() if path.suffix in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
    assert len(lengths) > 30


def test_no_file_is_larger_than_five_megabytes() -> None:
    assert {path.name: path.stat().st_size for path in committed() if path.stat().st_size > LARGEST} == {}


def test_no_text_names_a_folder_of_somebodys_machine() -> None:
    matches = {path.relative_to(ROOT).as_posix(): FOREIGN.findall(content) for path in committed() if (content := text(path))}
    assert {name: places for name, places in matches.items() if places} == {}


def test_the_search_for_foreign_folders_finds_one() -> None:
    assert FOREIGN.findall('open("' + "/ho" + 'me/someone/x.pt")') == ["/ho" + "me/someone"]
    assert FOREIGN.findall("https://example.org/work/it and work/it") == []


def test_nothing_imports_by_the_folders_of_an_editable_install() -> None:
    pattern = re.compile(r"^\s*(?:from|import)\s+(?:runtime|targets)[.\s]", re.MULTILINE)
    assert [path.name for path in committed() if path.suffix == ".py" and pattern.search(text(path) or "")] == []
    assert not (ROOT / "runtime" / "__init__.py").exists()
    assert not (ROOT / "targets" / "__init__.py").exists()


def test_nothing_happens_when_a_module_is_imported() -> None:
    """Only `cli/show/` prints, and only the runtime's and hall's functions read the environment."""
    printing = re.compile(r"^\s*print\(|sys\.stdout\.write", re.MULTILINE)
    reading = re.compile(r"^(?!\s).*os\.environ", re.MULTILINE)
    sources = [
        path for path in committed() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("elastic_export", "runtime", "targets")
    ]
    assert [path.name for path in sources if path.parent.name != "show" and printing.search(text(path) or "")] == []
    assert [path.name for path in sources if reading.search(text(path) or "")] == []
