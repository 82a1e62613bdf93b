"""What the families' costs share: FLOPs and bytes of a forward pass, as pure functions of shapes (2 FLOPs a multiply-add).

Counted: every linear layer and convolution, QK^T and AV, adaLN once a sample. Not counted: norms, softmax, activations,
biases. For ELIT this reproduces the published table (arXiv 2603.12245) to 0.1 percent.
"""

import math
from collections.abc import Mapping
from typing import Any

FLOAT32 = 4  # bytes a value
TIME_FEATURES = 256  # sinusoids of a timestep


def ratio(hidden: int, width: int) -> float:
    """The least `mlp_ratio` of which a model of this width makes this many hidden values, `int(width * ratio)`."""
    value = hidden / width
    while int(width * value) < hidden:  # the quotient is rounded, and its product then cut
        value = math.nextafter(value, math.inf)
    return value


def check_hidden(width: int, mlp_ratio: float) -> None:
    """Raise ValueError for an `mlp_ratio` that leaves no hidden layer."""
    if not 1 <= width * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio {mlp_ratio} leaves no hidden layer of a finite size")


def plain_block(tokens: int, width: int, mlp_ratio: float = 4.0) -> int:
    """FLOPs of a transformer block on `tokens` tokens: qkv, projection, MLP, attention."""
    return round(2 * tokens * (4 + 2 * mlp_ratio) * width**2) + attention(tokens, tokens, width)


def dit_block(tokens: int, width: int, mlp_ratio: float = 4.0, condition: int | None = None) -> int:
    """FLOPs of an adaLN-Zero block, which has a modulation beside, by a `condition` of the width or of its own."""
    return plain_block(tokens, width, mlp_ratio) + 2 * 6 * width * (condition or width)


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


def dit_activation_values(tokens: int, width: int, heads: int, mlp_ratio: float = 4.0) -> int:
    """Most values alive at once in a DiT block: the residual, its normalised copy, and the larger of the MLP's hidden layer
    (before and after GELU) and attention's q, k, v, output and scores."""
    return round(tokens * width * 2 + max(2 * mlp_ratio * tokens * width, 4 * tokens * width + heads * tokens**2))


def decoder_values(config: Mapping[str, Any], side: int) -> int:
    """Most values alive at once in an AutoencoderKL's decoder of a picture of `side` pixels: at full resolution a residual, its
    normalised copy, and a convolution's input and output, as wide as the second level from below."""
    own = [config.get("base_dim", 64) * each for each in config.get("dim_mult", (1,))]  # as Qwen-Image's VAE says it
    widths = config.get("block_out_channels", own)
    return side**2 * (3 * widths[min(1, len(widths) - 1)] + widths[0])


def peak_bytes(parameters: int, activation_values: int) -> int:
    """About the most memory that exporting a graph takes where its compiler holds all weights at once (`Target.estimate` is None):
    weights in float32, what the converter adds to them, and activations.
    """
    weights = parameters * FLOAT32
    return round(weights * (1.2 if weights >= 2e9 else 3.0)) + activation_values * FLOAT32
