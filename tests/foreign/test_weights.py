"""Nothing is exported whose weights are not the files': every tensor is there, fits, and is a number."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")

import folders  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.capture.folders import capture_folder  # noqa: E402
from elastic_export.families.sd3 import Sd3  # noqa: E402
from elastic_export.foreign.component import Component  # noqa: E402
from elastic_export.foreign.folder import Folder  # noqa: E402
from elastic_export.foreign.text_encoders import load_encoder  # noqa: E402
from elastic_export.foreign.vae import load_vae  # noqa: E402
from elastic_runtime import BundleError, ModelError, Span  # noqa: E402

Weights = dict[str, Tensor]
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors",
}  # fmt: skip
# A tensor of each that its graph uses.
TENSORS = {
    "transformer": "proj_out.weight", "vae": "decoder.conv_out.weight", "text_encoder": "encoder.layers.0.mlp.fc2.weight",
    "text_encoder_2": "encoder.block.0.layer.1.DenseReluDense.wo.weight",
}  # fmt: skip
IDS = torch.tensor([[3, 4, 5, 1, 0, 0]])


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "flux", folders.flux(), text=True)


def change(folder: Path, component: str, how: Callable[[Weights], Weights | None]) -> Path:
    """The folder with a component's weights changed in place or replaced."""
    file = folder / component / FILES[component]
    weights = load_file(file)
    save_file(how(weights) or weights, file, metadata={"format": "pt"})
    return folder


def full_name(weights: Weights, end: str) -> str:
    return next(name for name in weights if name.endswith(end))


def capture(folder: Path) -> None:
    capture_folder(folder, None, Span(16, 32), Span(1, 2), digest=False)


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda weights, name: weights.pop(name) is None, "it lacks {name}"),
        (lambda weights, name: weights.update({name + "_old": weights.pop(name)}), "it has unknown .*{name}_old; it lacks {name}"),
        (lambda weights, name: weights.update({name: weights[name][..., :1].contiguous()}), r"it has {name} of shape \([\d, ]*1\) where"),
        (lambda weights, name: weights.update({name: weights[name].to(torch.int8)}), "it has {name} as int8, which is quantised"),
        (lambda weights, name: weights.update({"stray.weight": torch.ones(2)}), "it has unknown .*stray.weight"),
    ],
    ids=["dropped", "renamed", "misshapen", "retyped", "stray"],
)
def test_weights_that_are_not_whole_are_refused_before_anything_is_exported(
    component: str, mutate: Callable[[Weights, str], object], message: str, flux: Path
) -> None:
    end = TENSORS[component]
    change(flux, component, lambda weights: mutate(weights, full_name(weights, end)))  # type: ignore[func-returns-value]
    name = r"(text_model\.)?" + re.escape(end)
    with pytest.raises(ModelError, match=rf"{component} does not fit \w+: .*{message.format(name=name)}"):
        capture(flux)


@pytest.mark.parametrize(("component", "word"), narrow([("transformer", "transformer"), ("vae", "vae"), ("text_encoder_2", "text")]))
def test_weights_of_other_values_do_not_join_a_bundle(component: str, word: str, flux: Path, tmp_path: Path) -> None:
    export = {"output": tmp_path / "bundle", "size": "16-32", "batch": "1-2", "components": word}
    bundle = elastic_export.export(flux, **export)  # type: ignore[arg-type]
    assert component in bundle.manifest.provenance.weights_sha256
    change(flux, component, lambda weights: weights.update({(n := full_name(weights, TENSORS[component])): 2 * weights[n]}))
    with pytest.raises(BundleError, match=rf"holds another export \(its {component}'s weights' SHA-256"):
        elastic_export.export(flux, precision="fp16", **export)  # type: ignore[arg-type]


def test_a_decoder_alone_is_enough(flux: Path) -> None:
    change(
        flux, "vae", lambda weights: {name: value for name, value in weights.items() if not name.startswith(("encoder.", "quant_conv."))}
    )
    latent = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    assert torch.equal(load_vae(flux / "vae")(latent), folders.vae().eval().decode(latent, return_dict=False)[0])


def test_attention_by_its_older_names_is_read(flux: Path) -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: Weights) -> Weights:
        return {
            re.sub(r"(attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)", lambda m: m[1] + older[m[2]], name): each
            for name, each in weights.items()
        }

    change(flux, "vae", rename)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in load_file(flux / "vae" / FILES["vae"])
    latent = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    assert torch.equal(load_vae(flux / "vae")(latent), folders.vae().eval().decode(latent, return_dict=False)[0])


