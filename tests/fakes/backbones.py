"""Recorded models of the plain public backbones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def changed(weights: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`weights` with tensors of the shapes in `changes` added or put in place, and without those that are None there."""
    import torch

    kept = {name: value for name, value in weights.items() if changes.get(name, ()) is not None}
    return kept | {name: torch.zeros(shape) for name, shape in changes.items() if shape}


@dataclass(frozen=True)
class Backbone:
    """What `--checkpoint` and `--config` are given, what the public code answered to `feeds`, and its own count of multiply-adds."""

    family: str
    checkpoint: Path
    config: Path
    feeds: dict[str, Any]
    output: np.ndarray
    macs: int | None

    @classmethod
    def read(cls, golden: Path, name: str, folder: Path) -> "Backbone":
        """The one of that name; `folder` gets its config without what is no size."""
        fields = json.loads((golden / f"{name}.json").read_text())
        macs = fields.pop("macs_by_their_counter", None)
        config = folder / f"{name}.json"
        config.write_text(json.dumps(fields))
        with np.load(golden / f"{name}.io.npz") as recording:
            arrays = dict(recording)
        words = {"x": "sample", "t": "timestep", "sigma": "timestep", "y": "class_labels"}
        feeds = {word: arrays[key] for key, word in words.items() if key in arrays}
        return cls(fields["family"], golden / f"{name}.pt", config, feeds, arrays["out"], macs)

    def error(self, output: np.ndarray) -> float:
        """Largest difference to the recorded output, of the largest value (at least 1)."""
        return float(np.abs(output - self.output).max() / max(1.0, np.abs(self.output).max()))
