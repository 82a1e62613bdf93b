"""Names of modules in LoRA files of kohya's trainer, of ComfyUI and of the models' public code -> those of diffusers' classes.

Kohya's are written with underscores in place of dots, after the public code of FLUX and FLUX.2 or after diffusers; dotted ones mean the
same. Which classes are read is what diffusers' own loaders convert (`diffusers/loaders/lora_conversion_utils.py`).
"""

import re
from collections.abc import Iterable
from types import MappingProxyType

# What stands before such a name -> the component.
PREFIXES = MappingProxyType({
    "lora_unet_": "transformer", "lora_transformer_": "transformer", "lora_te1_": "text_encoder", "lora_te_": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
})  # fmt: skip
# How names of blocks begin in the models' public code, and in no class of diffusers that is read.
BLOCKS = ("double_blocks.", "single_blocks.", "blocks.", "txtfusion.")
SWAPPED = "final_layer_adaLN_modulation_1"  # of FLUX, which has shift and scale in the other order
Rows = dict[str, tuple[str, ...]]

_ATTENTION: Rows = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn_proj": ("attn.to_add_out",),
}  # fmt: skip
_DOUBLE: dict[str, Rows] = {
    "FluxTransformer2DModel": _ATTENTION | {
        "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",), "img_mod_lin": ("norm1.linear",),
        "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",), "txt_mod_lin": ("norm1_context.linear",),
    },
    "Flux2Transformer2DModel": _ATTENTION | {
        "img_mlp_0": ("ff.linear_in",), "img_mlp_2": ("ff.linear_out",),
        "txt_mlp_0": ("ff_context.linear_in",), "txt_mlp_2": ("ff_context.linear_out",),
    },
}  # fmt: skip
_SINGLE: dict[str, Rows] = {
    "FluxTransformer2DModel": {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",),
    },
    "Flux2Transformer2DModel": {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
}  # fmt: skip
_AROUND: dict[str, dict[str, str]] = {
    "FluxTransformer2DModel": {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out", SWAPPED: "norm_out.linear",
        **{
            f"{name}_in_{side}_layer": f"time_text_embed.{embedder}_embedder.linear_{place}"
            for name, embedder in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
            for place, side in enumerate(("in", "out"), start=1)
        },
    },
    # Without `SWAPPED`, whose halves diffusers' converter leaves as they are in one form and drops in the other.
    "Flux2Transformer2DModel": {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
        "single_stream_modulation_lin": "single_stream_modulation.linear",
        "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt_lin": "double_stream_modulation_txt.linear",
        **{
            f"{name}_in_{side}_layer": f"time_guidance_embed.{embedder}_embedder.linear_{place}"
            for name, embedder in (("time", "timestep"), ("guidance", "guidance"))
            for place, side in enumerate(("in", "out"), start=1)
        },
    },
    "Krea2Transformer2DModel": {
        "first": "img_in", "last_linear": "final_layer.linear", "tmlp_0": "time_embed.linear_1", "tmlp_2": "time_embed.linear_2",
        "tproj_1": "time_mod_proj", "txtmlp_1": "txt_in.linear_1", "txtmlp_3": "txt_in.linear_2",
        "txtfusion_projector": "text_fusion.projector",
    },
}  # fmt: skip
_KREA2 = {
    "attn_wq": "attn.to_q", "attn_wk": "attn.to_k", "attn_wv": "attn.to_v", "attn_wo": "attn.to_out.0", "attn_gate": "attn.to_gate",
    "mlp_gate": "ff.gate", "mlp_up": "ff.up", "mlp_down": "ff.down",
}  # fmt: skip
_Z_IMAGE: Rows = {"qkv": ("attention.to_q", "attention.to_k", "attention.to_v"), "out": ("attention.to_out.0",)}
# Classes whose names are written with underscores -> how the model is called.
CLASSES = MappingProxyType({
    "FluxTransformer2DModel": "FLUX", "CLIPTextModel": "its CLIP", "Flux2Transformer2DModel": "FLUX.2",
    "QwenImageTransformer2DModel": "Qwen-Image", "ZImageTransformer2DModel": "Z-Image",
})  # fmt: skip


def modules(kind: str, name: str, known: Iterable[str]) -> tuple[str, ...]:
    """The modules of a class `kind`, among the `known`, that together are the one called `name`, in the order of its outputs.

    Empty where there is no such name, or none of this class is read.
    """
    flat = name.replace(".", "_")
    if inner := re.fullmatch(r"(double|single)_blocks_(\d+)_(\w+)", flat):
        where, index, what = inner.groups()
        rows = (_DOUBLE if where == "double" else _SINGLE).get(kind, {}).get(what, ())
        return tuple(f"{'single_' * (where == 'single')}transformer_blocks.{index}.{row}" for row in rows)
    if around := _AROUND.get(kind, {}).get(flat):
        return (around,)
    if kind == "Krea2Transformer2DModel":
        inner = re.fullmatch(r"(?:txtfusion_(layerwise_blocks|refiner_blocks)|blocks)_(\d+)_((?:attn|mlp)_\w+)", flat)
        row = _KREA2.get(inner[3]) if inner else None
        return (f"{f'text_fusion.{inner[1]}' if inner[1] else 'transformer_blocks'}.{inner[2]}.{row}",) if inner and row else ()
    if kind == "ZImageTransformer2DModel" and (inner := re.fullmatch(r"(\w+)_(\d+)_attention_(qkv|out)", flat)):
        return tuple(f"{inner[1]}.{inner[2]}.{row}" for row in _Z_IMAGE[inner[3]])
    if kind not in CLASSES:
        return ()
    written = {each.replace(".", "_").removeprefix("text_model_"): each for each in known}
    module = written.get(flat.removeprefix("text_model_"))
    return (module,) if module else ()
