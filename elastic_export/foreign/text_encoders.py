"""Text encoders and tokenizers of a diffusers folder: CLIP and T5, by transformers, and what language models are read with, too."""

import contextlib
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elastic_export.foreign.component import member
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.reading import is_pointer, read_json, reason
from elastic_export.foreign.weights import Naming
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
# The files of a tokenizer's vocabulary, one set of which is enough.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",), ("tekken.json",))


class Encoder(nn.Module):
    """`input_ids (B, N) -> ` what `gives` names, float32: pooled (B, P), the hidden states (B, N, D)."""

    def __init__(self, encoder: Any, gives: tuple[str, ...]):
        super().__init__()
        self.encoder = encoder
        self.gives = gives
        # T5's values outgrow fp16 there, and transformers keeps it in float32.
        kept = getattr(encoder, "_keep_in_fp32_modules", None) or ()
        self.exact = tuple(name for name, _ in self.named_modules() if name.rpartition(".")[2] in kept)

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
    """A tokenizer in the tokenizers package's format, the id that prompts are padded with, and the most tokens that it makes; where it was
    read, and as transformers has it."""

    content: bytes
    pad_token_id: int
    max_length: int
    path: Path
    fast: Any

    def run(self, marked: bool = True) -> bytes:
        """In the same format, what transformers runs: for Qwen's it takes the words from the file, and how text is split from itself.
        `marked`: whether it adds its marks at the ends of a text."""
        made = str(self.fast.backend_tokenizer.to_str())
        return (made if marked else json.dumps(json.loads(made) | {"post_processor": None})).encode()

    def begins(self, text: str) -> bool:
        """Whether a text begins with the mark of a beginning."""
        return self.fast.bos_token is not None and text.startswith(self.fast.bos_token)

    @property
    def padding_side(self) -> Literal["left", "right"]:
        return "left" if self.fast.padding_side == "left" else "right"


def kind(folder: Folder, component: str, known: Collection[str] = tuple(GIVES)) -> str:
    """Class of an encoder: what the folder's index says, as its pipeline loads it, or what the encoder's own config does where there is no
    index. Raises ModelError for one that is not `known`."""
    written = folder.component(component).config.get("architectures")
    own = written[0] if isinstance(written, list) and written else None
    name = folder.listed[component] or own
    if isinstance(own, str) and isinstance(name, str) and own[:2] != name[:2]:
        name = own  # another kind of model than the index says
    if not isinstance(name, str) or name not in known:
        raise ModelError(
            f"{folder.path / component} is a {name or 'model of unknown class'}; there are {', '.join(known)}: leave it out with "
            "--components transformer,vae, and give embeddings in place of prompts"
        )
    return str(name)


def sizes(folder: Folder, component: str) -> tuple[int, int]:
    """Widths of what an encoder gives: pooled, and hidden states."""
    config = config_of(folder, component)
    width = config.hidden_size
    return config.projection_dim if "Projection" in kind(folder, component) else width, width


