"""Train the masked form of ELT on digits (some 0.7 s of one CPU core a step of 32).

    python samples/train_elt_masked.py --run runs/elt-mnist-masked --output elt-mnist-masked.safetensors

Digits halved to 14 x 14 pixels of 16 grey levels, each pixel a token. A random share of them, cos(pi/2 u) for uniform u, is masked
and the network names those (MaskGIT, arXiv 2202.04200), with the self-distillation of arXiv 2604.09168 between loops.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digits import halved
from elastic_export.families.elt_masked import FAMILY, EltMasked, EltMaskedParams
from train_elt import ilsd, read
from training import drop_labels, parser, train

PARAMS = EltMaskedParams(
    grid=14, vocabulary=16, hidden_size=128, num_heads=4, num_classes=10, unique_blocks=2, loops=4, max_loops=6,
    token_kind="grey",
)  # fmt: skip


def masked_loss(model: Any, images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """Cross-entropy on the masked tokens, to the data and from student to teacher."""
    wanted = torch.from_numpy(halved(images.numpy(), PARAMS.vocabulary)).flatten(1)  # (B, 196)
    share = torch.cos(math.pi / 2 * torch.rand(len(images), 1))
    hidden = torch.rand(wanted.shape) < share.clamp(min=1.5 / wanted.shape[1])
    tokens = torch.where(hidden, PARAMS.vocabulary, wanted)
    classes = drop_labels(labels, PARAMS.num_classes)

    def exits(counts: Sequence[int]) -> list[Tensor]:
        return [logits[hidden] for logits in model.exits(tokens, classes, counts)]

    def truth(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, wanted[hidden])

    return ilsd(exits, PARAMS.loops, progress, truth, lambda student, teacher: F.cross_entropy(student, teacher.softmax(-1)))


if __name__ == "__main__":
    about = {"family": FAMILY.name, "config": asdict(PARAMS)}
    train(lambda: EltMasked(PARAMS), masked_loss, read(parser(__doc__ or "", steps=4000)), about)
