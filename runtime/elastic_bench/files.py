"""Reports as files: read strictly; `elastic_runtime.files.atomic` writes them."""

from pathlib import Path

from elastic_bench.records import Report, decode
from elastic_runtime.errors import UsageError


def read(path: Path) -> Report:
    """The report in a file; raise UsageError where there is none or it is not one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): make it with elastic-export bench BUNDLE --json {path}") from None
    return decode(content, str(path))