@pytest.mark.parametrize(
    "how",
    [
        lambda weights: {"transformer." + name: value for name, value in weights.items()},
        lambda weights: weights | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2)},
        lambda weights: weights | {"encoder.embed_tokens.weight": weights["shared.weight"].clone()},
        lambda weights: {name.replace("shared.", "encoder.embed_tokens."): value for name, value in weights.items()},
    ],
    ids=["prefixed", "with a decoder", "embedding twice", "embedding by its other name"],
)
def test_t5_as_people_save_it(how: Callable[[Weights], Weights], flux: Path) -> None:
    change(flux, "text_encoder_2", how)
    (hidden,) = load_encoder(Folder.open(flux), "text_encoder_2")(IDS)
    assert torch.allclose(hidden, folders.t5()(IDS).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        lambda weights: {"text_model." + name.removeprefix("text_model."): value for name, value in weights.items()},
        lambda weights: {name.removeprefix("text_model."): value for name, value in weights.items()},
        lambda weights: weights | {"text_model.embeddings.position_ids": torch.arange(12)[None]},
        lambda weights: weights | {"vision_model.post_layernorm.weight": torch.ones(2), "logit_scale": torch.ones(())},
    ],
    ids=["named", "bare", "position ids", "a whole CLIP"],
)
def test_clip_as_people_save_it(how: Callable[[Weights], Weights], flux: Path) -> None:
    change(flux, "text_encoder", how)
    (pooled,) = load_encoder(Folder.open(flux), "text_encoder")(IDS)
    assert torch.equal(pooled, folders.clip()(IDS).pooler_output)


@pytest.mark.parametrize("row", [False, True], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_scaled_eight_bit_floats_are_multiplied_by_their_scales(component: str, name: str, row: bool, flux: Path) -> None:
    wanted: Weights = {}

    def narrow(weights: Weights) -> Weights:
        stored = {}
        for each, value in weights.items():
            wanted[each] = stored[each] = value
            if value.dim() == 2 and "relative" not in each and "shared" not in each:
                scale = (value.abs().amax(1, keepdim=True) if row else value.abs().max()) / 448
                stored[each] = (value / scale).to(torch.float8_e4m3fn)
                stored[each.removesuffix("weight") + name] = scale
                wanted[each] = stored[each].float() * scale
        return stored

    change(flux, component, narrow)
    folder = Folder.open(flux)
    if component == "transformer":
        from diffusers import FluxTransformer2DModel

        module = folder.component("transformer").load(FluxTransformer2DModel)
    else:
        module = load_encoder(folder, component).encoder
    state = module.state_dict()
    assert all(torch.equal(state[each], value) for each, value in wanted.items())
    assert any(value.dtype == torch.float8_e4m3fn for value in load_file(flux / component / FILES[component]).values())


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 2)])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...], flux: Path) -> None:
    def narrow(weights: Weights) -> Weights:
        name = "proj_out.weight"
        return weights | {name: weights[name].to(torch.float8_e4m3fn), "proj_out.weight_scale": torch.ones(shape)}

    change(flux, "transformer", narrow)
    with pytest.raises(ModelError, match=r"it has a scale of shape \(.*\) for proj_out.weight of shape"):
        capture(flux)


def test_scales_without_eight_bit_weights_are_stray(flux: Path) -> None:
    change(flux, "transformer", lambda weights: weights | {"proj_out.weight_scale": torch.ones(())})
    with pytest.raises(ModelError, match=r"it has unknown proj_out.weight_scale"):
        capture(flux)


