"""The decoder and encoder graphs of a diffusers VAE folder: `AutoencoderKL`, FLUX.2's that packs its latents, or Qwen-Image's for its one
frame."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.family import random_rows
from elastic_export.families.layers import Constants
from elastic_export.foreign.component import Component, diffusers_class
from elastic_export.foreign.weights import Naming
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Vae
from elastic_runtime.contract.schedule import is_number
from elastic_runtime.errors import ModelError
from elastic_targets.capture import GraphCapture

Half = Literal["decoder", "encoder"]
PACKED = 2  # latent pixels of FLUX.2's VAE a side of one that its pipelines draw
# Attention's projections by the names of older files.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(.*\.attentions\.\d+\.)({'|'.join(_OLDER)})(\.\w+)")


class Decoder(nn.Module):
    """`latent (B, C, h, w) -> image (B, 3, 8h, 8w)` in [-1, 1]; the latent is already scaled and shifted."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.autoencoder.decode(latent.to(self.autoencoder.dtype), return_dict=False)[0]
        return image.float()


class FrameDecoder(Constants):
    """As `Decoder`, of a VAE of videos and one frame, whose latents are normalised channel by channel: `latent * std + mean`."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder
        for layer in autoencoder.modules():
            if isinstance(layer, nn.Upsample) and layer.mode == "nearest-exact":
                layer.mode = "nearest"  # the same by whole factors, which these are, and coremltools 9.0 knows it
        config = autoencoder.config
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))

    def forward(self, latent: Tensor) -> Tensor:
        frame = (latent * self.std + self.mean).to(self.autoencoder.dtype)[:, :, None]  # (B, C, 1, h, w)
        image: Tensor = self.autoencoder.decode(frame, return_dict=False)[0][:, :, 0]
        return image.float()


class Encoder(nn.Module):
    """`image (B, 3, 8h, 8w)` in [-1, 1] `-> latent (B, C, h, w)` as `Decoder` takes it: the mean of what the encoder gives, with no noise
    in it."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Tensor:
        latent: Tensor = self.autoencoder.encode(image.to(self.autoencoder.dtype)).latent_dist.mode()
        return latent.float()


class FrameEncoder(Constants):
    """As `Encoder`, of a VAE of videos and one frame: `(latent - mean) / std`."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))

    def forward(self, image: Tensor) -> Tensor:
        frame = image.to(self.autoencoder.dtype)[:, :, None]  # (B, 3, 1, 8h, 8w)
        latent: Tensor = self.autoencoder.encode(frame).latent_dist.mode()[:, :, 0]
        return (latent.float() - self.mean) / self.std


class PackedDecoder(nn.Module):
    """As `Decoder`, of a VAE whose latents are drawn packed, `PACKED` x `PACKED` pixels as channels (c, ph, pw), and normalised channel by
    channel by what its batch norm has seen: `latent * std + mean`."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        mean, std = _seen(self.autoencoder)
        latent = F.pixel_shuffle(latent * std + mean, PACKED).to(self.autoencoder.dtype)  # (B, C, 2h, 2w)
        image: Tensor = self.autoencoder.decode(latent, return_dict=False)[0]
        return image.float()


class PackedEncoder(nn.Module):
    """As `Encoder`, the other way round: `(latent - mean) / std` of packed latents."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Tensor:
        mean, std = _seen(self.autoencoder)
        latent: Tensor = self.autoencoder.encode(image.to(self.autoencoder.dtype)).latent_dist.mode()  # (B, C, 2h, 2w)
        return (F.pixel_unshuffle(latent.float(), PACKED) - mean) / std  # (B, 4C, h, w)


def _seen(autoencoder: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each packed channel."""
    seen = autoencoder.bn
    mean, variance = (each.float()[:, None, None] for each in (seen.running_mean, seen.running_var))
    return mean, torch.sqrt(variance + autoencoder.config.batch_norm_eps)


