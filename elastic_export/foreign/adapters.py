"""LoRA files (Hu et al. 2021, arXiv 2106.09685), as diffusers and PEFT write them: `W + scale * alpha / r * up @ down`, weight by weight;
DoRA (Liu et al. 2024, arXiv 2402.09353) besides gives each row of the sum the length that the file has for it.

Names of a file are a component (`transformer.`, `text_encoder.`, ...; without one it is the transformer), a module of it as diffusers or
transformers has it or as in `kohya`, and one half of the product: `lora_A` and `lora_B`, `lora_down` and `lora_up`, or their older forms.
Alpha stands in the file, a number a module; in its header, where diffusers writes PEFT's config; or in PEFT's `adapter_config.json` beside
it. Where none of them tells, alpha is r.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_export.foreign import kohya
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.weights import WIDE, Change, Naming, digest, few, reading, tensors
from elastic_runtime.contract import manifest
from elastic_runtime.contract.schedule import is_number
from elastic_runtime.errors import ModelError, UsageError
from elastic_targets.weights import Streamed, values

MOST_SCALE = 1e6
SUFFIXES = (".safetensors", ".sft")
TRANSFORMER = "transformer"
# What stands before a module's name -> the component.
PREFIXES = {f"{name}.": name for name in (TRANSFORMER, "text_encoder", "text_encoder_2", "text_encoder_3")} | {
    "diffusion_model.": TRANSFORMER,
    **kohya.PREFIXES,
}
MAGNITUDE = "lora_magnitude_vector"
PEFT, CONFIG, HEADER = "base_model.model.", "adapter_config.json", "lora_adapter_metadata"
_NAME = re.compile(
    r"(?P<module>.+?)[._](?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"(\.default)?\.(?P<kind>weight|bias)"
)
_DOWN = ("A", "down")
_LENGTHS = re.compile(rf"(?P<module>.+?)\.{MAGNITUDE}(\.default)?(\.weight)?")
_ALPHA = re.compile(r"(?P<module>.+?)(\.lora)?\.alpha")
# Files that change weights in another way, by what their names hold.
OTHERS = {
    **dict.fromkeys(("lora_te2_", "lora_te3_"), "kohya's change of a second text encoder, which diffusers leaves out"),
    "dora_scale": "DoRA as LyCORIS writes it, of which diffusers fuses the LoRA alone",
    "lokr_": "LoKr, a Kronecker product",
    "hada_": "LoHa, a Hadamard product",
    "lora_embedding": "changes of an embedding",
    "lora_mid": "LoCon with a third factor",
}


@dataclass(frozen=True)
class Pair:
    """The change of one module: `down` (r, in, ...), `up` (out, r, ...) and `bias` (out,), whose values are on disk; `key` is the file's
    name of a half and `factor` is scale * alpha / r. Of DoRA, `lengths` has as many values as the weight has rows."""

    key: str
    down: Tensor
    up: Tensor
    bias: Tensor | None
    factor: float
    lengths: Tensor | None = None

    def rows(self, *parts: slice) -> "Pair":
        """The change of those outputs of the module alone, in that order."""
        bias, lengths = (None if value is None else _rows(value, parts) for value in (self.bias, self.lengths))
        return replace(self, up=_rows(self.up, parts), bias=bias, lengths=lengths)


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, its sha256, and its pairs by component and module."""

    path: Path
    scale: float
    sha256: str
    parts: Mapping[str, Mapping[str, Pair]]

    @property
    def record(self) -> manifest.Adapter:
        """What a manifest says of it."""
        return manifest.Adapter(name=self.path.name, sha256=self.sha256, scale=self.scale)


def parse(text: str) -> tuple[Path, float]:
    """`FILE.safetensors` or `FILE.safetensors:0.8`; raises UsageError for a scale that is no number."""
    file, colon, scale = text.rpartition(":")
    if Path(text).is_file() or not colon or not file.endswith(SUFFIXES):
        return Path(text), 1.0
    try:
        return scaled(Path(file), float(scale))
    except ValueError:
        return scaled(Path(file), scale)


def scaled(file: Path, scale: Any) -> tuple[Path, float]:
    """A file with its scale; raises UsageError for one that is no number, or beyond any use."""
    if not is_number(scale) or not abs(scale) <= MOST_SCALE:
        raise UsageError(f"an adapter is written FILE.safetensors or FILE.safetensors:0.8, and {scale!r} is no scale for {file}")
    return file, float(scale)


