"""Write a model of a published size with random weights: what it takes to export and to run it can be measured without the model itself.

    python samples/random_folder.py flux-dev FOLDER
    python samples/random_folder.py sd3-medium FOLDER --text
    python samples/random_folder.py elit-xl FILE.safetensors

Weights are bfloat16 (float32 for elit-xl), in shards of 1 GB that are drawn one tensor at a time. Matrices are normal with the deviation
that keeps activations at their size, gains of norms are 1, biases 0.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SHARD = 1 << 30  # bytes
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
SD3: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
    "pos_embed_max_size": 192,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {
    "flux-dev": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
    "sd3-medium": {"shift": 3.0},
}


def drawn(name: str, like: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random values for a weight of that name and shape."""
    if like.dim() < 2:
        return torch.ones(like.shape, dtype=dtype) if name.endswith("weight") else torch.zeros(like.shape, dtype=dtype)
    inputs = math.prod(like.shape[1:]) if "embed_tokens" not in name and "shared" not in name else 1
    return torch.empty(like.shape, dtype=dtype).normal_(0, 1 / math.sqrt(inputs), generator=generator)


def write_shards(folder: Path, module: nn.Module, stem: str, given: Mapping[str, Tensor] = {}) -> int:
    """The weights of a module on `meta` as diffusers and transformers write them, in shards with an index; returns how many values."""
    generator, total, shards, places = torch.Generator().manual_seed(0), 0, 0, {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal shards, shard
        shards += 1
        save_file(shard, folder / f"{stem}-{shards:05}.safetensors", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, f"{stem}-{shards:05}.safetensors"))
        shard = {}

    for name, like in module.state_dict().items():
        shard[name] = given[name] if name in given else drawn(name, like, generator, torch.bfloat16)
        total += like.numel()
        if sum(value.nbytes for value in shard.values()) >= SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def components(kind: str, text: bool) -> dict[str, nn.Module]:
    """Modules on `meta` of each component."""
    import diffusers
    import transformers

    scale = {"scaling_factor": 0.3611, "shift_factor": 0.1159} if kind == "flux-dev" else {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    with torch.device("meta"):
        flux = kind == "flux-dev"
        parts = {"transformer": diffusers.FluxTransformer2DModel(**FLUX) if flux else diffusers.SD3Transformer2DModel(**SD3)}
        parts["vae"] = diffusers.AutoencoderKL(**VAE, **scale)
        if text:
            parts["text_encoder_2" if flux else "text_encoder_3"] = transformers.T5EncoderModel(transformers.T5Config(**T5))
    return parts


def write_folder(kind: str, folder: Path, text: bool = False) -> None:
    """A diffusers folder of that kind; `text` adds its largest text encoder (without a tokenizer: it is exported alone)."""
    listed: dict[str, Any] = {"_class_name": "FluxPipeline" if kind == "flux-dev" else "StableDiffusion3Pipeline"}
    for name, module in components(kind, text).items():
        class_name = type(module).__name__
        (folder / name).mkdir(parents=True, exist_ok=True)
        config: Any = module.config
        if name.startswith("text"):
            stem, library = "model", "transformers"
            config.architectures = [class_name]
            config.save_pretrained(folder / name)
        else:
            stem, library = "diffusion_pytorch_model", "diffusers"
            module.save_config(folder / name)  # type: ignore[operator]
        given = {"pos_embed.pos_embed": position_table(module)} if class_name.startswith("SD3") else {}
        print(f"{name}: {write_shards(folder / name, module, stem, given) / 1e9:.3f} billion weights", file=sys.stderr)
        listed[name] = [library, class_name]
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000} | SCHEDULERS[kind]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    listed["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(listed), encoding="utf-8")


def position_table(module: Any) -> Tensor:
    """SD3's own table, which is no random one."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    config = module.config
    base = config.sample_size // config.patch_size
    table = get_2d_sincos_pos_embed(module.inner_dim, config.pos_embed_max_size, base_size=base, output_type="pt")
    return torch.as_tensor(table).float().reshape(1, -1, module.inner_dim)


def write_elit(file: Path) -> None:
    """ELIT-SiT-XL/2 for 256 px, in float32."""
    from elastic_export.capture.zoo import Request, load

    model = load(Request("elit-sit-xl-256", random_weights=True))
    save_file({name: value.contiguous() for name, value in model.module.state_dict().items()}, file)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*SCHEDULERS, "elit-xl"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", action="store_true", help="with T5-XXL")
    given = parser.parse_args(arguments)
    if given.output.exists():
        parser.error(f"{given.output} exists")
    if given.kind == "elit-xl":
        write_elit(given.output)
    else:
        write_folder(given.kind, given.output, given.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
