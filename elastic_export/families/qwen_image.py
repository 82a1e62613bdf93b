"""Qwen-Image over tokens with positions: diffusers' own blocks, with attention whose angles are real numbers.

Legend: B batch, S image tokens, T text tokens, N of both, C values of a token, W the model's width, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.bricks import TIME_FEATURES, embedder
from elastic_export.families.layers import Sinusoids, merge_heads, split_heads
from elastic_export.families.prompts import QWEN_IMAGE
from elastic_export.families.tokens import Config, Rope, TokenFamily, draws_over, rotate
from elastic_runtime.contract.manifest import Patches

THETA = 10000.0  # of the angles
VARIANTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # of editing and of layered pictures


class JointAttention:
    """Attention over text and image together, text first, in place of diffusers' own, whose angles are complex numbers.

    `image_rotary_emb` are cosines and sines (N, W/H) of both streams' places. There is no mask: the rows of a run have one length.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        encoder_hidden_states_mask: None = None,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        image, text, heads = hidden_states, encoder_hidden_states, attn.heads
        q = (attn.norm_added_q(split_heads(attn.add_q_proj(text), heads)), attn.norm_q(split_heads(attn.to_q(image), heads)))
        k = (attn.norm_added_k(split_heads(attn.add_k_proj(text), heads)), attn.norm_k(split_heads(attn.to_k(image), heads)))
        v = (split_heads(attn.add_v_proj(text), heads), split_heads(attn.to_v(image), heads))
        query, key = (rotate(torch.cat(parts, dim=2), *image_rotary_emb) for parts in (q, k))  # (B, H, N, W/H)
        attended = merge_heads(F.scaled_dot_product_attention(query, key, torch.cat(v, dim=2)))  # (B, N, W)
        length = text.shape[1]
        return attn.to_out[0](attended[:, length:]), attn.to_add_out(attended[:, :length])


class QwenImage(nn.Module):
    """`QwenImageTransformer2DModel` with the contract's inputs; `timestep` is sigma in [0, 1]. It takes `transformer` over."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        self.rope = Rope(transformer.config.axes_dims_rope, THETA)
        transformer.pos_embed = nn.Identity()  # whose tables are complex
        transformer.time_text_embed.time_proj = Sinusoids(scale=1000)  # diffusers' own values, as constants
        for block in transformer.transformer_blocks:
            block.attn.processor = JointAttention()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        image, text, condition = self.enter(hidden_states, encoder_hidden_states, timestep)
        angles = self.rope(torch.cat((txt_ids, img_ids)))
        image, _ = self.blocks(slice(None), image, text, condition, angles)
        return self.leave(image, condition)  # (B, S, C)

    def enter(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both streams, (B, S, W) and (B, T, W), and the condition (B, W) of all blocks."""
        model = self.transformer
        dtype = model.img_in.weight.dtype
        image = model.img_in(hidden_states.to(dtype))
        text = model.txt_in(model.txt_norm(encoder_hidden_states.to(dtype)))
        return image, text, model.time_text_embed(timestep, image)

    def blocks(self, which: slice, image: Tensor, text: Tensor, condition: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Some of the blocks, on image and text tokens whose angles (N, W/H) come text first."""
        for block in self.transformer.transformer_blocks[which]:
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=None, temb=condition, image_rotary_emb=angles
            )
        return image, text

    def leave(self, image: Tensor, condition: Tensor) -> Tensor:
        """The prediction (B, S, C), float32."""
        return self.transformer.proj_out(self.transformer.norm_out(image, condition)).float()


def refusal(config: Config) -> str | None:
    """Why this transformer is not exported; None for one that is."""
    if on := [name for name in VARIANTS if config[name]]:
        return f"has {on[0]}, as variants of Qwen-Image for editing or layers have, which are not supported: export Qwen-Image itself"
    area = config["patch_size"] ** 2
    return draws_over(config["in_channels"], (config["out_channels"] or config["in_channels"]) * area)


def patches(config: Config) -> Patches:
    return Patches(size=config["patch_size"], positions="img_ids", layout="centred")


def ends_flops(config: Config, image: int, text: int) -> int:
    """FLOPs of what stands before and after the blocks."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    values = config["in_channels"] + config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    macs = image * values * width + text * config["joint_attention_dim"] * width
    return 2 * (macs + 2 * width**2 + embedder(TIME_FEATURES, width))


def block_flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one block on `image` and `text` tokens."""
    width, both = config["attention_head_dim"] * config["num_attention_heads"], image + text
    return 2 * (12 * both * width**2 + 2 * both**2 * width + 12 * width**2)


def flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one pass over `image` and `text` tokens (see `bricks` for what counts)."""
    return config["num_layers"] * block_flops(config, image, text) + ends_flops(config, image, text)


FAMILY = TokenFamily(
    name="qwen-image",
    class_name="QwenImageTransformer2DModel",
    wrap=QwenImage,
    patches=patches,
    channels=lambda config: config["in_channels"] // config["patch_size"] ** 2,
    refusal=refusal,
    text_length=lambda config: QWEN_IMAGE.usual,
    flops=flops,
    rescale="norm",
    prompts=(QWEN_IMAGE,),
)
