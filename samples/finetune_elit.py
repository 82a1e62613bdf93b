"""From a plain checkpoint to one with budgets, on the digits: train a plain HDiT, put ELIT in, and train on.

    python samples/finetune_elit.py --run runs/hdit-mnist --output hdit-mnist.safetensors
    python samples/finetune_elit.py --run runs/finetuned --output finetuned.safetensors --plain hdit-mnist.safetensors --steps 600
    python samples/finetune_elit.py --run runs/scratch --output scratch.safetensors --from-scratch
    elastic-export onnx elit-hdit-levels --checkpoint finetuned.safetensors --config finetuned.config.json -o finetuned

With `--plain` it is what arXiv 2603.12245 does of Qwen-Image: the model's own loss and 20 times the distance to what the plain model
predicts, with the number of kept latents drawn uniformly for each step. `elastic_export.elasticize` tells where that begins.
`--from-scratch` trains the same model without a plain one, to compare with.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import elastic_export
from elastic_export.families.elit import hdit_levels
from elastic_export.families.hdit import model as hdit
from training import Loss, drop_labels, parser, train

PLAIN = hdit.HditParams(
    input_channels=1, input_size=(32, 32), patch_size=(2, 2), depths=(1, 6), widths=(32, 96), d_ffs=(64, 192),
    self_attns=({"type": "shifted-window", "d_head": 16, "window_size": 4}, {"type": "global", "d_head": 32}),
    mapping_depth=1, mapping_width=96, mapping_d_ff=192, num_classes=10, sigma_data=0.6, sigma_min=0.02, sigma_max=20.0,
)  # fmt: skip
SPLIT = {"group_size": 4, "head_blocks": 1, "tail_blocks": 1}
DISTILLATION = 20.0
LEVELS = -0.5, 1.5  # mean and deviation of the logarithm of sigma while training


def noised(images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A denoiser's inputs at random levels of noise, and the F that it should answer: the picture is `c_skip x + c_out F`."""
    mean, deviation = LEVELS
    sigma = (mean + deviation * torch.randn(len(images))).exp()
    skip, out, scale = torch.tensor([PLAIN.schedule.preconditioning(float(each)) for each in sigma]).T[:, :, None, None, None]
    x = images + sigma[:, None, None, None] * torch.randn_like(images)
    given = {"sample": scale * x, "timestep": sigma, "class_labels": drop_labels(labels, PLAIN.num_classes)}
    return given, (images - skip * x) / out


def plain_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """The plain model's: EDM's, the error of the picture by its own deviation at each level of noise."""
    given, wanted = noised(images, labels)
    return (model(**given) - wanted).square().mean()


def elastic_loss(places: int, teacher: nn.Module | None = None) -> Loss:
    """The same at a random number of kept latents, and `DISTILLATION` times the distance to what `teacher` predicts where there is one."""

    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor, progress: float) -> Tensor:
        given, wanted = noised(images, labels)
        kept = int(torch.randint(1, places + 1, ()))
        predicted = model(**given, latent_ids=torch.arange(kept))
        error = (predicted - wanted).square().mean()
        if teacher is None:
            return error
        with torch.no_grad():
            taught = teacher(**given)
        return error + DISTILLATION * (predicted - taught).square().mean()

    return loss


def plain(options: argparse.Namespace, data: Any = None) -> nn.Module:
    """Train the plain HDiT."""
    about = {"family": "hdit", "config": _fields(PLAIN)}
    return train(lambda: hdit.Hdit(PLAIN), plain_loss, options, about, data)


def elastic(options: argparse.Namespace, data: Any = None) -> nn.Module:
    """Put ELIT into the plain checkpoint `options.plain` and train on; without one, train the same model from scratch.

    The weights go to `options.output` under the public keys, which a checkpoint has, and their config beside them.
    """
    fields = _fields(PLAIN) | SPLIT
    teacher, begun = None, {}
    if options.plain:
        options.run.mkdir(parents=True, exist_ok=True)
        config = options.run / "plain.json"
        config.write_text(json.dumps(_fields(PLAIN)), encoding="utf-8")
        made = elastic_export.elasticize(
            options.plain, output=options.run / "begun.safetensors", config=config, seed=options.seed, overwrite=True, **SPLIT
        )
        fields = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
        begun = {str(hdit_levels.rename_key(key)): value.float() for key, value in load_file(made).items()}
        teacher = hdit.Hdit(PLAIN).eval().requires_grad_(False)
        teacher.load_state_dict({name: value.float() for name, value in load_file(options.plain).items()})
    params = hdit_levels.ElitHditLevelsParams(**{name: value for name, value in fields.items() if name != "family"})

    def build() -> nn.Module:
        module = hdit_levels.ElitHditLevels(params)
        if begun:
            module.load_state_dict(begun)
        return module

    about = {"family": "elit-hdit-levels", "config": _fields(params)}
    trained = train(build, elastic_loss(params.windows.places, teacher), options, about, data)
    if options.output:
        weights = load_file(options.output)
        save_file({name.removeprefix("hdit."): value for name, value in weights.items()}, options.output)
        written = {"family": "elit-hdit-levels"} | fields
        options.output.with_suffix(".config.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    return trained


def _fields(params: Any) -> dict[str, Any]:
    return dict(vars(params))


if __name__ == "__main__":
    options = parser(__doc__ or "", steps=2400)
    begin = options.add_mutually_exclusive_group()
    begin.add_argument("--plain", type=Path, help="a plain checkpoint that this wrote: put ELIT in and train on")
    begin.add_argument("--from-scratch", action="store_true", help="train the model with ELIT in it from the first step")
    given = options.parse_args()
    (elastic if given.plain or given.from_scratch else plain)(given)
