"""Values of options, as commands and Python write them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from elastic_runtime.contract.axis import Span

BATCH = Span(1, 4)  # samples of one run, where nothing else is asked for
Folder = str | os.PathLike[str]
Spanned = Span | str | int
Adapting = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


def placeless(word: str) -> str:
    """A word of a command with an absolute path's last name alone, `--vae=/data/mine/vae` as `--vae=vae`: manifests and reports are
    published."""
    match = re.fullmatch(r"(--[^=]*=|-[A-Za-z](?=.))?(.*)", word, re.DOTALL)
    assert match is not None  # anything is a word
    option, path = match[1] or "", Path(match[2])
    return option + (path.name or path.anchor) if path.is_absolute() else word


def read_span(value: Spanned) -> Span:
    """`"32-256"`, `64` or a `Span`, as a span; raises BudgetError for other text."""
    return value if isinstance(value, Span) else Span.parse(str(value))


def read_spans(spans: Mapping[str, Spanned | None]) -> dict[str, Span]:
    """Those that are given."""
    return {name: read_span(value) for name, value in spans.items() if value is not None}


def read_words(value: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """`"transformer,vae"`, or the words themselves."""
    if value is None:
        return None
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else tuple(value)


def read_adapters(values: Sequence[Adapting] | None) -> list[tuple[Path, float]]:
    """Files of adapters with their scales; raises UsageError for a scale that is no number."""
    from elastic_export.foreign.adapters import parse, scaled

    if isinstance(values, str | os.PathLike):
        values = [values]
    return [scaled(Path(value[0]), value[1]) if isinstance(value, tuple) else parse(os.fspath(value)) for value in values or ()]
