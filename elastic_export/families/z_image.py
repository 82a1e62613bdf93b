"""Z-Image over tokens with positions: diffusers' own blocks, with attention whose angles are real numbers, and no lists.

Legend: B batch, S image tokens, T text tokens, N of both, C values of a token, W the model's width, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.families.bricks import TIME_FEATURES, attention
from elastic_export.families.layers import Sinusoids, merge_heads, split_heads
from elastic_export.families.prompts import Z_IMAGE
from elastic_export.families.tokens import Config, Rope, TokenFamily, rotate
from elastic_runtime.contract.manifest import Patches

PATCH, SIZE = "2-1", 2  # diffusers' name of the weights for patches of 2 x 2 in one frame, which its pipeline draws with
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")  # of a block
MULTIPLE = 32  # of both kinds of tokens, to which the model was trained with pad tokens
TIME_WIDTH = 1024  # of the hidden layer that a time goes through
MOST_CONDITION = 256  # width of a time's embedding
# What goes into the last layer of a branch is this much smaller, and what comes out is made larger again where it is float32, for the norm:
# in float16 branches overflow (github.com/Comfy-Org/ComfyUI/pull/11187, github.com/vladmandic/sdnext/pull/4753), and a power of two is
# exact. The norm's epsilon is left as it is: onnxscript takes one below 1e-8 for zero.
DOWN = 2.0**-6


class JointAttention:
    """Attention over one sequence, in place of diffusers' own, whose angles are complex numbers.

    `freqs_cis` are cosines and sines (N, W/H). There is no mask: the rows of a run have one length.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        *,
        freqs_cis: tuple[Tensor, Tensor],
    ) -> Tensor:
        hidden_states = hidden_states.to(attn.to_q.weight.dtype)
        query, key, value = (split_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        attended = merge_heads(F.scaled_dot_product_attention(rotate(query, *freqs_cis), rotate(key, *freqs_cis), value))
        output: Tensor = attn.to_out[0](attended * DOWN)
        return output.float() / DOWN  # (B, N, W)


class FeedForward(nn.Module):
    """The block's SwiGLU."""

    def __init__(self, plain: Any):
        super().__init__()
        self.w1, self.w2, self.w3 = plain.w1, plain.w2, plain.w3

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.w1.weight.dtype)
        output: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x * DOWN))
        return output.float() / DOWN  # (B, N, W)


class ZImage(nn.Module):
    """`ZImageTransformer2DModel` with the contract's inputs, on tokens packed (c, ph, pw) in and out. It takes `transformer` over.

    `timestep` is sigma in [0, 1], and the prediction leads from the picture to noise, as that of the other families; diffusers' class has
    1 - sigma and the opposite. Rows where `img_pad` or `txt_pad` is 1 are the model's learned pad tokens, whatever they hold.
    """

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        self.rope = Rope(tuple(transformer.config.axes_dims), transformer.config.rope_theta)
        self.sinusoids = Sinusoids(TIME_FEATURES)  # diffusers' own values, as constants
        for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
            block.attention.processor = JointAttention()
            block.feed_forward = FeedForward(block.feed_forward)
        # Blocks sum in float32 whatever the precision, and so their norms compute.
        self.exact = tuple(name for name, _ in self.named_modules() if name.rpartition(".")[2] in NORMS)
        # Patches are packed (ph, pw, c) in both layers: these columns and rows are put in the order (c, ph, pw).
        channels = transformer.in_channels
        order = torch.arange(SIZE**2 * channels).view(SIZE, SIZE, channels).permute(2, 0, 1).flatten()
        first, last = transformer.all_x_embedder[PATCH], transformer.all_final_layer[PATCH].linear
        first.weight = nn.Parameter(first.weight[:, order], requires_grad=False)
        last.weight, last.bias = (nn.Parameter(-old[order], requires_grad=False) for old in (last.weight, last.bias))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        img_pad: Tensor,
        txt_pad: Tensor,
    ) -> Tensor:
        model = self.transformer
        first, last = model.all_x_embedder[PATCH], model.all_final_layer[PATCH]
        dtype, length = first.weight.dtype, hidden_states.shape[1]
        time = (1000 - timestep * 1000) / 1000 * model.t_scale  # rounded as diffusers' pipeline and class do it
        condition = model.t_embedder.mlp(self.sinusoids(time).to(dtype))  # (B, 256)
        image = torch.where(img_pad[:, :, None] > 0, model.x_pad_token, first(hidden_states.to(dtype))).float()  # (B, S, W)
        text = torch.where(txt_pad[:, :, None] > 0, model.cap_pad_token, model.cap_embedder(encoder_hidden_states.to(dtype))).float()
        image_angles, text_angles = self.rope(img_ids), self.rope(txt_ids)
        for block in model.noise_refiner:
            image = block(image, None, image_angles, condition)
        for block in model.context_refiner:
            text = block(text, None, text_angles)
        both = torch.cat((image, text), dim=1)  # (B, N, W)
        angles = tuple(torch.cat(pair) for pair in zip(image_angles, text_angles, strict=True))
        for block in model.layers:
            both = block(both, None, angles, condition)
        scale = 1 + last.adaLN_modulation(condition)[:, None]
        prediction: Tensor = last.linear((last.norm_final(both[:, :length]) * scale).to(dtype))
        return prediction.float()  # (B, S, C)


def refusal(config: Config) -> str | None:
    """Why this transformer is not exported; None for one that is."""
    if config["siglip_feat_dim"] is not None:
        return "has siglip_feat_dim, as Z-Image-Omni has to draw over pictures, which is not supported: export Z-Image or Z-Image-Turbo"
    kinds = [f"{size}-{frames}" for size, frames in zip(config["all_patch_size"], config["all_f_patch_size"], strict=True)]
    if PATCH not in kinds:
        return f"has no patches of 2 x 2 in one frame ({PATCH}), which Z-Image is drawn with; it has {', '.join(kinds) or 'none'}"
    return None


def patches(config: Config) -> Patches:
    return Patches(size=SIZE, positions="img_ids", layout="after_text", multiple=MULTIPLE)


def block_flops(config: Config, tokens: int, modulated: bool = True) -> int:
    """FLOPs of one block on `tokens` tokens."""
    width = config["dim"]
    macs = 4 * tokens * width**2 + 3 * tokens * width * int(width / 3 * 8)
    macs += 4 * min(width, MOST_CONDITION) * width if modulated else 0
    return 2 * macs + attention(tokens, tokens, width)


def flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one pass over `image` and `text` tokens, pad tokens among them (see `bricks` for what counts)."""
    width, values, condition = config["dim"], config["in_channels"] * SIZE**2, min(config["dim"], MOST_CONDITION)
    macs = 2 * image * values * width + text * config["cap_feat_dim"] * width + condition * width
    macs += TIME_FEATURES * TIME_WIDTH + TIME_WIDTH * condition
    refined = block_flops(config, image) + block_flops(config, text, modulated=False)
    return config["n_layers"] * block_flops(config, image + text) + config["n_refiner_layers"] * refined + 2 * macs


FAMILY = TokenFamily(
    name="z-image",
    class_name="ZImageTransformer2DModel",
    wrap=ZImage,
    patches=patches,
    channels=lambda config: config["in_channels"],
    refusal=refusal,
    flops=flops,
    off=0,
    prompts=(Z_IMAGE,),
    width=lambda config: config["dim"],
    heads=lambda config: config["n_heads"],
    text_width=lambda config: config["cap_feat_dim"],
)
