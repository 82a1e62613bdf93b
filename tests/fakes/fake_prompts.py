"""Tokenizers and text encoders for bundles of FLUX's form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_flux import FLUX, Opener, encoder, encoder_graph, manifest, to_zero

from elastic_runtime import Bundle
from elastic_runtime.contract.manifest import Text

WORDS = ["<pad>", "</s>", "a", "cat", "dog", "red", "blue"]


def write_tokenizer(path: Path) -> None:
    """Words to their places in WORDS, an end mark after them; the file asks for cutting and padding of its own."""
    tokenizers = pytest.importorskip("tokenizers", reason="prompts need tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(3)
    made.enable_padding(length=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))


def pooling(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"pooled": feeds["input_ids"].astype(np.float32)}


def hidden(width: int) -> Any:
    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"last_hidden_state": np.repeat(feeds["input_ids"][:, :, None], width, axis=2).astype(np.float32)}

    return run


def flux(folder: Path) -> Opener:
    """A short encoder for the pooled embedding, a longer one for the tokens, as FLUX has."""
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name / "tokenizer.json")
    encoders = (
        encoder("text_encoder", "tokenizer/tokenizer.json", 5, 1, "pooled"),
        encoder("text_encoder_2", "tokenizer_2/tokenizer.json", 8, 0, "last_hidden_state"),
    )
    graphs = {
        "text_encoder": encoder_graph(5, pooled=("B", 5)),
        "text_encoder_2": encoder_graph(8, last_hidden_state=("B", 8, 6)),
    }
    whole = manifest(FLUX, text=Text(encoders=encoders, length=8, width=6, pooled=5), **graphs)
    opener = Opener(whole, to_zero, text_encoder=pooling, text_encoder_2=hidden(6))
    opener.bundle = Bundle(folder, whole)
    return opener
