"""Diffusers folders of small random models, written as diffusers and transformers write them. Import this where those are installed."""

import json
import shutil
from pathlib import Path
from typing import Any

import language_models
import msgspec
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging

from elastic_export.capture.folders import capture_folder
from elastic_runtime import Bundle, Span
from elastic_runtime.contract.bundle import MANIFEST

SIDE = 32  # pixels; a latent has half of them, a token has 2 x 2 latent pixels of 4 channels
WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "digit", "seven", "cat"]
WIDTH, POOLED = 16, 8


def flux(**changes: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
    }  # fmt: skip
    return FluxTransformer2DModel(**sizes | changes).eval().requires_grad_(False)


def flux2(**changes: Any) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
    }  # fmt: skip
    return Flux2Transformer2DModel(**sizes | changes).eval().requires_grad_(False)


def sd3(**changes: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": SIDE // 2, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": 2 * POOLED,
        "pos_embed_max_size": 12,
    }  # fmt: skip
    return SD3Transformer2DModel(**sizes | changes).eval().requires_grad_(False)


def qwen_image(**changes: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return QwenImageTransformer2DModel(**sizes | changes).eval().requires_grad_(False)


def krea2(**changes: Any) -> Krea2Transformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "timestep_embed_dim": 32, "text_hidden_dim": WIDTH, "num_text_layers": 3, "text_num_attention_heads": 4,
        "text_num_key_value_heads": 2, "text_intermediate_size": 24, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    model = Krea2Transformer2DModel(**sizes | changes).eval().requires_grad_(False)
    for parameter in model.parameters():  # modulation tables and norms, which start as zeros, among them
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def z_image(**changes: Any) -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": WIDTH,
        "axes_dims": [4, 6, 6],
    }  # fmt: skip
    model = ZImageTransformer2DModel(**sizes | changes).eval().requires_grad_(False)
    for token in (model.x_pad_token, model.cap_pad_token):  # which start as zeros
        torch.nn.init.normal_(token)
    return model


# what reads prompts, by the class of the transformer, where that is one language model
READERS: dict[type, Any] = {
    QwenImageTransformer2DModel: language_models.qwen25_vl,
    Flux2Transformer2DModel: lambda: language_models.qwen3(num_hidden_layers=28),
    ZImageTransformer2DModel: language_models.qwen3,
    Krea2Transformer2DModel: lambda: language_models.qwen3_vl(num_hidden_layers=6),
}
SD35 = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}


def vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": SIDE,
        "scaling_factor": 0.5, "shift_factor": 0.1, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return AutoencoderKL(**sizes | changes)


def packed_vae(**changes: Any) -> AutoencoderKLFlux2:
    """FLUX.2's: latents of 4 channels and half the side, which it packs into 16 and a quarter; its batch norm has seen something."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": SIDE,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    vae = AutoencoderKLFlux2(**sizes | changes).eval()
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.requires_grad_(False)


def frame_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    ).eval()  # fmt: skip


def clip(kind: type = CLIPTextModel) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=POOLED, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
        projection_dim=POOLED, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return kind(config).eval()


def t5() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def write_t5_tokenizer(folder: Path, length: int = 6) -> None:
    """A `tokenizer.json`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    ).save_pretrained(folder)


def write_clip_tokenizer(folder: Path) -> None:
    """The older form: `vocab.json` and `merges.txt`."""
    folder.mkdir(parents=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", "c", "a", "t", "c</w>", "a</w>", "t</w>", "ca"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    special = {"bos_token": tokens[0], "eos_token": tokens[1], "unk_token": tokens[1], "pad_token": tokens[1]}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write(folder: Path, transformer: Any, *, text: bool = False, decoder: bool = True, index: bool = True, **saving: Any) -> Path:
    """A folder of `transformer` (`saving` goes to its save_pretrained), a VAE, and the encoders that its pipeline has."""
    logging.disable_progress_bar()
    is_flux = isinstance(transformer, FluxTransformer2DModel)
    pipelines = {
        "FluxTransformer2DModel": "FluxPipeline", "QwenImageTransformer2DModel": "QwenImagePipeline",
        "Flux2Transformer2DModel": "Flux2Pipeline" if transformer.config.get("guidance_embeds") else "Flux2KleinPipeline",
        "ZImageTransformer2DModel": "ZImagePipeline", "Krea2Transformer2DModel": "Krea2Pipeline",
    }  # fmt: skip
    vaes = {QwenImageTransformer2DModel: frame_vae, Krea2Transformer2DModel: frame_vae, Flux2Transformer2DModel: packed_vae}
    parts: dict[str, Any] = {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()}
    parts |= {"vae": vaes.get(type(transformer), vae)()} if decoder else {}
    if text and is_flux:
        parts |= {"text_encoder": clip(), "text_encoder_2": t5()}
    elif text and (reader := READERS.get(type(transformer))):
        parts |= {"text_encoder": reader()}
    elif text:
        parts |= {"text_encoder": clip(CLIPTextModelWithProjection), "text_encoder_2": clip(CLIPTextModelWithProjection)}
        parts |= {"text_encoder_3": t5()}
    for name, part in parts.items():
        part.save_pretrained(folder / name, **(saving if name == "transformer" else {}))
        if name.startswith("text_encoder") and type(transformer) in READERS:
            language_models.tokenizer().save_pretrained(folder / "tokenizer")
        elif name.startswith("text_encoder"):
            writer = write_t5_tokenizer if isinstance(part, T5EncoderModel) else write_clip_tokenizer
            writer(folder / name.replace("text_encoder", "tokenizer"))
    if index:
        classes = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
        pipeline = pipelines.get(type(transformer).__name__, "StableDiffusion3Pipeline")
        listed = {"_class_name": pipeline, "image_encoder": [None, None]} | classes
        (folder / "model_index.json").write_text(json.dumps(listed))
    return folder


def as_distilled(bundle: Bundle, folder: Path, copy: Path, size: Span, batch: Span) -> Bundle:
    """A copy of the `bundle` that was exported from `folder`, as of the same weights with another word in its index, which only the
    manifest tells; `folder` has that word from then on."""
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    model = capture_folder(folder, None, size, batch).manifest.model
    shutil.copytree(bundle.folder, copy)
    manifest = msgspec.structs.replace(bundle.manifest, model=msgspec.structs.replace(model, name=bundle.manifest.model.name))
    (copy / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return Bundle.open(copy)
