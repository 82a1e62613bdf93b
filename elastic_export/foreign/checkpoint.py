"""Checkpoints as their trainers write them, read without running them; every mismatch is named."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from elastic_export.families.family import Family
from elastic_export.foreign import inert
from elastic_export.foreign.weights import few, fit, tensors, weight_files
from elastic_runtime.errors import ModelError

# Where trainers keep weights in a file, the moving average before the last state.
PLACES = ("ema", "model_ema", "ema_model", "model_state_dict", "model", "module", "state_dict")
# What they put before the names of weights: an average that stands beside the model's own, and wrappers (of torch.compile, Lightning, ...).
AVERAGES = ("ema_model.", "model_ema.", "ema.")
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
    args = inert.fields(content.get("args") or content.get("config") or content.get("hyper_parameters") or {})
    weights: Any = content
    for place in PLACES:
        if isinstance(content.get(place), inert.Inert):
            raise ModelError(f"{path} was refused: it holds {content[place].kind}, an object with code. Save its state_dict() instead.")
        if isinstance(content.get(place), dict):
            weights = content[place]
            break
    return _unwrapped(path, weights, args if isinstance(args, Mapping) else {})


def _unwrapped(path: Path, weights: Mapping[Any, Any], args: Mapping[str, Any]) -> Checkpoint:
    """Weights without what their trainer put before their names."""
    others: list[str] = []
    while prefix := next((each for each in (*AVERAGES, *WRAPPERS) if any(str(name).startswith(each) for name in weights)), None):
        others += [str(name) for name in weights if not str(name).startswith(prefix)]
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if str(name).startswith(prefix)}
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise ModelError(f"{path} holds no weights: expected tensors, or a dict with 'ema' or 'model'; it has {few(weights)}")
    return Checkpoint(path, dict(weights), dict(args), tuple(others))


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
