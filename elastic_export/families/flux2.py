"""FLUX.2 (klein, dev) over tokens with positions: diffusers' own blocks, with float32 angles and the time kept in float32.

Legend: B batch, S image tokens, T text tokens, N of both, C values of a token, W the model's width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elastic_export.families.bricks import embedder
from elastic_export.families.layers import Sinusoids
from elastic_export.families.prompts import FLUX2_DEV, FLUX2_KLEIN
from elastic_export.families.tokens import Config, Rope, TokenFamily, draws_over
from elastic_runtime.contract.manifest import COLUMNS, Patches

LAYOUT = Patches(size=1, positions="img_ids", layout="sequence")  # the VAE packs 2 x 2 latent pixels itself


class Flux2(nn.Module):
    """`Flux2Transformer2DModel` with the contract's inputs; `timestep` is sigma in [0, 1] and `guidance` the scale itself."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.rope = Rope(config.axes_dims_rope, config.rope_theta)
        self.sinusoids = Sinusoids(config.timestep_guidance_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        model = self.transformer
        dtype = model.x_embedder.weight.dtype
        condition = self.condition(timestep, guidance, dtype)  # (B, W)
        of_image, of_text = model.double_stream_modulation_img(condition), model.double_stream_modulation_txt(condition)  # (B, 6 W)
        of_both = model.single_stream_modulation(condition)  # (B, 3 W)
        image, text = model.x_embedder(hidden_states.to(dtype)), model.context_embedder(encoder_hidden_states.to(dtype))
        angles = self.rope(torch.cat((txt_ids, img_ids)))  # text first, as in the blocks
        for block in model.transformer_blocks:
            text, image = block(image, text, of_image, of_text, image_rotary_emb=angles)
        both = torch.cat((text, image), dim=1)  # (B, N, W)
        for block in model.single_transformer_blocks:
            both = block(both, None, of_both, image_rotary_emb=angles)
        return model.proj_out(model.norm_out(both[:, text.shape[1] :], condition)).float()  # (B, S, C)

    def condition(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What modulates all blocks, (B, W): times and scales are counted in thousands in float32, whatever the weights are in."""
        embed = self.transformer.time_guidance_embed
        condition: Tensor = embed.timestep_embedder(self.sinusoids(timestep * 1000).to(dtype))
        return condition if guidance is None else condition + embed.guidance_embedder(self.sinusoids(guidance * 1000).to(dtype))


def refusal(config: Config) -> str | None:
    """Why this transformer is not exported; None for one that is."""
    if config["patch_size"] != LAYOUT.size:
        return f"has a patch_size of {config['patch_size']}, and FLUX.2 takes latents that its VAE packed: it is 1"
    widths, columns = list(config["axes_dims_rope"]), COLUMNS[LAYOUT.layout]
    if len(widths) != columns or sum(widths) != config["attention_head_dim"]:
        return (
            f"turns {widths} values of a head by its places, and FLUX.2 has {columns} such numbers that add up to attention_head_dim, "
            f"{config['attention_head_dim']}"
        )
    return draws_over(config["in_channels"], config["out_channels"] or config["in_channels"])


def patches(config: Config) -> Patches:
    return Patches(size=LAYOUT.size, positions=LAYOUT.positions, layout=LAYOUT.layout, guidance_embeds=bool(config["guidance_embeds"]))


def flops(config: Config, image: int, text: int) -> int:
    """FLOPs of one pass over `image` and `text` tokens (see `bricks` for what counts)."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    double, single, both = config["num_layers"], config["num_single_layers"], image + text
    hidden = int(width * config["mlp_ratio"])  # of the gated MLP
    conditions = 2 if config["guidance_embeds"] else 1
    macs = (double + single) * (both * (4 * width**2 + 3 * width * hidden) + 2 * both**2 * width)
    macs += 17 * width**2  # modulation, shared by all blocks: 6 for either stream, 3 for both together, 2 at the end
    macs += conditions * embedder(config["timestep_guidance_channels"], width)
    macs += image * (config["in_channels"] + (config["out_channels"] or config["in_channels"])) * width
    return 2 * (macs + text * config["joint_attention_dim"] * width)


FAMILY = TokenFamily(
    name="flux2",
    class_name="Flux2Transformer2DModel",
    wrap=Flux2,
    patches=patches,
    channels=lambda config: config["in_channels"],
    refusal=refusal,
    flops=flops,
    distilled=lambda config, stated: stated,
    few_steps=4,  # klein
    mu=lambda stated: "empirical",
    prompts=(FLUX2_KLEIN, FLUX2_DEV),
)