class Seen(nn.Module):
    """What a batch norm has seen of each channel; diffusers' pipelines take it from there, and never run the norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels, device="meta"))


# By diffusers' class, what decodes and what encodes.
KINDS = {
    "AutoencoderKL": (Decoder, Encoder),
    "AutoencoderKLFlux2": (PackedDecoder, PackedEncoder),
    "AutoencoderKLQwenImage": (FrameDecoder, FrameEncoder),
}


# How a config calls a latent's channels, how many they are where it does not say, and how many sides of them are drawn as one.
_CHANNELS = {"AutoencoderKL": ("latent_channels", 4, 1), "AutoencoderKLFlux2": ("latent_channels", 32, PACKED)}
_CHANNELS |= {"AutoencoderKLQwenImage": ("z_dim", 16, 1)}


def _kind(folder: Path) -> str:
    """Which of `KINDS` a folder holds; raises ModelError for another."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: give the folder of a diffusers AutoencoderKL")
    if (kind := str(Component(folder).config.get("_class_name", "AutoencoderKL"))) not in KINDS:
        raise ModelError(f"{folder} is not a diffusers AutoencoderKL: it is a {kind}; there are {', '.join(KINDS)}")
    return kind


def read_vae(folder: Path, channels: int) -> Vae:
    """The facts of a diffusers VAE folder that decodes latents of so many channels.

    Raises: ModelError for a folder that is not an AutoencoderKL, has other channels, or has facts that are no numbers.
    """
    kind, config = _kind(folder), Component(folder).config
    name, usual, packed = _CHANNELS[kind]
    if (has := config.get(name, usual)) != channels / packed**2:
        beside = f", which are {channels / packed**2:g} of the VAE's" if packed > 1 else ""
        raise ModelError(f"the VAE {folder} decodes {has} channels, but the model draws {channels}{beside}: it is another model's")
    if kind == "AutoencoderKLQwenImage":
        return _framed(folder, config, channels)
    if kind == "AutoencoderKLFlux2":
        return _packed(folder, config)
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    shift = 0.0 if shift is None else shift  # which is written where a model has none
    widths = config.get("block_out_channels", (64,))
    if not is_number(scale) or not is_number(shift) or not scale > 0:
        raise ModelError(f"{folder / 'config.json'}: scaling_factor is a number above 0 and shift_factor one, got {scale} and {shift}")
    try:
        return Vae(scaling_factor=float(scale), shift_factor=float(shift), upscale=_upscale(folder, "block_out_channels", widths))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def _upscale(folder: Path, name: str, widths: Any) -> int:
    """Pixels a latent pixel, by the widths of a decoder's levels."""
    if not isinstance(widths, list | tuple) or not widths:
        raise ModelError(f"{folder / 'config.json'}: {name} is a list of widths, got {widths!r}")
    return int(2 ** (len(widths) - 1))


def _packed(folder: Path, config: Mapping[str, Any]) -> Vae:
    """Facts of FLUX.2's VAE, which scales each channel itself."""
    if list(size := config.get("patch_size", (PACKED, PACKED))) != [PACKED, PACKED]:
        raise ModelError(f"{folder / 'config.json'}: FLUX.2's pipelines pack {PACKED} x {PACKED} latent pixels, got patch_size {size!r}")
    if not is_number(epsilon := config.get("batch_norm_eps", 1e-4)) or not 0 <= epsilon < math.inf:
        raise ModelError(f"{folder / 'config.json'}: batch_norm_eps is a number, 0 or more, got {epsilon!r}")
    widths = config.get("block_out_channels", (128, 256, 512, 512))
    sides = {name: _upscale(folder, name, config.get(name) or widths) for name in ("block_out_channels", "decoder_block_out_channels")}
    if len(set(sides.values())) > 1:
        raise ModelError(f"{folder / 'config.json'}: block_out_channels and decoder_block_out_channels are as many, got {sides}")
    return Vae(scaling_factor=1.0, shift_factor=0.0, upscale=PACKED * sides["block_out_channels"])


