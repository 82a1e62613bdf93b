"""Which cases of a test every run has."""

from collections.abc import Iterable
from typing import Any

import pytest


def narrow(cases: Iterable[Any], kept: int = 1) -> list[Any]:
    """The cases of a parameter: the first `kept` for every run, the others for `make wide`. Those are another family, form or precision of
    what the first cover: what is wrong in one of them alone is rare, and each takes an export."""
    every = list(cases)
    wide = (pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.wide) for case in every[kept:])
    return [*every[:kept], *wide]
