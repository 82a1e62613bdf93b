"""Prompts to embeddings: tokenizers and text encoders of a bundle, one at a time in memory."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import TextEncoder
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.errors import BundleError, MissingError, UsageError
from elastic_runtime.sessions.session import Session, batches


def encode(bundle: Bundle, prompts: Sequence[str], open_graph: Callable[[str], Session]) -> Conditions:
    """Embeddings of each prompt, as the manifest's `Text` puts them together.

    Each encoder is opened, run and closed before the next. A prompt that some encoder takes whole and another cuts is a warning;
    one that no encoder takes whole is an error.

    Raises: UsageError for a prompt that is too long, or a model without text encoders; MissingError without tokenizers.
    """
    text = bundle.manifest.model.text
    if text is None or not text.encoders:
        beside = " and pooled_prompt_embeds" if text is None or text.pooled else ""
        raise UsageError(f"{bundle.manifest.model.name} has no text encoders in this bundle: give prompt_embeds{beside}")
    unique = list(dict.fromkeys(prompts))
    ids = _tokenize(bundle, text.encoders, unique)  # of all, before any encoder is opened: too long a prompt is known at once
    given: dict[str, list[np.ndarray]] = {"pooled": [], "penultimate_hidden_state": [], "last_hidden_state": []}
    for encoder, rows in zip(text.encoders, ids, strict=True):
        with open_graph(encoder.graph) as session:
            runs = [session.run({"input_ids": rows[part]}) for part in batches(session, len(rows))]
        for name in encoder.gives:
            given[name].append(np.concatenate([run[name] for run in runs]))
    parts = [_widen(np.concatenate(given["penultimate_hidden_state"], axis=-1), text.width)] if given["penultimate_hidden_state"] else []
    none = np.zeros((len(unique), 0, text.width), dtype=np.float32)
    hidden = np.concatenate([none, *parts, *given["last_hidden_state"]], axis=1)
    hidden = np.pad(hidden, ((0, 0), (0, text.length - hidden.shape[1]), (0, 0)))
    back = [unique.index(prompt) for prompt in prompts]
    return Conditions(hidden[back].astype(np.float32), np.concatenate(given["pooled"], axis=-1)[back].astype(np.float32))


def _widen(hidden: np.ndarray, width: int) -> np.ndarray:
    """Padded with zeros or, as diffusers does it, cut to `width`."""
    return np.pad(hidden[..., :width], ((0, 0), (0, 0), (0, max(width - hidden.shape[-1], 0))))


def _tokenize(bundle: Bundle, encoders: tuple[TextEncoder, ...], prompts: Sequence[str]) -> list[np.ndarray]:
    """Padded `input_ids` (B, max_length) for each encoder."""
    tokenizers = [_tokenizer(bundle, encoder) for encoder in encoders]
    for prompt in prompts:
        counts = [len(tokenizer.encode(prompt).ids) for tokenizer in tokenizers]
        fits = [count <= encoder.max_length for count, encoder in zip(counts, encoders, strict=True)]
        if not any(fits):
            count, most = max(zip(counts, (encoder.max_length for encoder in encoders), strict=True), key=lambda pair: pair[1])
            raise UsageError(f"the prompt {_short(prompt)} has {count} tokens and the model takes at most {most}: shorten it")
        for encoder, count, whole in zip(encoders, counts, fits, strict=True):
            if not whole:
                warnings.warn(
                    f"{encoder.graph} sees the first {encoder.max_length} of {count} tokens of the prompt {_short(prompt)}; "
                    f"{encoders[fits.index(True)].graph} sees all",
                    stacklevel=4,
                )
    rows = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        tokenizer.enable_truncation(encoder.max_length)  # which keeps the marks at the end
        kept = [tokenizer.encode(prompt).ids for prompt in prompts]
        rows.append(np.array([ids + [encoder.pad_token_id] * (encoder.max_length - len(ids)) for ids in kept], dtype=np.int64))
    return rows


def _tokenizer(bundle: Bundle, encoder: TextEncoder) -> Any:
    """The tokenizer without the cutting and padding that its file may ask for."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingError(
            "prompts need the tokenizers package: pip install 'elastic-export[ralu]', or give prompt_embeds and pooled_prompt_embeds"
        ) from None
    path = bundle.file(encoder.tokenizer.path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # its exception types are private
        raise BundleError(f"{path} is no tokenizer: {error}. Copy or export the bundle again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
