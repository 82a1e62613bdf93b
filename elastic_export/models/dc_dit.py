"""DC-DiT: a diffusion transformer whose core sees only the tokens that a router keeps (arXiv 2603.06351).

Legend: B batch, C channels, T tokens, one a latent pixel, s grid side, D core width, b = D / enc_dec_dim_factor, K slots.
Convolutions lead from pixels to tokens and back at full T; a router, chunking and de-chunking (`dc_dit_chunk.py`) stand between
them and the core's DiT blocks, which see K tokens.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_export.models.dc_dit_chunk import Router, count, float32, group_norm, natural, nearest, select, smooth, take
from elastic_export.models.layers import DiTBlock, FinalLayer, LabelEmbedder, TimestepEmbedder, initialize, sincos_2d

ROUTER_BIAS = -1.1  # training starts from few kept tokens: sigmoid(-1.1) is 0.25, the share that the paper aims for


@dataclass(frozen=True)
class DcDitParams:
    """Sizes of one DC-DiT. `encoder` and `decoder` are written as in the public configs: `c2` for two convolution blocks."""

    input_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    dechunk_kernel_sigma: float
    enc_dec_dim_factor: int = 4
    encoder: str = "c2"
    decoder: str = "c2"
    learn_sigma: bool = True
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "num_classes", "enc_dec_dim_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size < 2:
            raise ValueError(f"input_size must be at least 2, got {self.input_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 32 or self.hidden_size % (32 * self.enc_dec_dim_factor):
            wanted = 32 * self.enc_dec_dim_factor
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 32 * enc_dec_dim_factor = {wanted}: GroupNorm has 32 groups")
        if not self.dechunk_kernel_sigma > 0:
            raise ValueError(f"dechunk_kernel_sigma must be above 0, got {self.dechunk_kernel_sigma}")
        for name in ("encoder", "decoder"):
            if not re.fullmatch(r"c[1-9]\d?", str(getattr(self, name))):
                raise ValueError(f"{name} must be c1, c2, ...: so many convolution blocks; got {getattr(self, name)!r}")
        if self.learn_sigma is not True:
            raise ValueError(f"learn_sigma must be true: the family predicts its variance; got {self.learn_sigma!r}")

    @property
    def tokens(self) -> int:
        return self.input_size**2

    @property
    def outer_width(self) -> int:
        return self.hidden_size // self.enc_dec_dim_factor

    @property
    def blocks(self) -> tuple[int, int]:
        """Convolution blocks of encoder and decoder."""
        return int(self.encoder[1:]), int(self.decoder[1:])


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension with a weight, eps 1e-5, reduced in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU before each, the condition added between them, and a skip."""

    def __init__(self, channels: int, out: int, condition: int):
        super().__init__()
        inner = min(channels, out)
        self.norm1 = nn.GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.cond_proj = nn.Linear(condition, inner)
        self.norm2 = nn.GroupNorm(32, inner)
        self.conv2 = nn.Conv2d(inner, out, 3, padding=1)
        self.skip_proj = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(group_norm(self.norm1, x))) + self.cond_proj(F.silu(c))[:, :, None, None]
        return self.conv2(F.silu(group_norm(self.norm2, h))) + self.skip_proj(x)  # (B, out, s, s)


