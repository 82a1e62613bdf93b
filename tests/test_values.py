"""What options say, as commands and Python write it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_export.values import placeless, read_words

NAME = st.text("abcdefg.-_ ", min_size=1).filter(lambda name: name.strip(".") != "")


@given(NAME, st.sampled_from(["", "--vae=", "--adapter=", "-o"]))
def test_a_command_keeps_no_place_of_an_absolute_path(name: str, option: str) -> None:
    assert placeless(f"{option}{Path('/data/secret') / name}") == option + Path(name).name


WORDS = ["onnx", "--latents", "32-256", "models/flux", "-o", "/", "-", "-n5", "--precision=denoiser=int4w,text=int8w", "a red cat"]


@pytest.mark.parametrize("word", WORDS)
def test_other_words_stay(word: str) -> None:
    assert placeless(word) == word


def test_words_are_a_sequence_or_with_commas() -> None:
    assert read_words("transformer, vae") == read_words(["transformer", "vae"]) == ("transformer", "vae")
    assert read_words(None) is None
