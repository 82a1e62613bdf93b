"""Reading checkpoints without running them: pickles are never executed, and every mismatch is named."""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from elastic_export.families.family import Family
from elastic_runtime.errors import ModelError


@dataclass(frozen=True)
class Checkpoint:
    """Weights by public key, the training arguments that came with them, and the file."""

    path: Path
    weights: dict[str, Tensor]
    args: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.pt` or `.safetensors` file. Of a training checkpoint, the EMA weights are used.

    Raises: ModelError for a file that is missing, truncated, of another format, or that would run code.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist")
    content = _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    args = content.get("args") or content.get("config") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    weights = next((content[key] for key in ("ema", "model", "state_dict") if isinstance(content.get(key), dict)), content)
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise ModelError(f"{path} holds no weights: expected tensors, or a dict with 'ema' or 'model'; it has {_few(content)}")
    return Checkpoint(path, weights, dict(args) if isinstance(args, Mapping) else {})


def _safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}): download or copy it again") from None


def _pytorch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of foreign pickles, before refusing them, that they may not be supported
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_starts(path, b"PK"))
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if not blocked and not _starts(path, b"PK", b"\x80"):  # no pickle at all: a web page, a pointer to a file, half a header
            raise ModelError(f"{path} is not a readable PyTorch checkpoint: download or copy it again") from None
        what = f"{blocked[1]}, which could run code" if blocked else "objects other than weights"
        raise ModelError(f"{path} was refused: it holds {what}. Ask its author for .safetensors, or save only tensors.") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        why = (str(error) or "it ends too early").splitlines()[0]
        raise ModelError(f"{path} is not a readable PyTorch checkpoint ({why}): download or copy it again") from None


def _starts(path: Path, *marks: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(2).startswith(marks)


def load_weights(module: nn.Module, family: Family, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Put the checkpoint's weights into `module` (which may be on `meta`) as float32; return the keys that were ignored.

    Raises: ModelError naming missing, unexpected and misshapen weights.
    """
    weights, ignored = {}, []
    for key, value in checkpoint.weights.items():
        name = family.rename_key(key)
        if name is None:
            ignored.append(key)
        else:
            weights[name] = value.float()
    fit(module, weights, str(checkpoint.path), family.name)
    return tuple(ignored)


def fit(module: nn.Module, weights: Mapping[str, Tensor], where: str, what: str) -> None:
    """Put weights by name into `module` (which may be on `meta`) without copying them.

    Raises: ModelError naming missing, unexpected and misshapen weights of `where`, which should hold a `what`.
    """
    state = module.state_dict()
    faults = []
    if missing := [name for name in state if name not in weights]:
        faults.append(f"lacks {_few(missing)}")
    if extra := [name for name in weights if name not in state]:
        faults.append(f"has unknown {_few(extra)}")
    for name in state.keys() & weights.keys():
        if state[name].shape != weights[name].shape:
            faults.append(f"has {name} of shape {tuple(weights[name].shape)} where the model has {tuple(state[name].shape)}")
    if faults:
        raise ModelError(f"{where} does not fit {what}: it {'; it '.join(sorted(faults)[:6])}")
    module.load_state_dict(weights, assign=True)


def _few(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
