"""LoRA files with kohya's names and those of public code are fused as diffusers converts them, and what it does not convert is named."""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")
pytest.importorskip("peft", reason="diffusers loads LoRA files by peft")

import diffusers  # noqa: E402
import folders  # noqa: E402
from diffusers.loaders import lora_conversion_utils  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from elastic_export.foreign.adapters import changes, read_adapter  # noqa: E402
from elastic_export.foreign.folder import Folder  # noqa: E402
from elastic_export.foreign.text_encoders import load_encoder  # noqa: E402
from elastic_export.foreign.weights import PLAIN  # noqa: E402
from elastic_runtime import ModelError  # noqa: E402

SCALE = 0.7
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# Names in files -> a module that they have the inputs of, and how many times its outputs.
Names = dict[str, tuple[str, int]]
DOUBLE: Names = {
    f"lora_unet_double_blocks_0_{stream}_attn_{name}": (f"{BLOCK}.attn.to_q", times)
    for stream in ("img", "txt")
    for name, times in (("qkv", 3), ("proj", 1))
}
FLUX: Names = DOUBLE | {
    "lora_unet_double_blocks_0_img_mlp_0": (f"{BLOCK}.ff.net.0.proj", 1), "lora_unet_double_blocks_0_txt_mlp_2": (f"{BLOCK}.ff.net.2", 1),
    "lora_unet_double_blocks_0_txt_mod_lin": (f"{BLOCK}.norm1.linear", 1), "lora_unet_single_blocks_0_linear2": (f"{SINGLE}.proj_out", 1),
    "lora_unet_single_blocks_0_modulation_lin": (f"{SINGLE}.norm.linear", 1),
}  # fmt: skip
CASES: dict[str, tuple[Callable[[], Any], str, Names]] = {
    "flux": (folders.flux, "FluxPipeline", FLUX),
    "comfy": (folders.flux, "FluxPipeline", {
        "diffusion_model.double_blocks.0.img_attn.qkv": (f"{BLOCK}.attn.to_q", 3),
        "diffusion_model.double_blocks.0.txt_mlp.0": (f"{BLOCK}.ff.net.0.proj", 1),
    }),
    "mixture": (folders.flux, "FluxPipeline", {
        "lora_transformer_transformer_blocks_0_attn_to_out_0": (f"{BLOCK}.attn.to_q", 1),
        "lora_transformer_single_transformer_blocks_0_attn_to_k": (f"{BLOCK}.attn.to_q", 1),
        "lora_transformer_context_embedder": ("context_embedder", 1),
    }),
    "flux2": (folders.flux2, "Flux2Pipeline", DOUBLE | {
        "lora_unet_double_blocks_0_img_mlp_0": (f"{BLOCK}.ff.linear_in", 1),
        "lora_unet_double_blocks_0_txt_mlp_2": (f"{BLOCK}.ff.linear_out", 1),
        "lora_unet_single_blocks_1_linear1": (f"{SINGLE}.attn.to_qkv_mlp_proj", 1),
        "lora_unet_single_blocks_0_linear2": (f"{SINGLE}.attn.to_out", 1),
        "lora_unet_img_in": ("x_embedder", 1), "lora_unet_time_in_out_layer": ("time_guidance_embed.timestep_embedder.linear_2", 1),
    }),
    "qwen": (folders.qwen_image, "QwenImagePipeline", {
        "lora_unet_transformer_blocks_0_attn_to_add_out": (f"{BLOCK}.attn.to_q", 1),
        "lora_unet_transformer_blocks_0_img_mlp_net_0_proj": (f"{BLOCK}.img_mlp.net.0.proj", 1),
        "lora_unet_transformer_blocks_0_txt_mod_1": (f"{BLOCK}.txt_mod.1", 1), "lora_unet_norm_out_linear": ("norm_out.linear", 1),
    }),
    "z-image": (folders.z_image, "ZImagePipeline", {
        "lora_unet_layers_0_attention_qkv": ("layers.0.attention.to_q", 3),
        "lora_unet_layers_0_attention_out": ("layers.0.attention.to_q", 1),
        "lora_unet_noise_refiner_0_attention_to_k": ("layers.0.attention.to_q", 1),
        "lora_unet_context_refiner_0_feed_forward_w1": ("layers.0.feed_forward.w1", 1),
    }),
}  # fmt: skip


def low_rank(names: Names, model: Any, alpha: bool = True) -> dict[str, Any]:
    random, weights = torch.Generator().manual_seed(3), {}
    for name, (module, times) in names.items():
        out, inner = model.get_submodule(module).weight.shape
        weights[f"{name}.lora_down.weight"] = torch.randn(3, inner, generator=random) * 0.3
        weights[f"{name}.lora_up.weight"] = torch.randn(times * out, 3, generator=random) * 0.3
        weights |= {f"{name}.alpha": torch.tensor(1.5)} if alpha else {}
    return weights