def read_adapter(path: Path, scale: float = 1.0) -> Adapter:
    """Read the names, shapes and alphas of a LoRA file; what it multiplies stays on disk.

    Raises: ModelError for what is no LoRA in safetensors, for half of a product, ranks that differ, and kinds of adapters that are none of
        diffusers' or PEFT's LoRA.
    """
    if path.is_dir():
        files = ", ".join(sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES)) or "no safetensors"
        raise ModelError(f"adapter {path} is a folder, which holds {files}: name the file")
    if not path.is_file():
        raise ModelError(f"adapter {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise ModelError(f"adapter {path} is no .safetensors file: pickles could run code and are not read")
    halves: dict[tuple[str, str], dict[str, tuple[str, Tensor]]] = {}
    alphas: dict[tuple[str, str], float] = {}
    lengths: dict[tuple[str, str], Tensor] = {}
    strangers, peft = [], False
    for name, value in tensors([path]):
        peft |= name.startswith(PEFT)
        bare = name.removeprefix(PEFT)
        kind = next((kind for mark, kind in OTHERS.items() if mark in bare), None)
        if kind:
            raise ModelError(f"{path} has {name}: that is {kind}, and adapters are LoRA as diffusers and PEFT have it")
        if match := _NAME.fullmatch(bare):
            half = "down" if match["half"].endswith(_DOWN) else "up"
            part = half if match["kind"] == "weight" else f"{half} bias"
            held = halves.setdefault(_place(match["module"]), {})
            if part in held:
                raise ModelError(f"{path} has {name}, and so has it {held[part][0]}: which one is meant?")
            held[part] = name, value
        elif match := _LENGTHS.fullmatch(bare):
            lengths[_place(match["module"])] = value
        elif match := _ALPHA.fullmatch(bare):
            alphas[_place(match["module"])] = _number(path, name, value)
        else:
            strangers.append(name)
    if not halves:
        raise ModelError(f"{path} is no LoRA: it holds {few(strangers) or 'nothing'}, and no lora_A and lora_B or lora_down and lora_up")
    if strangers:
        raise ModelError(f"{path} has {few(strangers)}, which no LoRA of diffusers or PEFT has")
    if lost := alphas.keys() - halves.keys():
        raise ModelError(f"{path} has an alpha of {_listed(lost)} and no weights of it: download it again")
    if lengths and (odd := lengths.keys() ^ halves.keys()):
        raise ModelError(f"{path} has {MAGNITUDE} of some modules, and of {_listed(odd)} that or the LoRA alone: download it again")
    config = _config(path, peft, any(module.startswith(kohya.BLOCKS) for _, module in halves))
    # In diffusers a module without one has alpha = r by the trainers' names, and by its own names that of the others.
    untold = [place for place, held in halves.items() if place not in alphas and not any("lora_down" in name for name, _ in held.values())]
    if alphas and (config or untold):
        other = f"its {CONFIG if peft else 'header'} has one for all" if config else f"none of {_listed(untold)}"
        raise ModelError(f"{path} has alphas of {_listed(alphas)}, and {other}: which is meant?")
    parts: dict[str, dict[str, Pair]] = {}
    for (component, module), held in halves.items():
        pair = _pair(path, f"{component}.{module}", held, lengths.get((component, module)))
        rank = pair.down.shape[0]
        alpha = alphas.get((component, module), float(rank))
        factor = _factor(path, config.get(component, {}), module, pair) if config else alpha / rank
        parts.setdefault(component, {})[module] = replace(pair, factor=scale * factor)
    return Adapter(path, scale, digest([path]), parts)


def _place(name: str) -> tuple[str, str]:
    """Component and module of a name."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, TRANSFORMER), name.removeprefix(prefix)


def _listed(places: Iterable[tuple[str, str]]) -> str:
    return few(sorted(map(".".join, places)))


def _number(path: Path, name: str, value: Tensor) -> float:
    number = values(value).double().flatten() if value.numel() == 1 else torch.empty(0)
    if not number.numel() or not number.isfinite().all():
        raise ModelError(f"{path}: {name} is one number, got a tensor of shape {tuple(value.shape)}")
    return float(number[0])


def _pair(path: Path, where: str, held: Mapping[str, tuple[str, Tensor]], lengths: Tensor | None) -> Pair:
    """The halves of one module's change; raises ModelError where one is missing, or their ranks differ."""
    if lost := [half for half in ("down", "up") if half not in held]:
        has = ", ".join(name for name, _ in held.values())
        raise ModelError(f"{path} has {has} and not the other half of the product: it is damaged, or {lost[0]} is another file's")
    if "down bias" in held:
        raise ModelError(f"{path} has {held['down bias'][0]}, and only the second half of a product may have a bias")
    (key, down), (_, up), bias = held["down"], held["up"], held.get("up bias", (None, None))[1]
    for name, value in held.values():
        if value.dtype not in WIDE:
            raise ModelError(f"{path} has {name} as {str(value.dtype).removeprefix('torch.')}: take the LoRA in floating point")
    if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1 or not down.shape[0]:
        raise ModelError(
            f"{path}: the halves for {where} have shapes {tuple(down.shape)} and {tuple(up.shape)}, and should share a rank, as "
            "(r, in) and (out, r) do"
        )
    if lengths is not None and (lengths.numel() != up.shape[0] or lengths.dtype not in WIDE):
        raise ModelError(f"{path}: {MAGNITUDE} of {where} is {tuple(lengths.shape)} numbers, and its weight has {up.shape[0]} rows")
    if lengths is not None:
        lengths = Streamed(values(lengths).flatten, torch.Size([up.shape[0]]), lengths.dtype)  # of a convolution (1, out, 1, 1)
    return Pair(key, down, up, bias, 1.0, lengths)


def _rows(stored: Tensor, parts: tuple[slice, ...]) -> Tensor:
    """Rows of a tensor that stays on disk."""
    count = sum(part.stop - part.start for part in parts)
    shape = torch.Size([count, *stored.shape[1:]])
    return Streamed(lambda: torch.cat([values(stored)[part] for part in parts]), shape, stored.dtype)


def _config(path: Path, peft: bool, public: bool) -> dict[str, dict[str, Any]]:
    """PEFT's config by component: from the header, where diffusers writes it, or the file beside a file of PEFT's names; empty without.

    Raises: ModelError for a config that is none, and for names of PEFT's without the file that tells their alpha, but before `public` names
        of a model's code: trainers who write those alone mean alpha = r.
    """
    with reading(path) as opened:
        text = (opened.metadata() or {}).get(HEADER)
    if text is not None:
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError):
            flat = None
        if not isinstance(flat, dict):
            raise ModelError(f"{path}: its header's {HEADER} is no JSON object: save it again in diffusers")
        config: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
            config.setdefault(PREFIXES.get(prefix, TRANSFORMER), {})[name.removeprefix(prefix)] = value
        return config
    if peft and (path.parent / CONFIG).is_file():
        return {TRANSFORMER: read_json(path.parent / CONFIG)}
    if peft and not public:
        raise ModelError(f"{path} has PEFT's names ({PEFT}...), whose alpha {CONFIG} tells, and there is none beside it: copy it there")
    return {}


