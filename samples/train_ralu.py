"""Train the packaged sample `ralu-digits`, a diffusers folder: first its autoencoder, then its transformer.

    python samples/train_ralu.py vae --run runs/ralu-vae --output ralu-digits --steps 1500 --batch 32
    python samples/train_ralu.py transformer --run runs/ralu --output ralu-digits --steps 9000 --batch 48

Digits at 64 and at 32 pixels, in the latent space of a small AutoencoderKL (4 channels, half the side), drawn by rectified flow in
FLUX's own class: the label is a one-hot pooled embedding, the text one token of zeros.

RALU (arXiv 2507.08422) needs no training over a large model, which has seen pictures of many sizes. A small one must be shown what
it will meet: each step takes the tokens of 32 px, those of 64 px, or the former with some of its patches grown to the latter's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from digits import Digits, glyphs, load_digits
from elastic_export.families.layers import initialize
from record import read, write
from training import parser, train

CLASSES, SIDE, LATENT_SIDE, PATCH = 10, 64, 32, 2
GRID = LATENT_SIDE // PATCH // 2  # of the tokens of 32 px; those of 64 px have twice as many rows
LOW = GRID**2
# Tokens of a step, so that a step of short sequences takes as long as one of long ones.
TOKENS = 3072
WEIGHTS = "diffusion_pytorch_model.safetensors"
# From the data's middle to the noise's: a large picture shows what it is through more noise (arXiv 2403.03206, section 5.3.2).
SHIFT = 2.0


def autoencoder() -> AutoencoderKL:
    """Half the side and 4 channels: as many values as grey pixels, but with a prior, so that noise on them means something."""
    return AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, sample_size=SIDE,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def transformer() -> FluxTransformer2DModel:
    """Six layers of 128: FLUX in small, with zero gates at the start (adaLN-Zero)."""
    model = FluxTransformer2DModel(
        in_channels=4 * PATCH**2, num_layers=1, num_single_layers=5, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=8, pooled_projection_dim=CLASSES, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    zero: list[nn.Module] = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    initialize(model, [*zero, *(block.norm.linear for block in model.single_transformer_blocks)])
    return model


def pictures_of(images: Tensor) -> Tensor:
    """Digits (B, 1, 32, 32) as grey pictures (B, 3, 64, 64)."""
    return glyphs(images).expand(-1, 3, -1, -1)


def vae_loss(model: Any, images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """Squared error, and a prior of a thousandth of a nat a value; half of the steps see a quarter of the pixels."""
    pictures = pictures_of(images[: len(images) // 2] if torch.rand(()) < 0.5 else images)
    if len(pictures) == len(images):
        pictures = F.avg_pool2d(pictures, 2)
    posterior = model.encode(pictures).latent_dist
    decoded = model.decode(posterior.sample()).sample
    return (decoded.float() - pictures).square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()


def packed(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h*w/4, C*4): patches in raster order, their values in the order (c, ph, pw)."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Digits (N, 1, 32, 32) as the unscaled latents' tokens of both sizes, those of 32 px first: (N, 64 + 256, 16)."""
    tokens = []
    for some in images.split(64):
        pictures = pictures_of(some)
        sizes = (F.avg_pool2d(pictures, 2), pictures)
        tokens.append(torch.cat([packed(vae.encode(each).latent_dist.mean) for each in sizes], dim=1))
    return torch.cat(tokens)


def raster(side: int, scale: float = 1.0) -> Tensor:
    """Positions (0, row, column) of a grid of tokens, float32 (side * side, 3)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros(side, side), rows, columns], dim=-1).flatten(0, 1) * scale


def grown(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the 64 + 256 tokens a mixed sequence has, and their positions in units of the low resolution.

    The patches of 32 px that did not grow come first, then for each parent (a boolean (64,)) its four children of 64 px.
    """
    children = LOW + torch.arange(4 * LOW).view(GRID, 2, GRID, 2).transpose(1, 2).reshape(LOW, 4)  # (64, 4)
    index = torch.cat([torch.arange(LOW)[~parents], children[parents].flatten()])
    places = torch.cat([raster(GRID), raster(2 * GRID, 0.5)])
    return index, places[index]


