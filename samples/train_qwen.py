"""Train the packaged sample `elit-qwen-digits`, which draws a digit for a prompt: Qwen-Image's classes in small, in a diffusers folder,
with ELIT put in.

    python samples/train_qwen.py vae --run runs/qwen-vae --output elit-qwen-digits --steps 400
    python samples/train_qwen.py transformer --run runs/qwen --output elit-qwen-digits

Prompts are `a handwritten seven` and the like. The text encoder is a small Qwen2.5-VL that nobody trained: its states of ten prompts
differ, and that is all that the transformer is to learn from. Digits of 32 pixels lie in the latent space of a small
AutoencoderKLQwenImage (4 channels, half the side), as 64 tokens in windows of 4 x 4: 4 to 64 latents.

The recipe is that of arXiv 2603.12245 for a model of its own: rectified flow, the empty prompt in a tenth of the steps, and the number of
kept latents drawn uniformly for each step.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from digits import NAMES, Digits, load_digits
from elastic_export.capture import elit
from elastic_export.families.elit import interface
from elastic_export.families.elit.qwen_image import ElitQwenImage, ElitQwenParams
from elastic_export.families.layers import initialize
from elastic_runtime.ralu.plan import full
from record import read, write
from train_ralu import WEIGHTS, configure, packed, taken
from training import parser, train
from vocabulary import tokenizer

PROMPT = "a handwritten {}"
SIDE, WIDTH = 8, 64  # tokens along a side of a picture; values of a token of text
SPLIT = {"group_size": 4, "head_blocks": 1, "tail_blocks": 1}
SCHEDULER = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": SIDE**2, "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}  # fmt: skip


def text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers that nobody trained, with an eye as small as its class allows, since Qwen-Image's has one."""
    torch.manual_seed(0)
    text = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eye)).eval()


