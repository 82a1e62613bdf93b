"""Krea 2 over tokens with positions: diffusers' own blocks, with float32 angles, and its text fusion as a graph of its own.

Legend: B batch, S image tokens, T text tokens, N of both, L tapped layers of the text encoder, C values of a token, W the model's width,
D the text's, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.bricks import attention, embedder
from elastic_export.families.layers import Sinusoids, merge_heads, split_heads
from elastic_export.families.prompts import KREA2
from elastic_export.families.tokens import Config, Rope, TokenFamily, rotate
from elastic_runtime.contract.manifest import Patches

SIZE = 2  # latent pixels a side of a token, as its pipeline packs them
DISTILLED = 1.15  # mu of the model for few steps, whatever the size
NORMS = ("norm", "norm1", "norm2", "norm_q", "norm_k")  # which diffusers keeps in float32: what they scale by is 1 + weight


class GroupedAttention:
    """Attention over one sequence with fewer keys than queries and a gate, in place of diffusers' own, which takes a mask.

    `image_rotary_emb` are cosines and sines (N, W/H), or None in the text fusion.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query = attn.norm_q(split_heads(attn.to_q(hidden_states), attn.num_heads))
        key = attn.norm_k(split_heads(attn.to_k(hidden_states), attn.num_kv_heads))
        value = split_heads(attn.to_v(hidden_states), attn.num_kv_heads)
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        if (groups := attn.num_heads // attn.num_kv_heads) > 1:
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))  # (B, H, N, W/H)
        attended = merge_heads(F.scaled_dot_product_attention(query, key, value))
        output: Tensor = attn.to_out[0](attended * torch.sigmoid(attn.to_gate(hidden_states)))
        return output  # (B, N, W)


def exact(module: nn.Module) -> tuple[str, ...]:
    """The modules that stay in float32 whatever the precision."""
    return tuple(name for name, _ in module.named_modules() if name.rpartition(".")[2] in NORMS)


class Krea2(nn.Module):
    """`Krea2Transformer2DModel` with the contract's inputs, without its text fusion: `encoder_hidden_states` (B, T, D) are what
    `TextFusion` gives. `timestep` is sigma in [0, 1]. It takes `transformer` over."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        self.rope = Rope(tuple(transformer.config.axes_dims_rope), transformer.config.rope_theta)
        self.sinusoids = Sinusoids(transformer.config.timestep_embed_dim)  # diffusers' own values, as constants
        transformer.text_fusion = nn.Identity()
        for block in transformer.transformer_blocks:
            block.attn.processor = GroupedAttention()
        self.exact = exact(self)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        model = self.transformer
        dtype, length = model.img_in.weight.dtype, encoder_hidden_states.shape[1]
        time = self.sinusoids(timestep * 1000).to(dtype)[:, None]
        condition = model.time_embed.linear_2(F.gelu(model.time_embed.linear_1(time), approximate="tanh"))  # (B, 1, W)
        modulation = model.time_mod_proj(F.gelu(condition, approximate="tanh"))  # (B, 1, 6 W), of all blocks
        both = torch.cat((model.txt_in(encoder_hidden_states.to(dtype)), model.img_in(hidden_states.to(dtype))), dim=1)  # (B, N, W)
        angles = self.rope(torch.cat((txt_ids, img_ids)))
        for block in model.transformer_blocks:
            both = block(both, modulation, angles)
        prediction: Tensor = model.final_layer(both[:, length:], condition)
        return prediction.float()  # (B, S, C)


class TextFusion(nn.Module):
    """What makes the model's text tokens of the text encoder's tapped layers, (B, T, L, D) -> (B, T, D): attention over the layers of each
    token, their weighted sum, and attention over the tokens. It depends on the text alone, and takes `transformer`'s part over."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.fusion = transformer.text_fusion
        for block in (*self.fusion.layerwise_blocks, *self.fusion.refiner_blocks):
            block.attn.processor = GroupedAttention()
        self.exact = exact(self)

    def forward(self, tapped: Tensor) -> Tensor:
        batch, length, layers, width = tapped.shape
        states = tapped.to(self.fusion.projector.weight.dtype).reshape(batch * length, layers, width)
        for block in self.fusion.layerwise_blocks:
            states = block(states)
        fused: Tensor = self.fusion.projector(states.transpose(1, 2)).reshape(batch, length, width)
        for block in self.fusion.refiner_blocks:
            fused = block(fused)
        return fused.float()  # (B, T, D)


def patches(config: Config) -> Patches:
    return Patches(size=SIZE, positions="img_ids")


def flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one pass over `image` and `text` tokens, without the text fusion (see `bricks` for what counts)."""
    width, both = config["attention_head_dim"] * config["num_attention_heads"], image + text
    keys = config["attention_head_dim"] * config["num_key_value_heads"]
    block = both * (3 * width**2 + 2 * width * keys + 3 * width * config["intermediate_size"])
    macs = config["num_layers"] * block + text * (config["text_hidden_dim"] * width + width**2) + 2 * image * config["in_channels"] * width
    macs += embedder(config["timestep_embed_dim"], width) + 6 * width**2
    return 2 * macs + config["num_layers"] * attention(both, both, width)


def fusion_flops(config: Config, text: int) -> int:
    """FLOPs of the text fusion of `text` tokens."""
    width, layers = config["text_hidden_dim"], config["num_text_layers"]
    keys = width // config["text_num_attention_heads"] * config["text_num_key_value_heads"]
    row = 3 * width**2 + 2 * width * keys + 3 * width * config["text_intermediate_size"]  # of a block, but for attention
    along = config["num_layerwise_text_blocks"] * (2 * text * layers * row + text * attention(layers, layers, width))
    across = config["num_refiner_text_blocks"] * (2 * text * row + attention(text, text, width))
    return along + across + 2 * text * width * layers


FAMILY = TokenFamily(
    name="krea2",
    class_name="Krea2Transformer2DModel",
    wrap=Krea2,
    patches=patches,
    channels=lambda config: config["in_channels"] // SIZE**2,
    flops=flops,
    off=0,
    prompts=(KREA2,),
    text_width=lambda config: config["text_hidden_dim"],
    mu=lambda stated: DISTILLED if stated else None,
    fusion=TextFusion,
    fusion_flops=fusion_flops,
    layers=lambda config: config["num_text_layers"],
    few_steps=8,  # Turbo
)