def read_tokenizer(folder: Folder, component: str) -> Tokenizer:
    """The tokenizer of an encoder: its `tokenizer.json` as it is, or what transformers makes of the older files.

    Raises: MissingError without transformers, or what it reads the vocabulary with; ModelError naming the missing or unreadable folder, and
        one without a vocabulary, of which transformers makes a tokenizer that reads nothing of any prompt.
    """
    path = folder.path / component.replace("text_encoder", "tokenizer")
    if not path.is_dir():
        raise ModelError(f"{folder.path} lacks {path.name}, the tokenizer of its {component}: download the folder again")
    auto = transformers_class("AutoTokenizer")
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
        _check_vocabulary(path)
        lost = [name for name in ("sentencepiece", "google.protobuf") if importlib.util.find_spec(name) is None]
        if lost and any((path / name).is_file() for name in ("spiece.model", "tokenizer.model")):
            raise MissingError(
                f"{path} has its vocabulary as sentencepiece's, which is not read without {lost[0]}: pip install sentencepiece protobuf, "
                "or save a tokenizer.json there"
            ) from None
        raise ModelError(f"{path} is not a tokenizer that transformers reads: {reason(error)}") from None
    _check_vocabulary(path)
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:  # of T5's kind an empty one has the mark of a space
        raise ModelError(f"{path} has a vocabulary without words, with which nothing is read of a prompt: download it again")
    if (file := path / "tokenizer.json").is_file():
        content = file.read_bytes()
    elif (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = backend.to_str().encode()
    else:
        raise ModelError(f"{path} has no tokenizer.json, and transformers makes none of it: save a fast tokenizer there")
    pad, length = tokenizer.pad_token_id, tokenizer.model_max_length
    if not isinstance(pad, int) or pad < 0:
        raise ModelError(f"{path} names no pad token")
    if not isinstance(length, int | float) or not length >= 1:
        raise ModelError(f"{path}: model_max_length is a number of tokens, got {length!r}")
    return Tokenizer(content, pad, int(length), path, tokenizer)


def _check_vocabulary(tokenizer: Path) -> None:
    """Raise ModelError for a tokenizer's folder without a vocabulary, or with a pointer in its place."""
    files = [tokenizer / name for names in VOCABULARIES for name in names]
    if pointers := [file for file in files if file.is_file() and is_pointer(file)]:
        raise ModelError(f"{pointers[0]} is a git-lfs pointer and not the vocabulary: run git lfs pull in its folder")
    if not any(all((tokenizer / name).is_file() for name in names) for names in VOCABULARIES):
        has = ", ".join(sorted(each.name for each in tokenizer.iterdir())) or "nothing"
        known = ", or ".join(" with ".join(names) for names in VOCABULARIES)
        raise ModelError(f"{tokenizer} lacks its vocabulary ({known}); it has {has}: download it again")


def _config(tokenizer: Path) -> dict[str, Any]:
    file = tokenizer / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def text_encoder(folder: Folder, component: str, length: int, batch: Span) -> GraphCapture:
    """Capture an encoder for sequences of `length` tokens."""
    gives, (pooled, width) = GIVES[kind(folder, component)], sizes(folder, component)
    vocabulary = config_of(folder, component).vocab_size
    shapes: dict[str, tuple[int | str, ...]] = {name: ("B", pooled) if name == "pooled" else ("B", length, width) for name in gives}

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.random.default_rng(0).integers(0, vocabulary, (size, length), dtype=np.int64)}

    return GraphCapture(
        name=component,
        module=load_encoder(folder, component),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("B", length)),),
        outputs=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()),
        axes=(),
        batch=batch,
        feeds=feeds,
    )


def load_encoder(folder: Folder, component: str) -> Encoder:
    """The encoder in float32, every tensor of it from the files.

    Raises: MissingError without transformers; ModelError for weights that do not fit.
    """
    module, naming, name = built(folder, component)
    return Encoder(folder.component(component).fill(module, naming, name), GIVES[name])


def built(folder: Folder, component: str) -> tuple[nn.Module, Naming, str]:
    """An encoder without its weights, how files name them, and its class."""
    name, config, files = kind(folder, component), config_of(folder, component), folder.component(component)

    module: nn.Module = files.described(lambda: unfilled(lambda: transformers_class(name)(config)), name)
    return module, _t5() if name.startswith("T5") else _clip(module), name


def _clip(module: nn.Module) -> Naming:
    """Files have the text model under its own name, the module by its class; whole CLIPs bring the half that sees, too."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in module.state_dict()) else ""

    def rename(name: str) -> str:
        bare = name.removeprefix("transformer.").removeprefix("text_model.")
        return prefix + bare if bare.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else bare

    return Naming(
        rename, re.compile(r"(text_model\.)?embeddings\.position_ids|vision_model\.|visual_projection\.|text_projection\.|logit_scale")
    )


def _t5() -> Naming:
    """Files hold the embedding under either name or both; whole T5s bring the half that answers, too."""
    return Naming(
        lambda name: name.removeprefix("transformer."),
        re.compile(r"decoder\.|lm_head\.|spiece_model$"),
        {"encoder.embed_tokens.weight": "shared.weight"},
    )


def config_of(folder: Folder, component: str, known: Collection[str] = tuple(GIVES)) -> Any:
    """An encoder's config as transformers reads it; raises as `kind`, and ModelError for one that does not describe it."""
    name, files = kind(folder, component, known), folder.component(component)
    files.config  # noqa: B018  says what is wrong with the file in words of its own
    return files.described(lambda: transformers_class(name).config_class.from_pretrained(files.path, local_files_only=True), name)


def unfilled(make: Callable[[], Any]) -> Any:
    """What `make` makes with transformers, without memory for weights."""
    with _Unfilled(), _quiet():
        return make()


class _Unfilled(TorchFunctionMode):
    """Storage that is to be filled from a file is not taken: parameters, which begin as `torch.empty`, are on `meta`. What a module
    computes for itself is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def transformers_class(name: str) -> Any:
    """A class of transformers; raises MissingError with the line that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingError(f"text encoders need transformers ({error}): pip install 'elastic-export[flux]'") from error
    return member(transformers, name)


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
