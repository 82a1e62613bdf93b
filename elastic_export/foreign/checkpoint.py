"""Checkpoints as their trainers write them, read without running them; every mismatch is named."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from elastic_export.families.family import Family
from elastic_export.foreign import inert
from elastic_export.foreign.weights import few, fit, tensors, weight_files
from elastic_runtime.errors import ModelError

# Where trainers keep weights in a file, beside a moving average, which has "ema" in its name and comes first.
PLACES = ("model_state_dict", "model", "module", "state_dict", "params")
AVERAGE = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
# What wrappers (torch.compile, DataParallel, Lightning, ...) put before the names of weights.
WRAPPERS = ("_orig_mod.", "module.", "model.", "net.", "network.", "denoiser.", "diffusion_model.")


@dataclass(frozen=True)
class Checkpoint:
    """Weights by public key, the training arguments that came with them, the file, and names of what was left out: another copy of the
    weights, or what is no weight of the model."""

    path: Path
    weights: dict[str, Tensor]
    args: dict[str, Any]
    others: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.pt` or `.safetensors` file, or a folder of safetensors in shards. Of a training checkpoint, the EMA weights are used.

    Raises: ModelError for a file that is missing, truncated, of another format, or that would run code.
    """
    if path.is_dir():
        return _unwrapped(path, dict(tensors(weight_files(path))), {})
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist")
    if path.suffix in (".safetensors", ".sft"):
        return _unwrapped(path, dict(tensors([path])), {})
    content = inert.load(path)
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, inert.Inert) else type(content).__name__
        raise ModelError(f"{path} holds a {kind}, not a dict of weights")
    content = dict(content)  # whose methods are a dict's
    try:
        args: Any = next(
            (inert.fields(content[name]) for name in ("args", "config", "hyper_parameters") if content.get(name) is not None), {}
        )
    except RecursionError:
        raise ModelError(f"{path} is not a readable checkpoint: its args hold themselves") from None
    averages = [
        name for name, value in content.items() if isinstance(name, str) and AVERAGE.search(name) and isinstance(value, dict) and value
    ]
    if len(averages) > 1:
        raise ModelError(f"{path} holds several averages of the weights, {few(averages)}: save the one that is meant")
    if not averages and (odd := next((name for name, value in content.items() if AVERAGE.search(str(name)) and _is_average(value)), None)):
        kind = content[odd].kind if isinstance(content[odd], inert.Inert) else "list of tensors without names"
        raise ModelError(
            f"{path} holds an average of the weights, {odd}, as a {kind}: save its state_dict(), or leave it out for the last ones"
        )
    weights: Any = content
    for place in (*averages, *PLACES):
        if isinstance(content.get(place), inert.Inert):
            raise ModelError(f"{path} was refused: it holds {content[place].kind}, an object with code. Save its state_dict() instead.")
        if isinstance(content.get(place), dict):
            weights = dict(content[place])
            break
    return _unwrapped(path, weights, args if isinstance(args, Mapping) else {})


def _unwrapped(path: Path, weights: Mapping[Any, Any], args: Mapping[str, Any]) -> Checkpoint:
    """Weights without what their trainer put before their names."""
    others: list[str] = []
    while prefix := _prefix(weights):
        kept = {str(name).removeprefix(prefix): value for name, value in weights.items() if str(name).startswith(prefix)}
        left = [str(name) for name in weights if not str(name).startswith(prefix)]
        if not AVERAGE.search(prefix[:-1]) and (twice := [name for name in left if _bare(name) in {_bare(each) for each in kept}]):
            raise ModelError(f"{path} holds {few(twice)} and the same behind {prefix!r}: save the weights that are meant")
        others, weights = others + left, kept
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise ModelError(f"{path} holds no weights: expected tensors, or a dict with 'ema' or 'model'; it has {few(weights)}")
    return Checkpoint(path, dict(weights), dict(args), tuple(others))


def _is_average(value: Any) -> bool:
    """Whether what is called an average holds weights in a form that is not read: an object, or tensors without names."""
    if isinstance(value, inert.Inert):
        return not vars(value) or _holds_tensors(vars(value))  # of an object that keeps its state in its own way nothing is known
    return isinstance(value, list | tuple) and _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in it, or in what it holds, which may be itself."""
    rest, seen = [value], set[int]()
    while rest:
        each = rest.pop()
        if isinstance(each, Tensor):
            return True
        each = vars(each) if isinstance(each, inert.Inert) else each
        if isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            rest += each.values() if isinstance(each, Mapping) else each
    return False


def _prefix(weights: Mapping[Any, Any]) -> str | None:
    """What stands before the names of weights: an average's word, which stands beside the model's own, before any wrapper's."""
    words = dict.fromkeys(str(name).partition(".")[0] + "." for name in weights if "." in str(name))
    return next((word for word in words if AVERAGE.search(word[:-1])), None) or next((word for word in WRAPPERS if word in words), None)


def _bare(name: str) -> str:
    """A name without the wrappers before it."""
    while prefix := next((word for word in WRAPPERS if name.startswith(word)), None):
        name = name.removeprefix(prefix)
    return name


def load_weights(module: nn.Module, family: Family, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Put the checkpoint's weights into `module` (which may be on `meta`) as float32; return the keys that were ignored.

    Raises: ModelError naming missing, unexpected, misshapen and quantised weights.
    """
    weights, ignored = [], list(checkpoint.others)
    for key, value in checkpoint.weights.items():
        name = family.rename_key(key)
        if name is None:
            ignored.append(key)
        else:
            weights.append((name, value))
    fit(module, weights, str(checkpoint.path), family.name)
    return tuple(ignored)