def _framed(folder: Path, config: Mapping[str, Any], channels: int) -> Vae:
    """Facts of Qwen-Image's VAE, which scales each channel itself."""
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        least = 0 if name == "latents_std" else -math.inf
        if not isinstance(values, list) or len(values) != channels or not all(is_number(each) and each > least for each in values):
            raise ModelError(f"{folder / 'config.json'}: {name} is a number for each of {channels} channels, got {values!r}")
    halved = config.get("temperal_downsample")
    if not isinstance(halved, list):
        raise ModelError(f"{folder / 'config.json'}: temperal_downsample is a list, one value for each halving of a side, got {halved!r}")
    return Vae(scaling_factor=1.0, shift_factor=0.0, upscale=2 ** len(halved))


def load_vae(folder: Path, half: Half = "decoder") -> nn.Module:
    """The half of a VAE that decodes or encodes, in float32; the other half's weights may be there or not.

    Raises: MissingError without diffusers; ModelError for a folder that is not an AutoencoderKL, or weights that do not fit.
    """
    kind = _kind(folder)
    vae: Any = Component(folder).build(diffusers_class(kind))
    if half == "decoder":
        vae.encoder, vae.quant_conv = nn.Identity(), None  # no None: a VAE of videos counts an encoder's layers each time
    else:
        vae.decoder, vae.post_quant_conv = nn.Identity(), None
    if isinstance(norm := getattr(vae, "bn", None), nn.BatchNorm2d):
        vae.bn = Seen(norm.num_features)
    return KINDS[kind][half == "encoder"](Component(folder).fill(vae, _NAMING[half]))


def _renamed(name: str) -> str:
    old = _OLD.fullmatch(name)
    return f"{old[1]}{_OLDER[old[2]]}{old[3]}" if old else name


# The other half's weights, which may be there, and what a batch norm counts.
_NAMING = {
    "decoder": Naming(_renamed, extra=re.compile(r"encoder\.|quant_conv\.|bn\.num_batches_tracked")),
    "encoder": Naming(_renamed, extra=re.compile(r"decoder\.|post_quant_conv\.|bn\.num_batches_tracked")),
}


def decoder(folder: Path, facts: Vae, channels: int, height: Span, width: Span, batch: Span) -> GraphCapture:
    """Capture the decoder of a diffusers VAE folder for latents of these sides; a span of more than one size stays open.

    Raises: what `load_vae` does.
    """
    return _half("decoder", folder, facts, channels, (height, width), batch)


def encoder(folder: Path, facts: Vae, channels: int, height: Span, width: Span, batch: Span) -> GraphCapture:
    """Capture the encoder for pictures whose latents have these sides; else as `decoder`."""
    return _half("encoder", folder, facts, channels, (height, width), batch)


def _half(half: Half, folder: Path, facts: Vae, channels: int, sides: tuple[Span, Span], batch: Span) -> GraphCapture:
    spans = {name: span for name, span in zip("hw", sides, strict=True) if span.min < span.max}
    small = [name if name in spans else span.max for name, span in zip("hw", sides, strict=True)]
    large = [side if facts.upscale == 1 else f"{facts.upscale}*{side}" if isinstance(side, str) else side * facts.upscale for side in small]
    latent = TensorSpec(name="latent", dtype="float32", shape=("B", channels, *small))
    image = TensorSpec(name="image", dtype="float32", shape=("B", 3, *large))
    takes, gives = (latent, image) if half == "decoder" else (image, latent)

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        largest = {"B": size} | {name: span.max for name, span in spans.items()}
        chosen = largest | {name: value for name, value in budget.items() if name in spans}
        return {takes.name: random_rows(np.random.default_rng(0), takes, largest, chosen)}

    # A preview, which has half the sides, and a picture.
    sizes = (tuple(span.max // 2 for span in sides), tuple(span.max for span in sides))[half == "encoder" :]
    stages = [Budget(**{name: value for name, value in zip("hw", size, strict=True) if name in spans}) for size in sizes]
    return GraphCapture(
        name=half,
        module=load_vae(folder, half),
        inputs=(takes,),
        outputs=(gives,),
        axes=(),
        batch=batch,
        feeds=feeds,
        open_dimensions=spans,
        stages=tuple(dict.fromkeys(stages)) if spans else (),
    )
