"""ELIT put into a plain checkpoint: new Read and Write beside weights that stay as they are, for training to go on from."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from elastic_export.capture import elit as elit_folder
from elastic_export.capture.zoo import FAMILIES
from elastic_export.families import qwen_image, uvit
from elastic_export.families.elit import backbone, interface
from elastic_export.families.elit.interface import InterfaceParams, Read, Write
from elastic_export.families.elit.qwen_image import ElitQwenParams
from elastic_export.families.elit.uvit import skip_linear
from elastic_export.families.family import agree
from elastic_export.families.hdit import model as hdit
from elastic_export.families.layers import initialize
from elastic_export.foreign.checkpoint import Checkpoint, load_weights, read_checkpoint
from elastic_export.foreign.component import diffusers_class
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.weights import few
from elastic_runtime.errors import ModelError, UsageError
from elastic_runtime.files.atomic import refuse_clobber
from elastic_runtime.files.atomic import save as save_file
from elastic_targets.weights import values


@dataclass(frozen=True)
class Plain:
    """A kind of plain checkpoint: a key that it alone has, the families that it may become, the usual one first, and its sources of sizes
    as `Family.sources`."""

    name: str
    mark: str
    families: tuple[str, ...]
    sources: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, dict[str, Any]]]


def _uvit(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A U-ViT's own sources, and a place for the latents of each patch."""
    (where, sizes), *_ = uvit.sources(weights, args).items()
    return {where: sizes | {"latent_positions": (sizes["img_size"] // sizes["patch_size"]) ** 2}}


KINDS = (
    Plain("SiT", "blocks.0.attn.qkv.weight", ("elit-sit", "elit-uvit"), backbone.plain_sources),
    Plain("U-ViT", "decoder_pred.weight", ("elit-uvit-tokens",), _uvit),
    Plain("HDiT", "patch_in.proj.weight", ("elit-hdit-levels",), hdit.sources),
)


def elasticize(
    model: Path, output: Path, split: Mapping[str, int], family: str | None, config: Path | None, seed: int, overwrite: bool
) -> Path:
    """See `elastic_export.elasticize`; `split` are group_size, head_blocks and tail_blocks."""
    if model.is_dir() and (model / "transformer").is_dir():
        if family not in (None, "elit-qwen-image") or config:
            raise UsageError(f"{model} is a diffusers folder, which becomes elit-qwen-image: leave family and config out")
        return _folder(model, output, split, seed)
    if output.suffix != ".safetensors":
        raise UsageError(f"the output of a checkpoint is a .safetensors file, beside which its config goes as .json; got {output}")
    for path in (output, output.with_suffix(".json")):
        refuse_clobber(path, overwrite, "output")
    return _checkpoint(read_checkpoint(model), output, split, family, config, seed)


def new(params: InterfaceParams, seed: int) -> dict[str, Tensor]:
    """Weights of a Read and Write that change nothing yet: Write adds nothing to the tokens that Read took, and they have no places of
    their own. Their names are the public ELIT's."""
    with torch.random.fork_rng(devices=[]):  # the caller's own noise goes on as it would
        torch.manual_seed(seed)
        read, write = Read(params), Write(params)
        parts = nn.ModuleDict({"read": read, "write": write})
        initialize(parts, zero=(read.modulation, write.attention.proj, write.mlp.fc2))
    for places in (read.pos_embed, write.pos_embed):
        if places is not None:
            nn.init.zeros_(places)
    return {interface.public(name): value.contiguous() for name, value in parts.state_dict().items()}


def _checkpoint(checkpoint: Checkpoint, output: Path, split: Mapping[str, int], name: str | None, config: Path | None, seed: int) -> Path:
    """Write the weights with a new interface, and the config that tells the rest."""
    weights = dict(checkpoint.weights)
    if any(interface.renamed(key).startswith(("read.", "write.")) for key in weights):
        raise ModelError(f"{checkpoint.path} has an interface (input_token_editor) already: export it as it is")
    kind = next((each for each in KINDS if each.mark in weights), None)
    if kind is None:
        known = ", ".join(f"{each.name} ({each.mark})" for each in KINDS)
        raise ModelError(f"{checkpoint.path} is no plain checkpoint that ELIT can be put into: there are {known}; it has {few(weights)}")
    if (name := name or kind.families[0]) not in kind.families:
        raise UsageError(f"{checkpoint.path} is a {kind.name}, which becomes {' or '.join(kind.families)}, not {name}")
    family = FAMILIES[name]
    sizes = read_json(config, "config") if config else {}
    sizes.pop("family", None)
    prediction = sizes.pop("prediction", None) if kind is KINDS[0] else None
    params = agree(family, kind.sources(weights, checkpoint.args) | {f"config {config}": sizes}, split)
    if kind is KINDS[0]:
        weights |= backbone.without_variance(weights, params)
    weights |= new(params.interface, seed)
    for index in getattr(params, "receivers", ()):
        weights |= {f"blocks.{index}.skip_linear.{each}": value for each, value in skip_linear(params.hidden_size).state_dict().items()}
    with torch.device("meta"):
        module = family.build(params)
    ignored = load_weights(module, family, Checkpoint(checkpoint.path, weights, {}))  # which names what does not fit
    if kind is KINDS[0] and backbone.from_noise(checkpoint.weights, checkpoint.args, params, prediction):
        weights |= backbone.turned(weights)
    held = {key: values(value).contiguous() for key, value in weights.items() if key not in ignored}
    save_file(output, save(held))
    save_file(output.with_suffix(".json"), json.dumps({"family": name} | asdict(params), indent=1).encode())
    return output


def _folder(path: Path, output: Path, split: Mapping[str, int], seed: int) -> Path:
    """Write the two files beside a transformer of Qwen-Image, there or in a copy of the folder."""
    folder = Folder.open(path)
    if elit_folder.is_elit(path):
        raise ModelError(f"{path / 'transformer'} has ELIT put in already ({elit_folder.CONFIG}): export the folder as it is")
    class_name = str(folder.component("transformer").config.get("_class_name"))
    if class_name != qwen_image.FAMILY.class_name:
        raise ModelError(f"{path / 'transformer'} is a {class_name}; of diffusers folders ELIT is put into {qwen_image.FAMILY.class_name}")
    built: Any = folder.component("transformer").build(diffusers_class(class_name))
    config = {key: value for key, value in built.config.items() if not key.startswith("_")}
    if why := qwen_image.refusal(config):
        raise ModelError(f"{path / 'transformer'} {why}")
    side = split["group_size"]
    try:  # of the smallest picture: the weights are those of any
        params = ElitQwenParams(config, side, side, **split)
    except ValueError as error:
        raise ModelError(f"elit-qwen-image: {error}") from None
    words = json.dumps(dict(split) | {"write_kv": elit_folder.WRITE_KV}, indent=1).encode()
    weights = save(new(params.interface, seed))

    def put(place: Path) -> None:
        save_file(place / "transformer" / elit_folder.WEIGHTS, weights)
        try:
            save_file(place / "transformer" / elit_folder.CONFIG, words)  # last: it is what makes the folder an ELIT's
        except BaseException:
            with contextlib.suppress(OSError):  # without which it is the folder that it was
                (place / "transformer" / elit_folder.WEIGHTS).unlink()
            raise

    if output.resolve() == path.resolve():
        put(path)
        return output
    if output.exists():
        raise UsageError(
            f"{output} exists, and a folder is never replaced: give a new one, which becomes a copy, or {path} itself, which gets two "
            "files more"
        )
    partial = output.with_name(f".{output.name}.{secrets.token_hex(8)}")
    try:  # a copy of gigabytes that was cut off is no folder to find later
        shutil.copytree(path, partial)
        put(partial)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output
