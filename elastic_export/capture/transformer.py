"""A folder's transformer, opened, and what a kind of model makes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_export.families.tokens import Config, TokenFamily
from elastic_export.foreign.component import diffusers_class
from elastic_export.foreign.folder import Folder
from elastic_runtime.contract import manifest
from elastic_runtime.contract.axis import Axis, Span
from elastic_targets.capture import GraphCapture


@dataclass(frozen=True)
class Transformer:
    """What is known of a transformer before its sizes: diffusers' own class `built` without weights, its `config`, the folder's VAE and the
    scheduler's config, the `usual` side of its pictures in latent pixels, the most text tokens, and the batches to take. `name` is the
    model's in messages."""

    folder: Folder
    family: TokenFamily
    built: Any
    config: Config
    vae: manifest.Vae | None
    scheduler: Mapping[str, Any]
    usual: int
    length: int
    batch: Span
    name: str

    @property
    def upscale(self) -> int:
        """Pixels a latent pixel; without a VAE pixels are those of the latent."""
        return self.vae.upscale if self.vae else 1

    @property
    def fusion_parameters(self) -> int:
        """Those of what fuses its text, which are in a graph of their own; 0 without one."""
        if self.family.fusion is None:
            return 0
        another = self.folder.component("transformer").build(diffusers_class(self.family.class_name))  # the denoiser takes `built` over
        return sum(parameter.numel() for parameter in self.family.fusion(another).parameters())


@dataclass(frozen=True)
class Drawn:
    """What is drawn with it: the axis, and heights and widths of latents.

    graph(): the denoiser, with its weights. costs(parameters): the manifest's rows, the dearest last. facts: what the manifest says of the
    model, in its fields; of `config` what is to be added. parameters and digests(): of files beside the transformer's own.
    """

    axis: Axis
    graph: Callable[[], GraphCapture]
    costs: Callable[[int], tuple[manifest.Cost, ...]]
    heights: Span
    widths: Span
    facts: Mapping[str, Any]
    parameters: int = 0
    digests: Callable[[], Mapping[str, str]] = dict
