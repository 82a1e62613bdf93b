"""The one reader of weights: every tensor of a module comes from the files, and every tensor of the files goes into the module or is
known to have no place there. Nothing is filled in, and nothing is dropped without a word.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from elastic_export.foreign.reading import is_pointer, read_json
from elastic_runtime.errors import ModelError
from elastic_targets.weights import Streamed, values

STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16", ".bf16")  # in full precision where there is a choice
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KINDS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip
# What the scale of a tensor `NAME.weight` in eight bits is called, by who wrote it; the weight is what is stored, times the scale.
SCALES = ("weight_scale", "scale_weight")
INPUTS = ("scale_input", "input_scale")  # of activations, which are not computed in eight bits here
MARK = "scaled_fp8"  # an empty tensor that says that there are scales


@dataclass(frozen=True)
class Naming:
    """How files name what a module holds.

    Args:
        rename: the module's name of a file's tensor. extra: names, so renamed, that the module has no use for.
        ties: a tensor of the module -> another that it shares its values with, either of which the files may hold.
    """

    rename: Callable[[str], str] = str
    extra: re.Pattern[str] | None = None
    ties: Mapping[str, str] = field(default_factory=dict)


PLAIN = Naming()
Change = Callable[[Tensor], Tensor]  # of a weight in float32
NONE: Mapping[str, Change] = MappingProxyType({})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, whole or in shards that an index lists, in full precision where there is a choice.

    Raises: ModelError where there are none, or a shard is missing.
    """
    if name := weights_name(lambda name: (folder / name).is_file()):
        return _shards(folder / name) if name.endswith(".json") else [folder / name]
    has = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
    if any(each.suffix in (".safetensors", ".sft") for each in folder.iterdir()):
        raise ModelError(
            f"{folder} holds no weights by the names that diffusers and transformers write ({', '.join(STEMS)}, .safetensors behind, or "
            f"shards with their index); it has {has}. A model in a single file, by its public code's names, is to be read by diffusers "
            "(from_single_file) and saved (save_pretrained) first"
        )
    raise ModelError(
        f"{folder} holds no safetensors weights; it has {has}. Pickled weights could run code and are not read: "
        "save the component again with safe_serialization=True"
    )


def weights_name(has: Callable[[str], bool]) -> str | None:
    """The name of the weights, or of the index of their shards, in a folder of which `has` tells what it holds; None without."""
    for stem in STEMS:
        for variant in VARIANTS:
            indices = (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json")
            if name := next(filter(has, (*indices, f"{stem}{variant}.safetensors")), None):
                return name
    return None


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index} lists no shards (weight_map): download or copy it again")
    shards = [index.parent / name for name in sorted(set(places.values()))]
    if lost := [shard.name for shard in shards if not shard.is_file()]:
        raise ModelError(f"{index.parent} lacks {', '.join(lost[:3])}, which {index.name} lists: download it again")
    for shard in shards:
        with reading(shard) as opened:
            held = set(opened.keys())
        if lost := [name for name, file in places.items() if index.parent / file == shard and name not in held]:
            raise ModelError(f"{shard} lacks {few(lost)}, which {index.name} lists there: download it again")
    return shards


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """An open safetensors file; raises ModelError for one that is damaged, cut off, or only a pointer to the real one."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        if is_pointer(file):
            raise ModelError(
                f"{file} is not a readable safetensors file: it is a git-lfs pointer and not the weights: run git lfs pull in its folder"
            ) from None
        size = file.stat().st_size
        raise ModelError(
            f"{file} is not a readable safetensors file: it is damaged or incomplete, {size} bytes ({error}): download or copy it again"
        ) from None


def tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of files, whose headers alone are read: each tensor's values are read whenever something computes with them.

    Raises: ModelError for a name that two files have.
    """
    seen: dict[str, Path] = {}
    for file in files:
        with reading(file) as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                if (other := seen.setdefault(name, file)) != file:
                    raise ModelError(f"{file} has {name}, and so has {other}: which one is meant? Download or copy the shards again")
                stored = opened.get_slice(name)
                kind = _KINDS.get(stored.get_dtype(), torch.uint8)  # what is no weight is refused as any integer is
                yield name, Streamed(partial(_read, file, name), torch.Size(stored.get_shape()), kind)


