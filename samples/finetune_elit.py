"""From a plain checkpoint to one with budgets, on the digits: train a plain U-ViT, put ELIT in, and train on.

    python samples/finetune_elit.py --run runs/uvit-mnist --output uvit-mnist.safetensors
    python samples/finetune_elit.py --run runs/finetuned --output finetuned.safetensors --plain uvit-mnist.safetensors --steps 600
    python samples/finetune_elit.py --run runs/scratch --output scratch.safetensors --from-scratch
    elastic-export onnx elit-uvit-tokens --checkpoint finetuned.safetensors --config finetuned.config.json -o finetuned

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
from elastic_export.families import uvit
from elastic_export.families.elit import uvit_tokens
from elastic_runtime.contract.schedule import VpSde
from training import Loss, drop_labels, parser, train

PLAIN = uvit.UVitParams(
    img_size=32, patch_size=2, in_chans=1, embed_dim=64, depth=6, num_heads=2, num_classes=11, schedule="vpsde"
)  # fmt: skip
SPLIT = {"group_size": 4, "head_blocks": 1, "tail_blocks": 1}
DISTILLATION = 20.0
NULL = PLAIN.num_classes - 1  # the last row of its labels


def noised(images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A denoiser's inputs at random times of the SDE, and the noise that it should find in them."""
    schedule, noise = VpSde(), torch.randn_like(images)
    times = schedule.noise * (1e-3 + (1 - 1e-3) * torch.rand(len(images)))
    alpha, sigma = torch.tensor([schedule.alpha_sigma(float(time)) for time in times], dtype=torch.float32).T[:, :, None, None, None]
    sample = alpha * images + sigma * noise
    return {"sample": sample, "timestep": times, "class_labels": drop_labels(labels, NULL)}, noise


def noise_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """The plain model's: the error of the noise that it predicts."""
    given, noise = noised(images, labels)
    return (model(**given) - noise).square().mean()


def elastic_loss(places: int, teacher: nn.Module | None = None) -> Loss:
    """The same at a random number of kept latents, and `DISTILLATION` times the distance to what `teacher` predicts where there is one."""

    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor, progress: float) -> Tensor:
        given, noise = noised(images, labels)
        kept = int(torch.randint(1, places + 1, ()))
        predicted = model(**given, latent_ids=torch.arange(kept))
        error = (predicted - noise).square().mean()
        if teacher is None:
            return error
        with torch.no_grad():
            wanted = teacher(**given)
        return error + DISTILLATION * (predicted - wanted).square().mean()

    return loss


def plain(options: argparse.Namespace, data: Any = None) -> nn.Module:
    """Train the plain U-ViT."""
    about = {"family": "uvit", "config": _fields(PLAIN)}
    return train(lambda: uvit.UVit(PLAIN), noise_loss, options, about, data)


def elastic(options: argparse.Namespace, data: Any = None) -> nn.Module:
    """Put ELIT into the plain checkpoint `options.plain` and train on; without one, train the same model from scratch.

    The weights go to `options.output` under the public keys, which a checkpoint has, and their config beside them.
    """
    fields = _fields(PLAIN) | SPLIT | {"latent_positions": PLAIN.grid**2}
    teacher, begun = None, {}
    if options.plain:
        options.run.mkdir(parents=True, exist_ok=True)
        config = options.run / "plain.json"
        config.write_text(json.dumps(_fields(PLAIN)), encoding="utf-8")
        made = elastic_export.elasticize(
            options.plain, output=options.run / "begun.safetensors", config=config, seed=options.seed, overwrite=True, **SPLIT
        )
        fields = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
        begun = {str(uvit_tokens.rename_key(key)): value.float() for key, value in load_file(made).items()}
        teacher = uvit.UVit(PLAIN).eval().requires_grad_(False)
        teacher.load_state_dict({name: value.float() for name, value in load_file(options.plain).items()})
    params = uvit_tokens.ElitUvitTokensParams(**{name: value for name, value in fields.items() if name != "family"})

    def build() -> nn.Module:
        module = uvit_tokens.ElitUvitTokens(params)
        if begun:
            module.load_state_dict(begun)
        return module

    about = {"family": "elit-uvit-tokens", "config": _fields(params)}
    trained = train(build, elastic_loss(params.windows.places, teacher), options, about, data)
    if options.output:
        weights = load_file(options.output)
        save_file({name.removeprefix("uvit."): value for name, value in weights.items()}, options.output)
        written = {"family": "elit-uvit-tokens"} | fields
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
