"""The judges of the trained samples: small CNNs that name a digit and give the features for a Frechet distance.

    python samples/classifier.py --output samples/classifier.safetensors
    python samples/classifier.py --side 64 --output samples/classifier-64.safetensors

One looks at digits of 32x32 pixels, the other at the glyphs of 64x64 that are made of them. They learn from the 1,500 `held_out`
digits, which no generator has seen, shifted, turned, scaled and sheared at random; their accuracy is counted on the 3,500 `train`
digits, which they have never seen.
"""

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from digits import Digits, load_digits
from record import machine

# Side of the pictures in pixels -> the trained weights
WEIGHTS = {32: Path(__file__).with_name("classifier.safetensors"), 64: Path(__file__).with_name("classifier-64.safetensors")}
CLASSES, FEATURES = 10, 64


class Judge(nn.Module):
    """`(B, 1, side, side) in [-1, 1]` -> features (B, 64) and logits (B, 10); `side` is 32 or 64, four pixels are left of it."""

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        widths = (1, 32, 64, 64) if side == 32 else (1, 16, 32, 64, 64)
        self.stages = nn.Sequential(*(self._stage(a, b) for a, b in pairwise(widths)))
        self.features = nn.Linear(64 * 4 * 4, FEATURES)
        self.classes = nn.Linear(FEATURES, CLASSES)
        self.dropout = nn.Dropout(0.3)

    @staticmethod
    def _stage(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stages(images).flatten(1)  # (B, 1024)
        features = F.relu(self.features(self.dropout(x)))  # (B, 64)
        return features, self.classes(self.dropout(features))  # (B, 10)

    @torch.no_grad()
    def judge(self, images: np.ndarray, batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
        """Features float64 (N, 64) and labels (N,) of images (N, 1, side, side) in [-1, 1]."""
        parts = [self(part) for part in torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).split(batch)]
        features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return features.double().numpy(), logits.argmax(1).numpy()


def load_judge(side: int = 32, path: Path | None = None) -> Judge:
    """The trained judge of pictures of `side` pixels, ready to use; `path` in place of the committed weights."""
    path = path or WEIGHTS[side]
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SystemExit(
            f"cannot read the judge's weights {path} ({error}): train it with samples/classifier.py --side {side} --output {path}"
        ) from None
    model = Judge(side)
    model.load_state_dict(state)
    return model.eval()


def augment(images: Tensor) -> Tensor:
    """Each image under its own small affine map: shift to 8 percent of the side, turn to 15 degrees, scale and shear to 15 percent."""
    count = len(images)
    angle, shear = ((torch.rand(2, count) * 2 - 1) * torch.tensor([[math.radians(15)], [0.15]])).unbind()
    shift = (torch.rand(count, 2, 1) * 2 - 1) * 2 * 2.5 / 32
    scale = (1 + (torch.rand(count, 2) * 2 - 1) * 0.15)[:, None]  # (B, 1, 2)
    turn = torch.stack([angle.cos(), -angle.sin() + shear, angle.sin(), angle.cos()], dim=1).view(count, 2, 2) * scale
    grid = F.affine_grid(torch.cat([turn, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # black, which is -1, comes in from outside


def accuracy(model: Judge, digits: Digits) -> float:
    """Share of `digits` that are named right."""
    return float((model.judge(digits.images)[1] == digits.labels).mean())


def fit(held_out: Digits, epochs: int, seed: int, batch: int = 50) -> Judge:
    """A judge trained on `held_out`."""
    torch.manual_seed(seed)
    model = Judge(held_out.images.shape[-1])
    images, labels = torch.from_numpy(held_out.images), torch.from_numpy(held_out.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(range(0, len(images), batch)))
    for epoch in range(epochs):
        model.train()
        losses = []
        for rows in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(augment(images[rows]))[1], labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1} of {epochs}: loss {np.mean(losses):.4f}", flush=True)
    return model.eval()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, required=True, help="safetensors file for the weights")
    options.add_argument("--side", type=int, choices=sorted(WEIGHTS), default=32, help="of the pictures in pixels (default: %(default)s)")
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    train, held_out = load_digits(given.side)
    start = time.perf_counter()
    trained = fit(held_out, given.epochs, given.seed)
    seconds = time.perf_counter() - start
    right = accuracy(trained, train)
    facts = {"accuracy": f"{right:.4f}", "seconds": f"{seconds:.0f}", "threads": str(given.threads), "machine": machine()}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, given.output, facts)
    print(f"{right:.2%} of the {len(train.labels)} digits it never saw, after {seconds:.0f} s on {given.threads} of a {facts['machine']}")
    print(f"wrote {given.output} ({given.output.stat().st_size / 1e6:.2f} MB)")