class ConvStack(nn.Module):
    """Convolution blocks on the grid, then an RMSNorm over the channels of its tokens."""

    def __init__(self, widths: list[int], condition: int):
        super().__init__()
        self.layers = nn.ModuleList(ConvBlock(i, o, condition) for i, o in zip(widths, widths[1:], strict=False))
        self.rmsnorm = RmsNorm(widths[-1])

    def forward(self, grid: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            grid = layer(grid, c)
        return self.rmsnorm(grid.flatten(2).transpose(1, 2))  # (B, T, width)


class DcDit(nn.Module):
    """DC-DiT denoiser: `(sample, timestep, class_labels, drop_fraction, slots) -> (prediction, kept)`."""

    pos_embed: Tensor

    def __init__(self, params: DcDitParams):
        super().__init__()
        self.params = params
        width, outer, (encoders, decoders) = params.hidden_size, params.outer_width, params.blocks
        self.x_embedder = nn.Conv2d(params.in_channels, outer, 3, padding=1)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(params.num_classes, width)
        self.encoder = ConvStack([outer] * encoders + [width], width)
        self.residual_proj = nn.Linear(width, width)
        self.router = Router(width)
        self.register_buffer("pos_embed", sincos_2d(width, params.input_size))
        self.blocks = nn.ModuleList(DiTBlock(width, params.num_heads, params.mlp_ratio) for _ in range(params.depth))
        self.rmsnorm = RmsNorm(width)
        self.decoder = ConvStack([width] + [outer] * decoders, width)
        self.final_layer = FinalLayer(outer, 2 * params.in_channels, width)
        side = torch.arange(params.input_size, device="cpu", dtype=torch.float32)
        # Not a buffer: building on `meta` would lose it.
        self.cells = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)  # (T, 2): row, column
        initialize(self, zero=(*(block.modulation for block in self.blocks), self.final_layer, self.residual_proj))
        nn.init.constant_(self.router.residual_scorer[-1].bias, ROUTER_BIAS)

    def to_grid(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.params.input_size, -1))  # (B, D, s, s)

    def encode(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of every pixel (B, T, D), the condition (B, D) and the router's probabilities (B, T)."""
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)
        x = self.encoder(self.x_embedder(sample.to(c.dtype)), c)
        return x, c, self.router(self.to_grid(x))

    def through_core(self, x: Tensor, c: Tensor, p: Tensor, kept: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """De-chunked tokens (B, T, D) in float32, and the positions (B, K) of the tokens that went through the core."""
        p, positions = select(p, slots.shape[0])  # (B, K)
        shown = slots < kept[:, None]  # (B, K)
        cells, visible = self.cells[positions], shown.float()  # (B, K, 2)
        # Attention of ONNX Runtime does not stretch a mask over the queries.
        mask = shown[:, None, None, :].expand(-1, 1, slots.shape[0], -1)
        h = take(x, positions) + self.pos_embed[0][positions]  # (B, K, D)
        for block in self.blocks:
            h = block(h, c, mask)
        h = smooth(self.rmsnorm(h).float(), p, cells, visible, self.params.dechunk_kernel_sigma)
        return take(h, nearest(self.cells, cells, positions, visible)), positions

    def decode(self, x: Tensor, c: Tensor) -> Tensor:
        """`[epsilon | variance]` (B, 2C, s, s) from tokens (B, T, D)."""
        tokens = self.decoder(self.to_grid(x.to(c.dtype)), c)  # (B, T, b)
        return self.to_grid(self.final_layer(tokens, c).float())

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, drop_fraction: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict the noise and how far the variance lies between its bounds; tell how many tokens were wanted.

        Shapes: sample (B, C, s, s); timestep (B,) in [0, 1000); class_labels (B,) int64, `num_classes` for no label; drop_fraction
        (B,) in [0, 1), of the tokens that the router keeps; slots (K,) int64, always `arange(K)`, K <= T: at most so many tokens
        go through the core, those with the highest probabilities. kept (B,) is the count that K did not cut.
        """
        x, c, p = self.encode(sample, timestep, class_labels)
        kept = count(p, drop_fraction)
        tokens, _ = self.through_core(x, c, p, kept, slots)
        return self.decode(tokens + float32(self.residual_proj, x), c), kept

    def learn(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, drop_fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: the prediction with no cap, the router's probabilities (B, T) and what it keeps by itself (B, T).

        A factor of 1 on the de-chunked tokens passes their gradient to the probability of the decision taken (straight-through).
        """
        x, c, p = self.encode(sample, timestep, class_labels)
        kept = count(p, drop_fraction)
        slots = torch.arange(int(kept.max()))
        tokens, positions = self.through_core(x, c, p, kept, slots)
        taken = torch.zeros_like(p).scatter(1, positions, (slots < kept[:, None]).to(p.dtype)).bool()
        decision = torch.where(taken, p, 1 - p)
        tokens = tokens * (1 + decision - decision.detach())[:, :, None]
        return self.decode(tokens + float32(self.residual_proj, x), c), p, natural(p)
