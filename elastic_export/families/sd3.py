"""SD3 and SD3.5 over tokens with positions: diffusers' own blocks, with the position table evaluated at given places.

Legend: B batch, S image tokens, T text tokens, C values of a token, W the model's width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elastic_export.families.bricks import TIME_FEATURES, embedder
from elastic_export.families.layers import Constants, Sinusoids
from elastic_export.families.tokens import Config, TokenFamily, draws_over
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.errors import ModelError


class Positions(Constants):
    """The sin-cos table of SD3 at any places (S, 2) of it, rows and columns: (S, W). Columns have the first half of the features."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.frequencies = (scale / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))).float()

    def forward(self, pos_ids: Tensor) -> Tensor:
        angles = pos_ids.flip(-1).float()[:, :, None] * self.frequencies  # (S, 2, W/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (S, W)


class Sd3(nn.Module):
    """`SD3Transformer2DModel` on tokens packed (c, ph, pw) in and out; `timestep` is sigma in [0, 1]. It takes `transformer` over.

    Raises: ModelError for a stored position table that is not the analytic one.
    """

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        config, table = transformer.config, transformer.pos_embed
        self.positions = Positions(transformer.inner_dim, table.base_size / config.pos_embed_max_size)
        self._check(table.pos_embed[0])
        # The projection emits (ph, pw, c) where the patch convolution takes (c, ph, pw): its rows are put in the latter order.
        size, channels = config.patch_size, transformer.out_channels
        order = torch.arange(size**2 * channels).view(size, size, channels).permute(2, 0, 1).flatten()
        last = transformer.proj_out
        last.weight, last.bias = (nn.Parameter(old[order], requires_grad=False) for old in (last.weight, last.bias))
        transformer.time_text_embed.time_proj = Sinusoids()  # diffusers' own values, as constants
        del table.pos_embed  # hundreds of MB that the graph has no use for

    def _check(self, stored: Tensor) -> None:
        side = self.transformer.config.pos_embed_max_size
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([rows, columns], dim=-1).flatten(0, 1)
        pairs = zip(places.split(1024), stored.split(1024), strict=True)
        worst = max((self.positions(some) - wanted).abs().max().item() for some, wanted in pairs)
        if worst > 4e-3:  # stored in float16 it is off by 2.4e-4, in bfloat16 by 2.0e-3, and by 2.2e-3 where it was both
            raise ModelError(
                f"this SD3 transformer's position table is not the analytic sin-cos table (off by {worst:.1e}), so it cannot be "
                "evaluated between its places"
            )

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor, pos_ids: Tensor
    ) -> Tensor:
        model = self.transformer
        patch = model.pos_embed.proj
        dtype = patch.weight.dtype
        condition = model.time_text_embed(timestep * 1000, pooled_projections.to(dtype))  # (B, W)
        image = nn.functional.linear(hidden_states.to(dtype), patch.weight.flatten(1), patch.bias)  # (B, S, W)
        image = image + self.positions(pos_ids).to(dtype)
        text = model.context_embedder(encoder_hidden_states.to(dtype))
        for block in model.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition)
        return model.proj_out(model.norm_out(image, condition)).float()  # (B, S, C)


def patches(config: Config) -> Patches:
    return Patches(size=config["patch_size"], positions="pos_ids", table=config["pos_embed_max_size"])


def flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one pass over `image` and `text` tokens (see `bricks` for what counts)."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    layers, both, dual = config["num_layers"], image + text, len(config.get("dual_attention_layers") or ())
    area = config["patch_size"] ** 2
    macs = layers * (12 * both * width**2 + 2 * both**2 * width + 12 * width**2)
    macs -= (9 * text + 4) * width**2  # the last block's text side has no output, no MLP, and shift and scale alone
    macs += dual * (4 * image * width**2 + 2 * image**2 * width + 3 * width**2) + 2 * width**2
    macs += embedder(TIME_FEATURES, width) + embedder(config["pooled_projection_dim"], width)
    macs += image * area * (config["in_channels"] + (config["out_channels"] or config["in_channels"])) * width
    return 2 * (macs + text * config["joint_attention_dim"] * config["caption_projection_dim"])


FAMILY = TokenFamily(
    name="sd3",
    class_name="SD3Transformer2DModel",
    wrap=Sd3,
    patches=patches,
    channels=lambda config: config["in_channels"],
    refusal=lambda config: draws_over(config["in_channels"], config["out_channels"] or config["in_channels"]),
    side=lambda config: max(size) if isinstance(size := config["sample_size"], list | tuple) else size,
    text_length=lambda config: 256,
    beside=77,
    spaced=False,
    flops=flops,
)
