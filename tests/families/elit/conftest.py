"""Golden models of each backbone, and a way to run them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the zoo needs torch")

import torch

from elastic_export.capture.zoo import Model, Request, load

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def model(golden: Path) -> Callable[[str], Model]:
    """The golden model `a`, `uvit-a`, ..., loaded once."""

    @cache
    def find(name: str) -> Model:
        config = golden / f"elit-{name}.json"
        return load(Request(json.loads(config.read_text())["family"], config.with_suffix(".pt"), config))

    return find


@pytest.fixture(scope="session")
def recorded(golden: Path) -> Callable[[str], Arrays]:
    """Its recorded inputs and outputs."""

    @cache
    def find(name: str) -> Arrays:
        with np.load(golden / f"elit-{name}.io.npz") as arrays:
            return dict(arrays)

    return find


@pytest.fixture(scope="session")
def feeds(recorded: Callable[[str], Arrays]) -> Callable[[str, int], Arrays]:
    """Its recorded inputs, with so many latents kept a group."""

    def find(name: str, kept: int) -> Arrays:
        arrays = recorded(name)
        timestep = arrays["t" if "t" in arrays else "sigma"]
        return {"sample": arrays["x"], "timestep": timestep, "class_labels": arrays["y"], "latent_ids": np.arange(kept)}

    return find


@pytest.fixture(scope="session")
def forward() -> Callable[[Any, Arrays], np.ndarray]:
    """Run a module in torch."""

    def run(module: Any, arrays: Arrays) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        return result

    return run