def autoencoder() -> AutoencoderKLQwenImage:
    """Half the side and 4 channels; a picture is a film of one frame."""
    return AutoencoderKLQwenImage(
        base_dim=16, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, attn_scales=[], temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def transformer() -> QwenImageTransformer2DModel:
    """Five layers of 96: Qwen-Image in small, with zero gates at the start (adaLN-Zero)."""
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, attention_head_dim=32, num_attention_heads=3, joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    gates = [mod for block in model.transformer_blocks for mod in (block.img_mod, block.txt_mod)]
    initialize(model, [*gates, model.norm_out.linear, model.proj_out])
    return model


def elastic(length: int) -> ElitQwenImage:
    """The transformer with Read and Write, of which Write adds nothing at first; for text of `length` tokens."""
    model = transformer()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    module = ElitQwenImage(model, ElitQwenParams(config, SIDE, SIDE, **SPLIT), length)
    initialize(
        torch.nn.ModuleList([module.read, module.write]), [module.read.modulation, module.write.attention.proj, module.write.mlp.fc2]
    )
    return module


def vae_loss(model: Any, images: Tensor, labels: Tensor, progress: float) -> Tensor:
    """Squared error, and a prior of a thousandth of a nat a value."""
    pictures = images.expand(-1, 3, -1, -1)[:, :, None]  # (B, 3, 1, H, W)
    posterior = model.encode(pictures).latent_dist
    decoded = model.decode(posterior.sample()).sample
    return (decoded.float() - pictures).square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()


@torch.inference_mode()
def encode(vae: AutoencoderKLQwenImage, images: Tensor) -> Tensor:
    """Digits (N, 1, 32, 32) as latents (N, 4, 16, 16) of mean 0 and deviation 1, as far as `vae` says."""
    mean, std = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    parts = [vae.encode(some.expand(-1, 3, -1, -1)[:, :, None]).latent_dist.mean[:, :, 0] for some in images.split(64)]
    return (torch.cat(parts) - mean) / std


@torch.inference_mode()
def read_prompts(folder: Path) -> tuple[Tensor, Tensor]:
    """The states of the ten prompts (10, L, 64) and of the empty one (1, L', 64), as diffusers' pipeline gives them.

    Raises: SystemExit where the prompts differ in length.
    """
    reader = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    pipeline = QwenImagePipeline(None, None, reader, Qwen2Tokenizer.from_pretrained(folder / "tokenizer"), None)  # type: ignore[arg-type]
    states = [pipeline.encode_prompt([text], device="cpu")[0] for text in (*(PROMPT.format(word) for word in NAMES), "")]
    if len(lengths := {len(each[0]) for each in states[:-1]}) > 1:
        raise SystemExit(
            f"prompts of one batch need one length, and the tokenizer gives {sorted(lengths)} tokens: learn it from more words"
        )
    return torch.cat(states[:-1]), states[-1]


def flow_loss(texts: Tensor, empty: Tensor) -> Callable[..., Tensor]:
    """Velocity loss on the line `x_t = (1 - sigma) x_0 + sigma eps`, v = eps - x_0; a tenth of the steps has the empty prompt."""
    shift = full(1, SIDE**2, SCHEDULER).shifts[0]

    def loss(model: Callable[..., Tensor], latents: Tensor, labels: Tensor, progress: float) -> Tensor:
        clean, drawn = packed(latents), torch.sigmoid(torch.randn(len(latents)))
        noise, sigma = torch.randn_like(clean), shift * drawn / (1 + (shift - 1) * drawn)
        kept = int(torch.randint(1, SPLIT["group_size"] ** 2 + 1, ()))
        words = empty.expand(len(labels), -1, -1) if torch.rand(()) < 0.1 else texts[labels]
        velocity = model(torch.lerp(clean, noise, sigma[:, None, None]), words, sigma, torch.arange(kept))
        return (velocity - (noise - clean)).square().mean()

    return loss


def train_vae(options: argparse.Namespace, data: Digits | None = None) -> AutoencoderKLQwenImage:
    """Write `text_encoder/` and `tokenizer/`, train the autoencoder and write `vae/`, with the mean and deviation of each channel."""
    root, folder = options.output, options.output / "vae"
    reads = tokenizer(["system", "user", "assistant", *(PROMPT.format(word) for word in NAMES)])
    text_encoder(len(reads)).half().save_pretrained(root / "text_encoder")
    reads.save_pretrained(root / "tokenizer")
    options.output = folder / WEIGHTS
    vae = train(autoencoder, vae_loss, options, {}, data)
    write(root.with_suffix(".json"), {"autoencoder": taken(options.output)["training"]})
    images = torch.from_numpy((data or load_digits()[0]).images[:512])
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    configure(vae, folder, latents_mean=mean.tolist(), latents_std=std.tolist(), sample_size=images.shape[-1])
    return vae


def train_transformer(options: argparse.Namespace, data: Digits | None = None) -> ElitQwenImage:
    """Train the transformer on what `vae/` makes of the digits and the text encoder of their names; write `transformer/`, the scheduler,
    model_index.json, and the record."""
    root = options.output
    if not (root / "vae" / WEIGHTS).is_file():
        raise SystemExit(f"{root} holds no trained vae: run `python samples/train_qwen.py vae --output {root}` first")
    before = {"autoencoder": read(root.with_suffix(".json"))["autoencoder"]}
    vae = AutoencoderKLQwenImage.from_pretrained(root / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    digits, (texts, empty) = data or load_digits()[0], read_prompts(root)
    latents = encode(vae, torch.from_numpy(digits.images))
    options.output = root / "transformer" / WEIGHTS
    longest = max(texts.shape[1], empty.shape[1])
    about = {"family": "elit-qwen-image"}
    model = train(lambda: elastic(longest), flow_loss(texts, empty), options, about, Digits(latents.numpy(), digits.labels))
    _divide(options.output)
    configure(model.backbone.transformer, root / "transformer")
    (root / "transformer" / elit.CONFIG).write_text(json.dumps(SPLIT | {"write_kv": elit.WRITE_KV}, indent=1) + "\n", encoding="utf-8")
    write(root.with_suffix(".json"), taken(options.output) | before)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_config(root / "scheduler")
    index = {
        "_class_name": "QwenImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return model


def _divide(file: Path) -> None:
    """The weights of the trained module as two files: diffusers' transformer under its own keys, and ELIT's under the public ones."""
    weights, before = load_file(file), "backbone.transformer."
    inner = {name.removeprefix(before): value for name, value in weights.items() if name.startswith(before)}
    editors = {interface.public(name): value for name, value in weights.items() if not name.startswith(before)}
    save_file(editors, file.with_name(elit.WEIGHTS))
    save_file(inner, file)


if __name__ == "__main__":
    arguments = parser(__doc__ or "", steps=2400)
    arguments.add_argument("component", choices=("vae", "transformer"))
    given = arguments.parse_args()
    if given.output is None:
        arguments.error("--output is the diffusers folder to write, and there is none")
    {"vae": train_vae, "transformer": train_transformer}[given.component](given)
