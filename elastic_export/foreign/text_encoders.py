"""Text encoders and tokenizers of a diffusers folder: CLIP and T5, by transformers."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_export.foreign.folder import Folder, read_json
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import MissingError, ModelError
from elastic_targets.capture import GraphCapture

# What the pipelines take from each class of encoder: FLUX has the plain CLIP, SD3 the projected ones.
GIVES = {
    "CLIPTextModel": ("pooled",),
    "CLIPTextModelWithProjection": ("pooled", "penultimate_hidden_state"),
    "T5EncoderModel": ("last_hidden_state",),
}


class Encoder(nn.Module):
    """`input_ids (B, N) -> ` what `gives` names, float32: pooled (B, P), the hidden states (B, N, D)."""

    def __init__(self, encoder: Any, gives: tuple[str, ...]):
        super().__init__()
        self.encoder = encoder
        self.gives = gives

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        every = self.encoder(input_ids, output_hidden_states="penultimate_hidden_state" in self.gives)
        # The projection of CLIP's pooled state, where there is one, is the first output.
        pooled = every.text_embeds if "text_embeds" in every else every.get("pooler_output")
        embeddings = {"pooled": pooled, "last_hidden_state": every.last_hidden_state}
        if "penultimate_hidden_state" in self.gives:
            embeddings["penultimate_hidden_state"] = every.hidden_states[-2]
        return tuple(embeddings[name].float() for name in self.gives)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer in the tokenizers package's format, the id that prompts are padded with, and the most tokens that it makes."""

    content: bytes
    pad_token_id: int
    max_length: int


def kind(folder: Folder, component: str) -> str:
    """Class of an encoder; raises ModelError for one that is neither CLIP nor T5."""
    named = folder.config(component).get("architectures") or [folder.listed[component]]
    if named[0] not in GIVES:
        raise ModelError(f"{folder.path / component} is a {named[0] or 'model of unknown class'}; there are {', '.join(GIVES)}")
    return str(named[0])


def sizes(folder: Folder, component: str) -> tuple[int, int]:
    """Widths of what an encoder gives: pooled, and hidden states."""
    config = folder.config(component)
    width = int(config.get("hidden_size", config.get("d_model", 0)))
    return int(config.get("projection_dim", width)) if "Projection" in kind(folder, component) else width, width


def read_tokenizer(folder: Folder, component: str) -> Tokenizer:
    """The tokenizer of an encoder: its `tokenizer.json` as it is, or what transformers makes of the older files.

    Raises: MissingError without transformers; ModelError naming the missing or unreadable folder.
    """
    path = folder.path / component.replace("text_encoder", "tokenizer")
    if not path.is_dir():
        raise ModelError(f"{folder.path} lacks {path.name}, the tokenizer of its {component}: download the folder again")
    auto = _transformers("AutoTokenizer")
    try:
        with _quiet():
            # Said aloud: left unsaid, transformers asks on the terminal whether to run the code that a folder brings.
            tokenizer = auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its many readers raise
        if "auto_map" in _config(path):
            raise ModelError(
                f"{path} is a tokenizer with code of its own, and no code of a model folder is run: save it there as a "
                "tokenizer.json that needs none (PreTrainedTokenizerFast), and take auto_map out of tokenizer_config.json"
            ) from None
        raise ModelError(f"{path} is not a tokenizer that transformers reads: {str(error).splitlines()[0]}") from None
    if (file := path / "tokenizer.json").is_file():
        content = file.read_bytes()
    elif (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = backend.to_str().encode()
    else:
        raise ModelError(f"{path} has no tokenizer.json, and transformers makes none of it: save a fast tokenizer there")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{path} names no pad token")
    return Tokenizer(content, int(tokenizer.pad_token_id), int(tokenizer.model_max_length))


def _config(tokenizer: Path) -> dict[str, Any]:
    file = tokenizer / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def text_encoder(folder: Folder, component: str, length: int, batch: Span) -> GraphCapture:
    """Capture an encoder for sequences of `length` tokens; it is loaded when it is asked for."""
    gives, (pooled, width) = GIVES[kind(folder, component)], sizes(folder, component)
    vocabulary = int(folder.config(component)["vocab_size"])
    shapes: dict[str, tuple[int | str, ...]] = {name: ("B", pooled) if name == "pooled" else ("B", length, width) for name in gives}

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.random.default_rng(0).integers(0, vocabulary, (size, length), dtype=np.int64)}

    return GraphCapture(
        name=component,
        module=None,
        load=lambda: load_encoder(folder, component),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("B", length)),),
        outputs=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()),
        axes=(),
        batch=batch,
        feeds=feeds,
    )


def load_encoder(folder: Folder, component: str) -> Encoder:
    """The encoder in float32, read as transformers reads it: tensor by tensor.

    Raises: MissingError without transformers; ModelError for weights that do not fit.
    """
    name = kind(folder, component)
    folder.weight_files(component)  # which says what is missing, and that pickles are not read
    model = _transformers(name)
    try:
        with _quiet():
            encoder = model.from_pretrained(
                folder.path / component, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder.path / component} is not a {name}: {str(error).splitlines()[0]}") from None
    return Encoder(encoder.eval().requires_grad_(False), GIVES[name])


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingError(f"text encoders need transformers ({error}): pip install 'elastic-export[flux]'") from error
    return getattr(transformers, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers' own: the command shows its stages."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
