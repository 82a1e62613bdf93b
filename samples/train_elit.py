"""Train the packaged sample `elit-mnist` (about an hour on two CPU cores), or an ELIT on another backbone.

    python samples/train_elit.py --run runs/elit-mnist --output elit-mnist.safetensors
    python samples/train_elit.py --run runs/elit-uvit-mnist --output elit-uvit-mnist.safetensors --backbone uvit
    python samples/train_elit.py --run runs/elit-hdit-mnist --output elit-hdit-mnist.safetensors --backbone hdit

The recipe of arXiv 2603.12245: rectified flow with logit-normal times, label dropout 0.1, and tail drop with the number
of kept latents drawn uniformly for each step, so that every prefix of the latents learns to carry the picture.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from elastic_export.families.elit import hdit, sit, uvit
from elastic_export.families.elit.backbone import ElitParams
from training import drop_labels, parser, train

PARAMS = ElitParams(
    input_size=32, patch_size=2, in_channels=1, hidden_size=128, depth=6, num_heads=4,
    num_classes=10, group_size=4, head_blocks=1, tail_blocks=1, latent_positions=256,
)  # fmt: skip
# Narrower, so that with its inner blocks of twice the width it has as many parameters as the others.
NARROW = asdict(PARAMS) | {"hidden_size": 96, "num_heads": 3, "merge_block": 2, "split_block": 4}
BACKBONES = {
    "sit": (sit.FAMILY, PARAMS),
    "uvit": (uvit.FAMILY, uvit.ElitUvitParams(**asdict(PARAMS))),
    "hdit": (hdit.FAMILY, hdit.ElitHditParams(**NARROW)),
}


def flow_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """Velocity loss on the line `x_t = (1-t) x_0 + t eps`, v = eps - x_0."""
    noise = torch.randn_like(images)
    timestep = torch.sigmoid(torch.randn(len(images)))
    t = timestep[:, None, None, None]
    kept = int(torch.randint(1, PARAMS.group_latents + 1, ()))
    velocity = model((1 - t) * images + t * noise, timestep, drop_labels(labels, PARAMS.num_classes), torch.arange(kept))
    return (velocity - (noise - images)).square().mean()


if __name__ == "__main__":
    options = parser(__doc__ or "", steps=2400)
    options.add_argument("--backbone", choices=BACKBONES, default="sit")
    given = options.parse_args()
    family, params = BACKBONES[given.backbone]
    train(lambda: family.build(params), flow_loss, given, {"family": family.name, "config": asdict(params)})
