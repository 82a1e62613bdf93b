"""What may stand as MODEL, in rows: packaged samples and presets, with their axes and cost."""

from pathlib import Path
from typing import Any

import torch

from elastic_export.capture import elit
from elastic_export.capture.folders import FAMILIES as FOLDERS
from elastic_export.capture.folders import listed_vae, picture_sizes
from elastic_export.capture.zoo import FAMILIES, locate, samples
from elastic_export.families import tokens
from elastic_export.families.elit import qwen_image as elit_qwen_image
from elastic_export.families.elit.interface import latents_axis
from elastic_export.families.family import Family
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.reading import read_json
from elastic_runtime.contract.budget import Budget


def catalogue() -> list[dict[str, Any]]:
    """One row for each packaged sample and preset: its axes, parameters, and GFLOPs at its smallest and largest budget."""
    cards = {name: read_json(path) for name, path in samples().items()}
    rows = []
    for name, card in cards.items():
        if folder := locate(name):
            rows.append(_folder_row(name, folder))
        else:
            family = FAMILIES[card["family"]]
            rows.append(_row(name, family, family.params(**card["config"]), "packaged"))
    presets = [(name, family, params) for family in FAMILIES.values() for name, params in family.presets.items()]
    return rows + [_row(name, family, params, "--checkpoint") for name, family, params in presets]


def _row(name: str, family: Family, params: Any, weights: str) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in family.build(params).parameters())
    axes = family.axes(params)
    ends = [Budget(**{axis.name: value(axis) for axis in axes}) for value in (lambda axis: axis.min, lambda axis: axis.max)]
    return {
        "name": name,
        "family": family.name,
        "weights": weights,
        "axes": ", ".join(f"{axis.name} {axis.span}" for axis in axes) or "none",
        "gflops": [family.cost(params, end, parameters).flops / 1e9 for end in ends],
        "parameters": parameters,
    }


def _folder_row(name: str, path: Path) -> dict[str, Any]:
    """The row of a packaged diffusers folder, which needs no diffusers: as it is exported where nothing else is asked for."""
    folder = Folder.open(path)
    config = folder.component("transformer").config
    family = FOLDERS[config["_class_name"]]
    sizes = picture_sizes(folder, family, config, listed_vae(folder, family.channels(config)), None)
    text, parameters = 1 if folder.labels else family.beside + family.text_length(config), folder.component("transformer").parameters()
    if elit.is_elit(path):
        params = elit.at_usual(path, config, sizes.latent.max)
        kind, axis, parameters = elit_qwen_image.NAME, latents_axis(params.windows), parameters + elit.parameters(path)
        ends = [elit_qwen_image.flops(params, count, text) for count in (axis.min, axis.max)]
    else:
        kind, axis = family.name, tokens.axis(sizes.tokens, family.patches(config))
        ends = [family.flops(config, count, text) for count in (axis.min, axis.max)]
    return {
        "name": name,
        "family": kind,
        "weights": "packaged",
        "axes": f"{axis.name} {axis.span}",
        "gflops": [flops / 1e9 for flops in ends],
        "parameters": parameters,
    }