def _read(file: Path, name: str) -> Tensor:
    with reading(file) as opened:  # each time anew: what an open file has read stays in memory
        value: Tensor = opened.get_tensor(name)
    return value


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of files, one after another: of a single one what `sha256sum` says."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or the safetensors of a folder."""
    return weight_files(path) if path.is_dir() else [path]


def fit(
    module: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    where: str,
    what: str,
    naming: Naming = PLAIN,
    changes: Mapping[str, Change] = NONE,
) -> None:
    """Put weights, by their names in the files, into `module` (which may be on `meta`) as float32; they stay where they are until they are
    used. Eight-bit floats are multiplied by their scales where the files have them. `changes` are made of weights by the module's names, as
    they are read.

    Raises: as `match`.
    """
    held, scales = match(module, weights, where, what, naming)
    wide = {
        name: Streamed(partial(_wide, value, scales.get(name), changes.get(name)), value.shape, torch.float32)
        for name, value in held.items()
    }
    module.load_state_dict(wide, assign=True)
    if lost := [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]:
        raise ModelError(f"{what} holds {few(lost)}, which its weights do not tell")


def match(
    module: nn.Module, weights: Iterable[tuple[str, Tensor]], where: str, what: str, naming: Naming = PLAIN
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensor that `weights` have for each in the state of `module`, and the scales of those in eight bits, both by its name.

    Raises: ModelError naming what is missing, unexpected, misshapen, or no floating-point numbers, in `where`, which should hold a `what`.
    """
    state, faults = module.state_dict(), []
    held: dict[str, Tensor] = {}
    for name, value in weights:
        ours = naming.rename(name)
        if ours in held:
            faults.append(f"has {ours} twice")
        held[ours] = value
    marked = MARK in held
    held, scales = _scaled(held)
    for one, other in naming.ties.items():
        for name, twin in ((one, other), (other, one)):
            if name in state and name not in held and twin in held:
                held[name] = held[twin]
                scales |= {name: scales[twin]} if twin in scales else {}
    if missing := [name for name in state if name not in held]:
        faults.append(f"lacks {few(missing)}")
    extra = [name for name in held if name not in state]
    if unknown := [name for name in extra if not (naming.extra and naming.extra.match(name))]:
        faults.append(f"has unknown {few(unknown)}")
    bare = [name for name in state if name in held and held[name].dtype in FLOAT8 and name not in scales]
    if bare and scales:
        faults.append(f"has {few(bare)} in eight bits without a scale, where others have theirs")
    elif bare and marked:
        faults.append(f"says that its eight-bit weights have scales ({MARK}), and holds none")
    for name in sorted(state.keys() & held.keys()):
        value = held[name]
        if value.shape != state[name].shape:
            faults.append(f"has {name} of shape {tuple(value.shape)} where the model has {tuple(state[name].shape)}")
        if value.dtype not in (*WIDE, *FLOAT8):
            kind = str(value.dtype).removeprefix("torch.")
            faults.append(f"has {name} as {kind}, which is quantised or no weight: take the file in float32, bfloat16 or float16")
        elif name in scales and tuple(scales[name].shape) not in ((), (1,), (1, 1), value.shape[:1], (*value.shape[:1], 1)):
            faults.append(f"has a scale of shape {tuple(scales[name].shape)} for {name} of shape {tuple(value.shape)}")
    if faults:
        raise ModelError(f"{where} does not fit {what}: it {'; it '.join(sorted(faults)[:6])}")
    return {name: held[name] for name in state}, scales


def _scaled(held: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the scales of those that are stored in eight bits, by the weight's name."""
    eight = {name: name.removesuffix("weight") for name, value in held.items() if value.dtype in FLOAT8 and name.endswith(".weight")}
    scales = {name: held[bare + suffix] for name, bare in eight.items() for suffix in SCALES if bare + suffix in held}
    aside = {bare + suffix for bare in eight.values() for suffix in (*SCALES, *INPUTS)} | ({MARK} if eight else set())
    return {name: value for name, value in held.items() if name not in aside}, scales


def _wide(stored: Tensor, scale: Tensor | None, change: Change | None) -> Tensor:
    value = values(stored).float()
    if scale is not None:  # one for each row, or one for all
        value = value * values(scale).float().reshape(-1, *[1] * (value.dim() - 1))
    return change(value) if change else value


def few(names: Any) -> str:
    """The first of many names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
