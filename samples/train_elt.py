"""Train a looped transformer, ELT, on digits (some 0.3 s of one CPU core a step of 32).

    python samples/train_elt.py --run runs/elt-mnist --output elt-mnist.safetensors
    python samples/train_elt.py --run runs/looped --output looped.safetensors --no-ilsd

The recipe of arXiv 2604.09168: the network of all loops teaches its own prefix of a random number of loops, both from one
forward pass, and the prefix moves from the data to its teacher as training goes on. With `--no-ilsd` it is an ordinary looped
transformer, which only ever sees the loss of its last loop.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic_export.families.elt import FAMILY, Elt, EltParams
from elastic_runtime.contract.schedule import ShiftedCosine
from training import Loss, drop_labels, parser, train

PARAMS = EltParams(
    input_size=32, patch_size=4, in_channels=1, hidden_size=128, num_heads=4, num_classes=10, unique_blocks=2, loops=6, max_loops=8,
)  # fmt: skip


def ilsd(
    exits: Callable[[Sequence[int]], list[Tensor]],
    loops: int,
    progress: float,
    truth: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Intra-loop self-distillation: `truth(teacher) + w * truth(student) + (1-w) * distance(student, teacher)`, w falling from 1 to 0.

    `exits(counts)` gives the outputs after each count of loops; the student's count is uniform in 1 to `loops`.
    """
    student, teacher = exits([int(torch.randint(1, loops + 1, ())), loops])
    return truth(teacher) + (1 - progress) * truth(student) + progress * distance(student, teacher.detach())


def noised(images: Tensor, schedule: ShiftedCosine) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, their times (B,) and the `v` to predict.

    The sigmoid weight of arXiv 2303.00848 with bias 0, sigmoid(-logsnr) on the error of the noise, is sigmoid(logsnr) *
    sigmoid(-logsnr) on that of v: the logistic density. So log signal-to-noise ratios are drawn from it, and v's error needs no weight.
    """
    uniform = torch.rand(len(images)).clamp(1e-4, 1 - 1e-4)
    logsnr = torch.log(uniform) - torch.log1p(-uniform)
    time = torch.atan(torch.exp((schedule.shift - logsnr) / 2)) * 2 / math.pi
    alpha, sigma = (torch.sigmoid(sign * logsnr).sqrt()[:, None, None, None] for sign in (1, -1))
    noise = torch.randn_like(images)
    return alpha * images + sigma * noise, time, alpha * noise - sigma * images


def recipe(self_distilled: bool) -> Loss:
    """The loss of a step, with or without self-distillation."""
    schedule = ShiftedCosine.at(PARAMS.input_size)

    def loss(model: Any, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        sample, time, v = noised(images, schedule)
        classes = drop_labels(labels, PARAMS.num_classes)

        def exits(counts: Sequence[int]) -> list[Tensor]:
            with sdpa_kernel(SDPBackend.MATH):  # for 64 tokens on a CPU, the flash kernel's backward pass is the slower one
                return model.exits(sample, time, classes, counts)

        def distance(output: Tensor, wanted: Tensor) -> Tensor:
            return (output - wanted).square().mean()

        if not self_distilled:
            return distance(exits([PARAMS.loops])[0], v)
        return ilsd(exits, PARAMS.loops, progress, lambda output: distance(output, v), distance)

    return loss


def read(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as given, without what a recipe of prefixes cannot do."""
    given = options.parse_args()
    if given.compile:
        options.error("--compile compiles forward, and this recipe trains on the outputs of several loops: leave it out")
    return given


if __name__ == "__main__":
    options = parser(__doc__ or "", steps=4000)
    options.add_argument("--no-ilsd", action="store_true", help="an ordinary looped transformer, for comparison")
    given = read(options)
    train(lambda: Elt(PARAMS), recipe(not given.no_ilsd), given, {"family": FAMILY.name, "config": asdict(PARAMS)})