def test_quantised_components_are_refused_by_their_config(flux: Path) -> None:
    config = flux / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ModelError, match=r"text_encoder_2 is quantised \(bitsandbytes, says its config.json\)"):
        capture(flux)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_components_that_there_are_in_half_precision_alone(variant: str, flux: Path) -> None:
    for component, file in FILES.items():
        change(
            flux, component, lambda weights: {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        )
        whole = flux / component / file
        whole.rename(whole.with_name(file.replace(".safetensors", f".{variant}.safetensors")))
    capture(flux)
    (hidden,) = load_encoder(Folder.open(flux), "text_encoder_2")(IDS)
    assert hidden.dtype == torch.float32
    assert torch.allclose(hidden, folders.t5()(IDS).last_hidden_state, atol=2e-2)
    assert load_vae(flux / "vae")(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


def test_an_index_that_promises_what_its_shards_lack_is_refused(tmp_path: Path) -> None:
    folders.flux().save_pretrained(tmp_path, max_shard_size="10KB")
    index = next(tmp_path.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["gone.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"lacks gone.weight, which .*index.json lists there"):
        Component(tmp_path).weight_files()
    index.write_text(json.dumps(content | {"weight_map": [1]}))
    with pytest.raises(ModelError, match="lists no shards"):
        Component(tmp_path).weight_files()


def test_an_encoder_is_of_the_class_that_the_index_names_as_its_pipeline_loads_it(tmp_path: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    folder = folders.write(tmp_path / "m", folders.sd3(), text=True)
    for component, written in (("text_encoder", "CLIPModel"), ("text_encoder_3", "T5ForConditionalGeneration")):
        config = folder / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [written]}))
    pooled, _ = load_encoder(Folder.open(folder), "text_encoder")(IDS)
    assert torch.allclose(pooled, folders.clip(CLIPTextModelWithProjection)(IDS).text_embeds, atol=1e-6)
    (hidden,) = load_encoder(Folder.open(folder), "text_encoder_3")(IDS)
    assert torch.allclose(hidden, folders.t5()(IDS).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("marked", [False, True])
def test_eight_bit_weights_whose_scale_is_lost_are_refused(marked: bool, flux: Path) -> None:
    def narrow(weights: Weights) -> Weights:
        first, second = [name for name, value in weights.items() if value.dim() == 2][:2]
        changed = weights | {name: (weights[name] * 100).to(torch.float8_e4m3fn) for name in (first, second)}
        scale = {} if marked else {first.removesuffix("weight") + "scale_weight": torch.tensor(0.01)}
        return changed | scale | ({"scaled_fp8": torch.zeros(0)} if marked else {})

    change(flux, "transformer", narrow)
    with pytest.raises(ModelError, match="holds none" if marked else "in eight bits without a scale, where others have theirs"):
        capture(flux)


def test_scales_of_activations_and_a_tokenizer_among_the_weights_are_left_aside(flux: Path) -> None:
    wanted: Weights = {}

    def narrow(weights: Weights) -> Weights:
        stored: Weights = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
        for name, value in weights.items():
            wanted[name] = stored[name] = value
            if name.endswith("DenseReluDense.wi.weight"):
                stored[name] = (value / value.abs().max() * 448).to(torch.float8_e4m3fn)
                bare = name.removesuffix("weight")
                stored |= {f"{bare}scale_weight": value.abs().max() / 448, f"{bare}scale_input": torch.ones(())}
                wanted[name] = stored[name].float() * stored[f"{bare}scale_weight"]
        return stored

    change(flux, "text_encoder_2", narrow)
    state = load_encoder(Folder.open(flux), "text_encoder_2").encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("held", ["shared.", "encoder.embed_tokens."])
def test_an_embedding_in_eight_bits_has_its_scale_by_either_of_its_names(name: str, held: str, flux: Path) -> None:
    wanted: Weights = {}

    def narrow(weights: Weights) -> Weights:
        value = weights.pop("shared.weight")
        scale = value.abs().max() / 448
        stored = (value / scale).to(torch.float8_e4m3fn)
        wanted["it"] = stored.float() * scale
        return weights | {f"{held}weight": stored, held + name: scale}

    change(flux, "text_encoder_2", narrow)
    state = load_encoder(Folder.open(flux), "text_encoder_2").encoder.state_dict()
    assert all(torch.equal(state[each], wanted["it"]) for each in ("shared.weight", "encoder.embed_tokens.weight"))


def test_a_single_file_of_the_public_code_is_told_what_to_do_with(flux: Path) -> None:
    whole = flux / "transformer" / FILES["transformer"]
    whole.rename(whole.with_name("flux1-dev-fp8.safetensors"))
    with pytest.raises(
        ModelError, match=r"by the names that diffusers .* it has config.json, flux1-dev-fp8.safetensors. .*from_single_file"
    ):
        capture(flux)


@pytest.mark.parametrize("types", [(torch.bfloat16,), (torch.float16, torch.bfloat16)])
def test_sd3s_table_of_places_may_have_been_rounded(types: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    """Also twice: the published weights are in float16, and people save them in bfloat16."""
    from diffusers import SD3Transformer2DModel

    folder = folders.write(tmp_path / "m", folders.sd3(pos_embed_max_size=96), decoder=False)

    def rounded(weights: Weights) -> Weights:
        for kind in types:
            weights = {name: value.to(kind) for name, value in weights.items()}
        return weights

    def load() -> None:
        Sd3(Folder.open(folder).component("transformer").load(SD3Transformer2DModel))

    change(folder, "transformer", rounded)
    load()
    change(folder, "transformer", lambda weights: weights | {"pos_embed.pos_embed": weights["pos_embed.pos_embed"].float() + 0.01})
    with pytest.raises(ModelError, match="position table is not the analytic sin-cos table"):
        load()


def test_a_tensor_that_two_shards_have_is_refused(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    folders.flux().save_pretrained(tmp_path, max_shard_size="10KB")
    one, two = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(one).items()))
    save_file(load_file(two) | {name: value + 1}, two, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"has {re.escape(name)}, and so has .*: which one is meant"):
        Component(tmp_path).load(FluxTransformer2DModel)
