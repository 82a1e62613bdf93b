"""RALU's plans over a transformer of FLUX.1-dev's size, random weights in bfloat16, through the product's own pipeline.

    python plans.py                            (CHECK_DEVICE=cpu: a tiny one)

Times of whole drawings without text encoders: 50, 28, 18 and 10 plain steps, the plans 4x and 7x; and of a step by its tokens.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from rows import DEVICE, Table, left
from torch import Tensor, nn

from elastic_export.families.flux import FAMILY, Flux
from elastic_runtime import ElasticPipeline, Span
from elastic_runtime.contract import manifest as records
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.sessions.session import Arrays, Session

DEV: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
TINY = DEV | {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 16,
    "pooled_projection_dim": 8, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
CPU = DEVICE == "cpu"
CONFIG, DTYPE = (TINY, torch.float32) if CPU else (DEV, torch.bfloat16)
TEXT, CHANNELS, SIDE = (8, 16, 16) if CPU else (512, 16, 128)  # SIDE of the latent: 128 is 1024 px
WIDTHS, GROUPS = ((16, 16, 16, 16), 16) if CPU else ((128, 256, 512, 512), 32)
DRAWINGS = (("full", 50), ("4x", None), ("7x", None), ("full", 28), ("full", 18), ("full", 10), ("4x", None), ("7x", None))


class OnDevice(Session):
    """A module as a session: arrays in and out, the rest on the device."""

    where = f"torch {torch.__version__} {DEVICE}"

    def __init__(self, graph: Graph, module: Callable[..., Tensor]):
        super().__init__(graph)
        self._module = module

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE) for name, array in feeds.items()}
            return {self.graph.outputs[0].name: self._module(**inputs).float().cpu().numpy()}

    def close(self) -> None:
        """The module is the caller's."""


def filled(module: nn.Module) -> nn.Module:
    """Its parameters on the device: gains 1, biases 0, the rest small and random."""
    module = module.to_empty(device=DEVICE).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def models() -> tuple[nn.Module, nn.Module]:
    """The transformer as it is exported, and the decoder."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(**CONFIG)
            vae = AutoencoderKL(
                in_channels=3, out_channels=3, latent_channels=CHANNELS, block_out_channels=WIDTHS, layers_per_block=2,
                norm_num_groups=GROUPS, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                use_quant_conv=False, use_post_quant_conv=False,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(usual)
    return Flux(filled(transformer)).to(DEVICE), filled(vae.decoder)


def described() -> records.Manifest:
    """The manifest that an export of FLUX.1-dev would have, without artifacts."""

    def spec(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    width, pooled = CONFIG["joint_attention_dim"], CONFIG["pooled_projection_dim"]
    inputs = (
        spec("hidden_states", "B", "S", 64), spec("encoder_hidden_states", "B", "T", width), spec("pooled_projections", "B", pooled),
        spec("timestep", "B"), spec("img_ids", "S", 3), spec("txt_ids", "T", 3), spec("guidance", "B"),
    )  # fmt: skip
    tokens, latents = Span((SIDE // 4) ** 2, (SIDE // 2) ** 2), Span(SIDE // 2, SIDE)
    denoiser = Graph(
        inputs=inputs,
        outputs=(spec("prediction", "B", "S", 64),),
        dimensions={"B": Span(1, 4), "S": tokens, "T": Span(1, TEXT)},
        artifacts=(),
    )
    decoder = Graph(
        inputs=(spec("latent", "B", CHANNELS, "h", "w"),),
        outputs=(spec("image", "B", 3, "8*h", "8*w"),),
        dimensions={"B": Span(1, 4), "h": latents, "w": latents},
        artifacts=(),
    )
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in CONFIG.items()}
    model = records.Model(
        name="flux-dev-size", family="flux", config=config | {"scheduler": {"use_dynamic_shifting": True}}, prediction="velocity",
        schedule=RectifiedFlow(), sample_shape=(CHANNELS, SIDE, SIDE), num_classes=0, null_label=0, weights="random",
        vae=records.Vae(scaling_factor=0.3611, shift_factor=0.1159, upscale=8), patches=FAMILY.patches(CONFIG),
        text=records.Text(encoders=(), length=TEXT, width=width, pooled=pooled),
    )  # fmt: skip
    return records.Manifest(
        schema_version=records.SCHEMA_VERSION,
        model=model,
        axes=(),
        graphs={"denoiser": denoiser, "decoder": decoder},
        cost=(),
        provenance=records.Provenance(command="", created="", versions={}),
    )


def main() -> None:
    table = Table("plans")
    begun = time.perf_counter()
    transformer, decoder = models()
    table.row(what="made", parameters=sum(p.numel() for p in transformer.parameters()), seconds=time.perf_counter() - begun)
    manifest = described()
    sessions: dict[str, Session] = {
        "denoiser": OnDevice(manifest.graphs["denoiser"], transformer),
        "decoder": OnDevice(manifest.graphs["decoder"], lambda latent: decoder(latent.to(DTYPE))),
    }
    pipe = ElasticPipeline(Bundle(Path(), manifest), sessions)
    random = np.random.default_rng(0)
    text = random.standard_normal((1, TEXT, CONFIG["joint_attention_dim"])).astype(np.float32)
    pooled = random.standard_normal((1, CONFIG["pooled_projection_dim"])).astype(np.float32)

    def draw(plan: str, steps: int | None = None) -> Any:
        return pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, plan=plan, num_inference_steps=steps, seeds=1, output_type="np")

    draw("7x"), draw("4x")  # every size is warm
    whole: tuple[float, int] | None = None
    for plan, steps in DRAWINGS:
        if left() < 15:
            break
        result = draw(plan, steps)
        flops = sum(FAMILY.flops(CONFIG, tokens, TEXT) for tokens in result.plan.step_tokens(SIDE // 2, SIDE // 2))
        whole = whole or (result.seconds, flops)
        table.row(
            what="drawing", plan=plan, steps=len(result.steps), seconds=result.seconds,
            network_s=sum(step.seconds for step in result.steps), times_faster=whole[0] / result.seconds,
            times_fewer_flops=whole[1] / flops, tflops_per_s=flops / result.seconds / 1e12, finite=bool(np.isfinite(result.images).all()),
        )  # fmt: skip
        for stage in sorted({step.stage for step in result.steps}):
            first, *others = [step for step in result.steps if step.stage == stage]
            seconds = float(np.median([step.seconds for step in others or [first]]))
            tokens = first.budget["tokens"]
            rate = FAMILY.flops(CONFIG, tokens, TEXT) / seconds / 1e12
            table.row(what="step", plan=plan, stage=stage, tokens=tokens, first_ms=1e3 * first.seconds, ms=1e3 * seconds, tflops_per_s=rate)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
