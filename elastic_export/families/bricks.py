"""FLOPs and bytes of a forward pass, as pure functions of shapes (2 FLOPs a multiply-add).

Counted: every linear layer and convolution, QK^T and AV, adaLN once a sample. Not counted: norms, softmax, activations,
biases. For ELIT this reproduces the published table (arXiv 2603.12245) to 0.1 percent.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_export.families.dc_dit.model import DcDitParams
    from elastic_export.families.elit import ElitParams
    from elastic_export.families.elt import EltParams
    from elastic_export.families.elt_masked import EltMaskedParams

FLOAT32 = 4  # bytes a value
TIME_FEATURES = 256  # sinusoids of a timestep


def dit_block(tokens: int, width: int, mlp_ratio: float = 4.0) -> int:
    """FLOPs of an adaLN-Zero block on `tokens` tokens: qkv, projection, MLP, modulation, attention."""
    linear = tokens * (4 + 2 * mlp_ratio) * width**2 + 6 * width**2
    return round(2 * linear) + attention(tokens, tokens, width)


def attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of QK^T and AV over all heads."""
    return 4 * queries * keys * width


def cross_attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of q, k, v and output projections (`queries` and `keys` tokens in all), without the attention product."""
    return 2 * (2 * queries + 2 * keys) * width**2


def embedder(features: int, width: int) -> int:
    """Multiply-adds of a condition's MLP: `features` to the width, and the width to itself."""
    return features * width + width**2


def embedders(tokens: int, width: int, patch_values: int, out_values: int) -> int:
    """FLOPs of patch embedding, timestep MLP and the adaLN final layer."""
    return 2 * (tokens * patch_values * width + 256 * width + width**2 + 2 * width**2 + tokens * width * out_values)


def elit_flops(params: "ElitParams", latents: int) -> int:
    """FLOPs of one ELIT forward pass at batch 1 with `latents` kept latents; Read and Write run at full P whatever it is."""
    width, tokens, per_group = params.hidden_size, params.tokens, params.group_latents
    patch_values = params.patch_size**2 * params.in_channels
    core = params.depth - params.head_blocks - params.tail_blocks
    windows = params.groups * attention(per_group, per_group, width)
    feed_forward = 2 * tokens * 2 * width**2  # MLP of ratio 1
    read = 2 * 7 * width**2 + cross_attention(tokens, tokens, width) + windows + feed_forward
    write = cross_attention(tokens, tokens, width) + windows + feed_forward
    outer = (params.head_blocks + params.tail_blocks) * dit_block(tokens, width, params.mlp_ratio)
    return embedders(tokens, width, patch_values, patch_values) + outer + read + core * dit_block(latents, width, params.mlp_ratio) + write


def elt_flops(params: "EltParams", loops: int) -> int:
    """FLOPs of one ELT forward pass at batch 1: prelude, `loops` times the shared blocks, coda."""
    values, out = (params.patch_size**2 * channels for channels in (params.in_channels, params.out_channels))
    depth = params.prelude_blocks + params.unique_blocks * loops + params.coda_blocks
    block = dit_block(params.tokens, params.hidden_size, params.mlp_ratio)
    return embedders(params.tokens, params.hidden_size, values, out) + depth * block


def convolution(pixels: int, side: int, channels: int, out: int) -> int:
    """FLOPs of a `side` x `side` convolution with stride 1."""
    return 2 * pixels * side**2 * channels * out


def conv_block(pixels: int, channels: int, out: int, condition: int) -> int:
    """FLOPs of DC-DiT's convolution block: two 3x3 convolutions, the condition's projection, and a 1x1 skip where widths differ."""
    inner = min(channels, out)
    skip = convolution(pixels, 1, channels, out) if channels != out else 0
    return convolution(pixels, 3, channels, inner) + convolution(pixels, 3, inner, out) + 2 * condition * inner + skip