def save(weights: dict[str, Any], folder: Path) -> Path:
    save_file(weights, folder / "style.safetensors")
    return folder / "style.safetensors"


def fused(name: str, transformer: Any, file: Path, **parts: Any) -> Any:
    """Diffusers' own pipeline of these parts alone, the file fused."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    kind = getattr(diffusers, name)
    every = [each for each in inspect.signature(kind).parameters if each not in ("is_distilled", "kwargs", "patch_size")]
    pipe = kind(**dict.fromkeys(every) | {"transformer": transformer} | parts)
    pipe.load_lora_weights(file)
    pipe.fuse_lora(lora_scale=SCALE, components=["transformer", *parts])
    pipe.unload_lora_weights()
    return pipe


def difference(transformer: Any, wanted: Any) -> float:
    one, other = transformer.state_dict(), wanted.state_dict()
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", CASES)
def test_names_are_read_as_diffusers_reads_them(name: str, tmp_path: Path) -> None:
    make, pipeline, names = CASES[name]
    model, kind = make(), type(make())
    folder = folders.write(tmp_path / "m", model, decoder=False)
    file = save(low_rank(names, model), tmp_path)
    transformer = Folder.open(folder, (read_adapter(file, SCALE),)).component("transformer").load(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = fused(pipeline, model, file).transformer
    assert difference(transformer, wanted) < 1e-6
    changed = [key for key, value in wanted.state_dict().items() if (value - before[key]).abs().max() > 1e-3]
    assert len(changed) == sum(times for _, times in names.values())


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_a_module_without_an_alpha_has_its_rank(name: str, tmp_path: Path) -> None:
    make, pipeline, names = CASES[name]
    model = make()
    folder, weights = folders.write(tmp_path / "m", model, decoder=False), low_rank(names, model)
    del weights[f"{next(iter(names))}.alpha"]
    file = save(weights, tmp_path)
    transformer = Folder.open(folder, (read_adapter(file, SCALE),)).component("transformer").load(type(model))
    assert difference(transformer, fused(pipeline, model, file).transformer) < 1e-6


def dotted(weights: dict[str, Any]) -> dict[str, Any]:
    """Halves as PEFT has them, behind its prefix."""
    return {"base_model.model." + key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("make", "pipeline", "names"),
    [
        (folders.krea2, "Krea2Pipeline", {
            "blocks.1.attn.wo": (f"{BLOCK}.attn.to_out.0", 1), "txtfusion.layerwise_blocks.0.attn.wq": (
                "text_fusion.layerwise_blocks.0.attn.to_q", 1),
        }),
        (folders.flux2, "Flux2Pipeline", {
            "double_blocks.0.img_attn.qkv": (f"{BLOCK}.attn.to_q", 3), "single_blocks.1.linear1": (f"{SINGLE}.attn.to_qkv_mlp_proj", 1),
        }),
    ],
)  # fmt: skip
def test_pefts_prefix_before_names_of_public_code_needs_no_config(
    make: Callable[[], Any], pipeline: str, names: Names, tmp_path: Path
) -> None:
    model = make()
    folder = folders.write(tmp_path / "m", model, decoder=False)
    file = save(dotted(low_rank(names, model, alpha=False)), tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    transformer = Folder.open(folder, (read_adapter(file, SCALE),)).component("transformer").load(type(model))
    wanted = fused(pipeline, model, file).transformer
    assert difference(transformer, wanted) < 1e-6
    assert any((value - before[key]).abs().max() > 1e-3 for key, value in wanted.state_dict().items())


def test_the_same_of_flux_is_what_it_is_behind_comfys_prefix(tmp_path: Path) -> None:
    model = folders.flux()
    folder, states = folders.write(tmp_path / "m", model, decoder=False), []
    weights = dotted(low_rank({"double_blocks.0.img_attn.qkv": (f"{BLOCK}.attn.to_q", 3)}, model, alpha=False))
    for prefix in ("base_model.model.", "diffusion_model."):
        (tmp_path / prefix).mkdir()
        file = save({key.replace("base_model.model.", prefix): value for key, value in weights.items()}, tmp_path / prefix)
        states.append(Folder.open(folder, (read_adapter(file),)).component("transformer").load(type(model)))
    assert difference(*states) == 0 < difference(states[0], model)


def test_a_clip_is_changed_with_its_transformer(tmp_path: Path) -> None:
    """Its MLP as diffusers changes it, which reads past its attention (0.42 with transformers 5): that as by diffusers' own names."""
    folder, clip = folders.write(tmp_path / "m", folders.flux(), text=True), folders.clip()
    layer = next(name for name, _ in clip.named_modules() if name.endswith("layers.0.mlp.fc1"))
    weights = low_rank({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (layer, 1)}, clip)
    file = save(low_rank(DOUBLE, folders.flux()) | weights, tmp_path)
    theirs = fused("FluxPipeline", folders.flux(), file, text_encoder=clip)

    def ours(file: Path, component: str) -> Any:
        opened = Folder.open(folder, (read_adapter(file, SCALE),))
        return load_encoder(opened, component).encoder if "text" in component else opened.component(component).load(kind)

    kind = diffusers.FluxTransformer2DModel
    assert difference(ours(file, "text_encoder"), theirs.text_encoder) < 1e-6
    assert difference(theirs.text_encoder, folders.clip()) > 1e-3
    assert difference(ours(file, "transformer"), theirs.transformer) < 1e-6
    query = layer.replace("mlp.fc1", "self_attn.q_proj")
    named = []
    for name in ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", f"text_encoder.{query}"):
        (tmp_path / name).mkdir()
        named.append(ours(save(low_rank({name: (query, 1)}, clip), tmp_path / name), "text_encoder"))
    assert difference(*named) == 0 < difference(named[0], folders.clip())


