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
    given: dict[str, list[list[np.ndarray]]] = {"pooled": [], "penultimate_hidden_state": [], "last_hidden_state": [], "hidden_states": []}
    for encoder, rows in zip(text.encoders, ids, strict=True):
        with open_graph(encoder.graph) as session:
            outputs = _outputs(session, encoder, rows)
        for name in encoder.gives:
            given[name].append([each[name] for each in outputs])
    back = [unique.index(prompt) for prompt in prompts]
    whole = text.length if all(encoder.padded for encoder in text.encoders) else 0
    texts = []
    for i in range(len(unique)):
        side = [each[i] for each in given["penultimate_hidden_state"]]
        parts = [_widen(np.concatenate(side, axis=-1), text.width)] if side else []
        parts += [each[i] for name in ("last_hidden_state", "hidden_states") for each in given[name]]
        texts.append(_lengthen(np.concatenate(parts or [np.zeros((0, text.width))]), whole).astype(np.float32))
    pooled = [np.concatenate([each[i] for each in given["pooled"]]).astype(np.float32) for i in back] if given["pooled"] else None
    return Conditions.of([texts[i] for i in back], None if pooled is None else np.stack(pooled))


def _outputs(session: Session, encoder: TextEncoder, rows: Sequence[list[int]]) -> list[dict[str, np.ndarray]]:
    """What an encoder gives for each prompt's tokens. Prompts of one length share runs, so that none is padded for another's sake."""
    lengths = [_length(session, encoder, len(ids)) for ids in rows]
    masked = any(spec.name == "attention_mask" for spec in session.graph.inputs)
    drop = encoder.longest - encoder.max_length
    outputs: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for length in dict.fromkeys(lengths):
        alike = [i for i, each in enumerate(lengths) if each == length]
        mask = np.array([[1] * len(rows[i]) + [0] * (length - len(rows[i])) for i in alike], dtype=np.int64)
        if encoder.padding_side == "left":
            mask = mask[:, ::-1].copy()
        padded = np.full(mask.shape, encoder.pad_token_id, dtype=np.int64)
        padded[mask == 1] = [token for i in alike for token in rows[i]]
        for part in batches(session, len(alike)):
            run = session.run({"input_ids": padded[part]} | ({"attention_mask": mask[part]} if masked else {}))
            for row, i in enumerate(alike[part]):
                kept = slice(drop, None if encoder.padded else len(rows[i]))
                outputs[i] = {name: run[name][row] if name == "pooled" else run[name][row][kept] for name in encoder.gives}
    return outputs


def _length(session: Session, encoder: TextEncoder, tokens: int) -> int:
    """How many tokens a run takes for a prompt of `tokens`: as many, or the least that there is a function for."""
    if encoder.padded or "N" not in session.graph.dimensions:
        return encoder.longest
    compiled = {budget["N"] for budget in session.budgets or () if "N" in budget}
    return min((length for length in compiled if length >= tokens), default=tokens)


def _widen(hidden: np.ndarray, width: int) -> np.ndarray:
    """Padded with zeros or, as diffusers does it, cut to `width`."""
    return np.pad(hidden[..., :width], ((0, 0), (0, max(width - hidden.shape[-1], 0))))


def _lengthen(hidden: np.ndarray, length: int) -> np.ndarray:
    """Followed by zeros up to `length` tokens."""
    return np.pad(hidden, [(0, max(length - len(hidden), 0))] + [(0, 0)] * (hidden.ndim - 1))


def _tokenize(bundle: Bundle, encoders: tuple[TextEncoder, ...], prompts: Sequence[str]) -> list[list[list[int]]]:
    """Each prompt's tokens for each encoder, those of its template among them, none too many."""
    readers = [Reader(_tokenizer(bundle, encoder), encoder) for encoder in encoders]
    rows = [[reader.read(prompt) for prompt in prompts] for reader in readers]
    for i, prompt in enumerate(prompts):
        counts = [len(each[i]) - reader.drop for each, reader in zip(rows, readers, strict=True)]
        fits = [count <= encoder.max_length for count, encoder in zip(counts, encoders, strict=True)]
        if not any(fits):
            count, reader = max(zip(counts, readers, strict=True), key=lambda pair: pair[1].encoder.max_length)
            own = f", {len(reader.read('')) - reader.drop} of them its template's," if reader.encoder.template else ""
            most = reader.encoder.max_length
            raise UsageError(f"the prompt {_short(prompt)} has {count} tokens{own} and the model takes at most {most}: shorten it")
        for reader, each, count, whole in zip(readers, rows, counts, fits, strict=True):
            if not whole:
                warnings.warn(
                    f"{reader.encoder.graph} sees the first {reader.encoder.max_length} of {count} tokens of the prompt {_short(prompt)}; "
                    f"{encoders[fits.index(True)].graph} sees all",
                    stacklevel=4,
                )
                each[i] = reader.cut(prompt)
    return rows


class Reader:
    """What makes an encoder's tokens of prompts."""

    def __init__(self, tokenizer: Any, encoder: TextEncoder):
        self.encoder = encoder
        self.drop = encoder.longest - encoder.max_length  # tokens that give no embeddings
        self._tokenizer = tokenizer

    def read(self, prompt: str) -> list[int]:
        """All tokens of a prompt in its template."""
        self._tokenizer.no_truncation()
        template = self.encoder.template
        if template is None:
            return list(self._tokenizer.encode(prompt).ids)
        for word in template.without:
            prompt = prompt.replace(word, "")
        texts = [template.before + prompt, template.after] if template.apart else [template.before + prompt + template.after]
        return [token for text in texts for token in self._tokenizer.encode(text).ids]

    def cut(self, prompt: str) -> list[int]:
        """As many tokens of a prompt as the encoder takes, without a template the marks at the end among them."""
        if self.encoder.template:
            return self.read(prompt)[: self.encoder.longest]
        self._tokenizer.enable_truncation(self.encoder.max_length)
        return list(self._tokenizer.encode(prompt).ids)


def _tokenizer(bundle: Bundle, encoder: TextEncoder) -> Any:
    """The tokenizer without the padding that its file may ask for."""
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
    tokenizer.no_padding()
    return tokenizer


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