def dc_dit_flops(params: "DcDitParams", slots: int) -> int:
    """FLOPs of one DC-DiT forward pass at batch 1 with `slots` token slots; all but the core and de-chunking is the same at any number."""
    width, outer, tokens = params.hidden_size, params.outer_width, params.tokens
    encoders, decoders = params.blocks
    inner = width // 4
    router = convolution(tokens, 1, width, inner) + 2 * convolution(tokens, 3, inner, inner) + convolution(tokens, 1, inner, 1)
    last, first = conv_block(tokens, outer, width, width), conv_block(tokens, width, outer, width)
    around = last + first + (encoders + decoders - 2) * conv_block(tokens, outer, outer, width)
    final = 2 * (width * 2 * outer + tokens * outer * 2 * params.in_channels)
    ends = convolution(tokens, 3, params.in_channels, outer) + 2 * (256 * width + width**2) + final
    residual, smoothing = 2 * tokens * width**2, 2 * slots**2 * width
    return ends + around + router + residual + smoothing + params.depth * dit_block(slots, width, params.mlp_ratio)


def dc_dit_activation_values(params: "DcDitParams", slots: int) -> int:
    """Most values alive at once in a DC-DiT forward pass at batch 1: in a convolution block at full width, in the core while the
    tokens and their residual wait, or in the search for the nearest tokens."""
    waiting = 2 * params.tokens * params.hidden_size
    core = dit_activation_values(slots, params.hidden_size, params.num_heads, params.mlp_ratio)
    nearest = 3 * params.tokens * slots + slots * params.hidden_size
    return waiting + max(core, nearest, 2 * params.tokens * params.hidden_size)


def elt_masked_flops(params: "EltMaskedParams", loops: int) -> int:
    """FLOPs of one masked ELT forward pass at batch 1: `loops` times the shared blocks, which are DiT's without adaLN, and the logits."""
    width, tokens = params.hidden_size, params.tokens
    block = round(2 * tokens * (4 + 2 * params.mlp_ratio) * width**2) + attention(tokens, tokens, width)
    return params.unique_blocks * loops * block + 2 * tokens * width * params.vocabulary


def dit_activation_values(tokens: int, width: int, heads: int, mlp_ratio: float = 4.0) -> int:
    """Most values alive at once in a DiT block: the residual, its normalised copy, and the larger of the MLP's hidden layer
    (before and after GELU) and attention's q, k, v, output and scores."""
    return round(tokens * width * 2 + max(2 * mlp_ratio * tokens * width, 4 * tokens * width + heads * tokens**2))


def elit_activation_values(params: "ElitParams", latents: int) -> int:
    """Most values alive at once in an ELIT forward pass at batch 1. While the core runs, the spatial tokens and all latents wait."""
    outer = dit_activation_values(params.tokens, params.hidden_size, params.num_heads, params.mlp_ratio)
    core = dit_activation_values(latents, params.hidden_size, params.num_heads, params.mlp_ratio)
    waiting = 2 * params.tokens * params.hidden_size
    return max(outer if params.head_blocks + params.tail_blocks else 0, core + waiting)


def decoder_values(config: Mapping[str, Any], side: int) -> int:
    """Most values alive at once in an AutoencoderKL's decoder of a picture of `side` pixels: at full resolution a residual, its
    normalised copy, and a convolution's input and output, as wide as the second level from below."""
    widths = config.get("block_out_channels", (64,))
    return side**2 * (3 * widths[min(1, len(widths) - 1)] + widths[0])


def peak_bytes(parameters: int, activation_values: int) -> int:
    """About the most memory that exporting a graph takes: weights in float32, what the exporter adds to them, and activations.

    Weights past 2 GB are written one by one, and 1.2 times their size was measured; smaller graphs are built in memory once more
    and serialised. Half precision takes half of the weights on top.
    """
    weights = parameters * FLOAT32
    return round(weights * (1.2 if weights >= 2e9 else 3.0)) + activation_values * FLOAT32