def test_fused_projections_of_flux_at_its_own_width_are_split_as_diffusers_splits_them(tmp_path: Path) -> None:
    """Its converter knows no other width; halves of the last layer's modulation, which it drops with their names, are swapped."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    random, names = (
        torch.Generator().manual_seed(3),
        {"lora_unet_single_blocks_0_linear1": 7 * 3072, "lora_unet_final_layer_adaLN_modulation_1": 2 * 3072},
    )
    weights = {f"{name}.lora_down.weight": torch.randn(2, 3072, generator=random) for name in names}
    weights |= {f"{name}.lora_up.weight": torch.randn(out, 2, generator=random) for name, out in names.items()}
    made = changes((read_adapter(save(weights, tmp_path)),), "transformer", model, PLAIN, "FluxTransformer2DModel")
    theirs = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(weights))
    single = f"{SINGLE}.attn.to"
    assert set(made) == {
        f"{name}.weight" for name in (f"{single}_q", f"{single}_k", f"{single}_v", f"{SINGLE}.proj_mlp", "norm_out.linear")
    }
    for name in (f"{single}_v.weight", "norm_out.linear.weight"):
        prefix = name.removesuffix(".weight") if name.startswith("norm_out") else f"transformer.{name.removesuffix('.weight')}"
        wanted = theirs[f"{prefix}.lora_B.weight"] @ theirs[f"{prefix}.lora_A.weight"]
        assert (made[name](torch.zeros(wanted.shape)) - wanted).abs().max() < 1e-5, name


def test_krea_2_is_read_by_the_names_of_its_public_code(tmp_path: Path) -> None:
    model = folders.krea2()
    names: Names = {
        "diffusion_model.blocks.1.attn.wo": (f"{BLOCK}.attn.to_out.0", 1), "diffusion_model.blocks.0.mlp.gate": (f"{BLOCK}.ff.gate", 1),
        "diffusion_model.txtfusion.layerwise_blocks.0.attn.wq": ("text_fusion.layerwise_blocks.0.attn.to_q", 1),
        "diffusion_model.first": ("img_in", 1),
    }  # fmt: skip
    weights = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for key, value in low_rank(names, model, False).items()
    }
    folder, file = folders.write(tmp_path / "m", model, decoder=False), save(weights, tmp_path)
    transformer = Folder.open(folder, (read_adapter(file, SCALE),)).component("transformer").load(type(model))
    assert difference(transformer, fused("Krea2Pipeline", model, file).transformer) < 1e-6


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (folders.sd3, "lora_unet_joint_blocks_0_x_block_attn_qkv", "and of SD3Transformer2DModel those are not read, but of FLUX,"),
        (folders.flux2, "lora_unet_final_layer_adaLN_modulation_1", "Flux2Transformer2DModel has no final_layer_adaLN_modulation_1"),
        (folders.flux, "lora_unet_double_blocks_7_img_attn_qkv", "FluxTransformer2DModel has no double_blocks_7_img_attn_qkv; it has"),
    ],
)  # fmt: skip
def test_what_diffusers_does_not_convert_is_named(make: Callable[[], Any], name: str, message: str, tmp_path: Path) -> None:
    model = make()
    folder, file = folders.write(tmp_path / "m", model, decoder=False), save(low_rank({name: ("proj_out", 1)}, model), tmp_path)
    with pytest.raises(ModelError, match=message):
        Folder.open(folder, (read_adapter(file),)).component("transformer").load(type(model))