def sequence(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Draw which tokens a step sees, as `grown`: one of the two sizes, or a mixture of them.

    Of a mixture, the share that grows is up to two thirds; half of the time it is where the first picture changes most.
    """
    kind = torch.rand(())
    if kind < 0.25:
        return torch.arange(LOW), raster(GRID)
    if kind < 0.65:
        return torch.arange(LOW, 5 * LOW), raster(2 * GRID)
    count = int(torch.randint(1, LOW * 2 // 3, ()))
    detail = tokens[0, :LOW].var(dim=-1) if torch.rand(()) < 0.5 else torch.rand(LOW)
    parents = torch.zeros(LOW, dtype=torch.bool)
    parents[detail.topk(count).indices] = True
    return grown(parents)


def flow_loss(model: Callable[..., Any], tokens: Tensor, labels: Tensor, progress: float) -> Tensor:
    """Velocity loss on the line `x_t = (1 - sigma) x_0 + sigma eps`, v = eps - x_0; a tenth of the labels is dropped."""
    index, ids = sequence(tokens)
    rows = max(1, min(len(tokens), TOKENS // len(index)))
    clean, classes = tokens[:rows, index], F.one_hot(labels[:rows], CLASSES).float()
    noise, drawn = torch.randn_like(clean), torch.sigmoid(torch.randn(rows))
    sigma = SHIFT * drawn / (1 + (SHIFT - 1) * drawn)
    velocity = model(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
        encoder_hidden_states=torch.zeros(rows, 1, 8),
        pooled_projections=classes * (torch.rand(rows, 1) >= 0.1),
        timestep=sigma,
        img_ids=ids,
        txt_ids=torch.zeros(1, 3),
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


def configure(model: Any, folder: Path, **changes: Any) -> None:
    """Write a component's config.json, as diffusers reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.register_to_config(**changes)
    model.save_config(folder)


def taken(weights: Path) -> dict[str, Any]:
    """The record that training left beside a component's weights; it goes into the folder's own, ROOT.json, as packaged samples have."""
    path = weights.with_suffix(".json")
    record = read(path)
    path.unlink()
    return record


def train_vae(options: argparse.Namespace, data: Digits | None = None) -> AutoencoderKL:
    """Train the autoencoder and write `vae/`, with the scale and shift that give its latents mean 0 and deviation 1."""
    root, folder = options.output, options.output / "vae"
    options.output = folder / WEIGHTS
    vae = train(autoencoder, vae_loss, options, {}, data)
    write(root.with_suffix(".json"), {"autoencoder": taken(options.output)["training"]})
    images = torch.from_numpy((data or load_digits()[0]).images[:512])
    latents = encode(vae, images)
    configure(vae, folder, scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae


def train_transformer(options: argparse.Namespace, data: Digits | None = None) -> FluxTransformer2DModel:
    """Train the transformer on what `vae/` makes of the digits; write `transformer/`, the scheduler, model_index.json, and the record."""
    root = options.output
    if not (root / "vae" / WEIGHTS).is_file():
        raise SystemExit(f"{root} holds no trained vae: run `python samples/train_ralu.py vae --output {root}` first")
    before = {"autoencoder": read(root.with_suffix(".json"))["autoencoder"]}
    vae = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    digits = data or load_digits()[0]
    tokens = (encode(vae, torch.from_numpy(digits.images)) - vae.config.shift_factor) * vae.config.scaling_factor
    options.output = root / "transformer" / WEIGHTS
    model = train(transformer, flow_loss, options, {"family": "flux"}, Digits(tokens.numpy(), digits.labels))
    configure(model, root / "transformer")
    write(root.with_suffix(".json"), taken(options.output) | before)
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_config(root / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "id2label": {str(digit): str(digit) for digit in range(CLASSES)},
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return model


if __name__ == "__main__":
    arguments = parser(__doc__ or "", steps=9000)
    arguments.add_argument("component", choices=("vae", "transformer"))
    given = arguments.parse_args()
    if given.output is None:
        arguments.error("--output is the diffusers folder to write, and there is none")
    {"vae": train_vae, "transformer": train_transformer}[given.component](given)
