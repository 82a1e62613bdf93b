"""FLUX over tokens with positions: diffusers' own blocks, with float32 angles and the time kept in float32.

Legend: B batch, S image tokens, T text tokens, C values of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elastic_export.families.bricks import TIME_FEATURES, embedder
from elastic_export.families.layers import Sinusoids
from elastic_export.families.tokens import Config, Rope, TokenFamily, draws_over
from elastic_runtime.contract.manifest import Patches

THETA = 10000.0  # of the angles
PACKED = 2  # a token is 2 x 2 latent pixels; `patch_size` in the config counts packed ones and is 1


class Flux(nn.Module):
    """`FluxTransformer2DModel` with the contract's inputs; `timestep` is sigma in [0, 1] and `guidance` the scale itself."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        self.rope = Rope(transformer.config.axes_dims_rope, THETA)
        transformer.time_text_embed.time_proj = Sinusoids()  # diffusers' own values, as constants

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        model = self.transformer
        dtype = model.x_embedder.weight.dtype
        scales = [timestep * 1000] if guidance is None else [timestep * 1000, guidance * 1000]  # in float32, whatever the weights are in
        condition = model.time_text_embed(*scales, pooled_projections.to(dtype))  # (B, W)
        image, text = model.x_embedder(hidden_states.to(dtype)), model.context_embedder(encoder_hidden_states.to(dtype))
        angles = self.rope(torch.cat((txt_ids, img_ids)))  # text first, as in the blocks
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition, image_rotary_emb=angles)
        return model.proj_out(model.norm_out(image, condition)).float()  # (B, S, C)


def patches(config: Config) -> Patches:
    return Patches(size=PACKED, positions="img_ids", guidance_embeds=bool(config["guidance_embeds"]))


def flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one pass over `image` and `text` tokens (see `bricks` for what counts)."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    double, single, both = config["num_layers"], config["num_single_layers"], image + text
    conditions = 2 if config["guidance_embeds"] else 1
    macs = (double + single) * (12 * both * width**2 + 2 * both**2 * width)  # both kinds: 4 for attention, 8 for the MLP
    macs += (double * 12 + single * 3 + 2) * width**2
    macs += conditions * embedder(TIME_FEATURES, width) + embedder(config["pooled_projection_dim"], width)
    macs += image * (config["in_channels"] + (config["out_channels"] or config["in_channels"])) * width
    return 2 * (macs + text * config["joint_attention_dim"] * width)


FAMILY = TokenFamily(
    name="flux",
    class_name="FluxTransformer2DModel",
    wrap=Flux,
    patches=patches,
    channels=lambda config: config["in_channels"] // PACKED**2,
    refusal=lambda config: draws_over(config["in_channels"], config["out_channels"] or config["in_channels"]),
    text_length=lambda config: 512 if config["guidance_embeds"] else 256,  # dev, and schnell as its model card has it
    flops=flops,
    distilled=lambda config, stated: not config["guidance_embeds"],  # schnell; a de-distilled one looks the same
    few_steps=4,
)