def _factor(path: Path, config: Mapping[str, Any], module: str, pair: Pair) -> float:
    """alpha / r of a module by PEFT's config, or alpha / sqrt(r) where it says rslora (Kalajdzievski 2023, arXiv 2312.03732)."""
    patterns, rank = config.get("alpha_pattern") or {}, pair.down.shape[0]
    alpha = config.get("lora_alpha", rank)
    if bool(config.get("use_dora")) != (pair.lengths is not None):
        says = f"is a DoRA (use_dora) and has no {MAGNITUDE}" if pair.lengths is None else f"has {MAGNITUDE} and is no DoRA (use_dora)"
        raise ModelError(f"{path}, as its config has it, {says} of {module}: which is meant?")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.]+", name):
            raise ModelError(f"{path}: alpha_pattern has {pattern!r}, which is no name of a module; patterns are not read here")
        if module == name or (module.endswith(f".{name}") and not pattern.startswith("^")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{path}: alpha of {module} is a number, got {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def changes(adapters: tuple[Adapter, ...], component: str, module: nn.Module, naming: Naming, what: str) -> dict[str, Change]:
    """What adapters make of the weights of a component, by name in the state of its `module`, which is a `what`: float32 in and out.

    Raises: ModelError naming keys of modules that there are not, and halves whose shapes are not the weight's.
    """
    state = module.state_dict()
    made: dict[str, Change] = {}
    for adapter in adapters:
        pairs: dict[str, Pair] = {}
        for name, pair in _placed(adapter.parts.get(component, {}), state, naming, what):
            if name in pairs:
                raise ModelError(f"{adapter.path} has {pairs[name].key} and {pair.key}, which both change {name}: which one is meant?")
            pairs[name] = pair
        if lost := [name for name in pairs if name not in state]:
            raise ModelError(_stranger(adapter, pairs[lost[0]], lost, state, what))
        for name, pair in pairs.items():
            shape, bias = tuple(state[name].shape), f"{name.removesuffix('weight')}bias"
            if (pair.up.shape[0], *pair.down.shape[1:]) != shape:
                raise ModelError(
                    f"{adapter.path}: {pair.key} and its other half, {tuple(pair.down.shape)} and {tuple(pair.up.shape)}, do not make a "
                    f"change of {name}, which has shape {shape} in {what}: it is a LoRA of another model"
                )
            made[name] = partial(_changed, made.get(name), pair, adapter.path)
            if pair.bias is not None:
                if bias not in state or pair.bias.shape != state[bias].shape:
                    has = tuple(state[bias].shape) if bias in state else "none"
                    raise ModelError(f"{adapter.path} has a bias of shape {tuple(pair.bias.shape)} for {bias}, and {what} has {has}")
                made[bias] = partial(_shifted, made.get(bias), pair)
    return made


def _placed(parts: Mapping[str, Pair], state: Mapping[str, Tensor], naming: Naming, what: str) -> Iterator[tuple[str, Pair]]:
    """Each pair by the name of the weight that it changes, in parts where the file has several modules as one; unknown ones as they are."""
    known = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    for module, pair in parts.items():
        name = naming.rename(f"{module}.weight")
        places = [naming.rename(f"{each}.weight") for each in kohya.modules(what, module, known)] if name not in state else []
        counts = [state[place].shape[0] if place in state else 0 for place in places]
        if not all(counts) or sum(counts) != pair.up.shape[0]:
            yield places[0] if len(places) == 1 else name, pair
            continue
        if module.replace(".", "_") == kohya.SWAPPED:
            pair = pair.rows(slice(counts[0] // 2, counts[0]), slice(0, counts[0] // 2))
        for place, start, count in zip(places, accumulate([0, *counts]), counts, strict=False):
            yield place, pair if len(places) == 1 else pair.rows(slice(start, start + count))


def _stranger(adapter: Adapter, pair: Pair, lost: list[str], state: Mapping[str, Tensor], what: str) -> str:
    """What is said of modules that the model does not have."""
    modules = [name.removesuffix(".weight") for name, value in state.items() if name.endswith(".weight") and value.dim() > 1]
    names = [name.removesuffix(".weight") for name in lost]
    if pair.key.startswith(tuple(kohya.PREFIXES)) and what not in kohya.CLASSES:
        of = ", ".join(kohya.CLASSES.values())
        return (
            f"{adapter.path} has {pair.key}, a name of kohya's, and of {what} those are not read, but of {of}: save it by diffusers' names"
        )
    near = difflib.get_close_matches(names[0], modules, n=3, cutoff=0.0)
    return (
        f"{adapter.path} has {pair.key}, and {what} has no {few(names)}; it has {', '.join(near)} and others: it is a LoRA of another model"
    )


def _changed(before: Change | None, pair: Pair, path: Path, weight: Tensor) -> Tensor:
    weight = before(weight) if before else weight
    up, down = values(pair.up).float().flatten(1), values(pair.down).float().flatten(1)
    made = (up @ down).mul_(pair.factor).view(weight.shape).add_(weight)
    if pair.lengths is not None:
        rows = made.view(len(made), -1)  # the same values
        rows.mul_((values(pair.lengths).float().flatten() / rows.norm(dim=1))[:, None])
    if not made.isfinite().all():
        raise ModelError(f"{path}: {pair.key} makes a change that is not finite: its training diverged, or the file is damaged")
    return made


def _shifted(before: Change | None, pair: Pair, bias: Tensor) -> Tensor:
    assert pair.bias is not None
    return (before(bias) if before else bias) + pair.factor * values(pair.bias).float()
