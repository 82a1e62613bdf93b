"""LoRA files are fused as diffusers fuses them, and what does not fit is named."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")

import diffusers  # noqa: E402
import folders  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.foreign.adapters import parse, read_adapter  # noqa: E402
from elastic_export.foreign.folder import Folder  # noqa: E402
from elastic_export.foreign.text_encoders import load_encoder  # noqa: E402
from elastic_runtime import BundleError, ElasticPipeline, ModelError, Request, UsageError, open_session  # noqa: E402
from elastic_runtime.contract.manifest import Adapter  # noqa: E402
from elastic_runtime.ralu.patches import pack  # noqa: E402

Weights = dict[str, Tensor]
SCALE = 0.7
KINDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "flux": (folders.flux, "FluxPipeline", "FluxTransformer2DModel"),
    "sd3": (folders.sd3, "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "qwen": (folders.qwen_image, "QwenImagePipeline", "QwenImageTransformer2DModel"),
}
# Attention and an MLP, what the wrappers turn around (SD3's last projection and its patches), and the pooled condition.
TARGETS = ["to_q", "to_k", "to_out.0", "add_v_proj", "proj_out", "linear_1", "net.0.proj", "pos_embed.proj", "context_embedder"]


def low_rank(
    model: Any, component: str, rank: int = 3, form: tuple[str, str] = ("lora_A", "lora_B"), alpha: float | None = None
) -> Weights:
    """Random halves for what `TARGETS` has of a model, some with another rank."""
    random, weights = torch.Generator().manual_seed(7), {}
    for name, module in model.named_modules():
        if not any(name == end or name.endswith(f".{end}") for end in (*TARGETS, "q_proj", "fc1", "wo")) or not hasattr(module, "weight"):
            continue
        r = rank + 1 if name.endswith("to_k") else rank
        out, *inner = module.weight.shape
        prefix = f"{component}.{name}" if component else name
        weights[f"{prefix}.{form[0]}.weight"] = torch.randn(r, *inner, generator=random) * 0.3
        weights[f"{prefix}.{form[1]}.weight"] = torch.randn(out, r, *[1] * len(inner[1:]), generator=random) * 0.3
        if alpha is not None:
            weights[f"{prefix}.alpha"] = torch.tensor(alpha)
    assert weights
    return weights


def save(weights: Weights, file: Path, config: dict[str, Any] | None = None) -> Path:
    save_file(weights, file, metadata={"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config else {}))
    return file


def pipeline(kind: str, text: bool = False) -> Any:
    """Diffusers' own pipeline of the random model."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    make, name, _ = KINDS[kind]
    parts: dict[str, Any] = dict.fromkeys(["text_encoder", "tokenizer"])
    parts |= {f"{part}_{i}": None for part in ("text_encoder", "tokenizer") for i in {"flux": [2], "sd3": [2, 3], "qwen": []}[kind]}
    parts |= {"text_encoder": folders.clip(), "text_encoder_2": folders.t5()} if text else {}
    vae = folders.frame_vae() if kind == "qwen" else folders.vae().eval()
    pipe = getattr(diffusers, name)(transformer=make(), vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fused(file: Path, kind: str, scale: float = SCALE, text: bool = False) -> Any:
    """Diffusers' own pipeline with the file fused."""
    pytest.importorskip("peft", reason="diffusers loads LoRA files by peft")
    pipe = pipeline(kind, text)
    pipe.load_lora_weights(file)
    pipe.fuse_lora(lora_scale=scale, components=["transformer", *(["text_encoder"] if text else [])])
    pipe.unload_lora_weights()
    return pipe


def ours(folder: Path, file: Path, kind: str, scale: float = SCALE) -> Any:
    """The transformer as an export reads it."""
    opened = Folder.open(folder, (read_adapter(file, scale),))
    return opened.component("transformer").load(getattr(diffusers, KINDS[kind][2]))


def same(model: Any, wanted: Any) -> float:
    """The largest difference between two models' weights; both must be changed ones of the same names."""
    one, other = model.state_dict(), wanted.state_dict()
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind and a folder of it."""
    return request.param, folders.write(tmp_path_factory.mktemp(request.param) / "m", KINDS[request.param][0]())


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "flux", folders.flux(), text=True)


CONFIG = {
    "transformer.r": 3, "transformer.lora_alpha": 6, "transformer.rank_pattern": {"to_k": 4}, "transformer.alpha_pattern": {"to_k": 1.5},
    "transformer.target_modules": TARGETS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "bias", "lengths"),
    [
        (None, False, ""),
        (None, True, ""),
        (CONFIG, False, ""),
        (CONFIG | {"transformer.use_rslora": True}, False, ""),
        (None, False, ".weight"),
        (CONFIG | {"transformer.use_dora": True}, False, " "),
    ],
    ids=["plain", "bias", "header", "rslora", "dora", "dora in the header"],
)
def test_fused_weights_are_diffusers_own(
    config: dict[str, Any] | None, bias: bool, lengths: str, made: tuple[str, Path], tmp_path: Path
) -> None:
    kind, folder = made
    weights = low_rank(KINDS[kind][0](), "transformer")
    for name, value in list(weights.items()) if lengths else ():
        if ".lora_B." in name:  # where the row's own length would be about 1
            shape = (len(value),) if value.dim() == 2 else (1, len(value), 1, 1)
            weights[name.split(".lora_B.")[0] + ".lora_magnitude_vector" + lengths.strip()] = torch.rand(shape) + 0.5
    weights |= {
        name.replace("weight", "bias"): value[:, 0].contiguous() for name, value in weights.items() if bias and "to_q.lora_B" in name
    }
    file = save(weights, tmp_path / "style.safetensors", config)
    wanted = fused(file, kind).transformer
    assert same(ours(folder, file, kind), wanted) < 1e-6
    assert same(wanted, KINDS[kind][0]()) > 1e-2  # it did change


def test_alphas_in_the_file_count(made: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = made
    file = save(low_rank(KINDS[kind][0](), "transformer", alpha=1.5), tmp_path / "style.safetensors")
    theirs = file
    if kind != "flux":  # diffusers reads alphas of SD3 from the header alone, and of Qwen-Image where no component is named
        theirs = save(low_rank(KINDS[kind][0](), "transformer"), tmp_path / "header.safetensors", CONFIG | {
            "transformer.lora_alpha": 1.5, "transformer.alpha_pattern": {}})  # fmt: skip
    assert same(ours(folder, file, kind), fused(theirs, kind).transformer) < 1e-6


@pytest.mark.parametrize("component", ["transformer", "diffusion_model", "", "base_model.model.transformer"])
@pytest.mark.parametrize("form", [("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")])
def test_other_forms_of_the_names_are_the_same_change(
    component: str, form: tuple[str, str], made: tuple[str, Path], tmp_path: Path
) -> None:
    kind, folder = made
    plain = save(low_rank(KINDS[kind][0](), "transformer", alpha=1.5), tmp_path / "plain.safetensors")
    file = save(low_rank(KINDS[kind][0](), component, form=form, alpha=1.5), tmp_path / "other.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 2}))
    if component.startswith("base_model"):  # whose alphas the config tells: once is enough
        with pytest.raises(ModelError, match="its adapter_config.json has one for all"):
            read_adapter(file)
        file = save(low_rank(KINDS[kind][0](), component, form=form), tmp_path / "other.safetensors")
        half = save(
            low_rank(KINDS[kind][0](), "transformer"), tmp_path / "half.safetensors", {"transformer.lora_alpha": 2, "transformer.r": 3}
        )
        assert same(ours(folder, file, kind), ours(folder, half, kind)) == 0
    else:
        assert same(ours(folder, file, kind), ours(folder, plain, kind)) == 0


def test_qwen_lightnings_form_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.qwen_image())
    file = save(low_rank(folders.qwen_image(), "", form=("lora_down", "lora_up"), alpha=6.0), tmp_path / "lightning.safetensors")
    assert same(ours(folder, file, "qwen"), fused(file, "qwen").transformer) < 1e-6


def test_two_adapters_are_added_and_take_their_own_scales(made: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = made
    one = save(low_rank(KINDS[kind][0](), "transformer"), tmp_path / "one.safetensors")
    doubled = {name: (-2 if "lora_B" in name else 1) * value for name, value in load_file(one).items()}
    two = save(doubled, tmp_path / "two.safetensors")
    kinds = getattr(diffusers, KINDS[kind][2])
    both = Folder.open(folder, (read_adapter(one, 0.5), read_adapter(two, 0.25))).component("transformer").load(kinds)
    assert same(both, KINDS[kind][0]()) < 1e-6  # 0.5 - 2 * 0.25 of the same change


def test_pictures_are_those_of_diffusers_with_its_text_encoder_changed_too(flux: Path, tmp_path: Path) -> None:
    weights = low_rank(folders.flux(), "transformer") | low_rank(folders.clip(), "text_encoder")
    file = save(weights, tmp_path / "style.safetensors")
    bundle = elastic_export.export(flux, output=tmp_path / "b", size="32", batch="1-2", adapters=[f"{file}:{SCALE}"], verify="ends")
    (record,) = bundle.manifest.provenance.adapters
    assert record == Adapter(name="style.safetensors", sha256=read_adapter(file).sha256, scale=SCALE)
    theirs = fused(file, "flux", text=True)
    assert same(load_encoder(Folder.open(flux, (read_adapter(file, SCALE),)), "text_encoder").encoder, theirs.text_encoder) < 1e-6
    theirs.tokenizer, theirs.tokenizer_2 = (AutoTokenizer.from_pretrained(flux / name) for name in ("tokenizer", "tokenizer_2"))
    theirs.tokenizer_max_length = 12
    noise = np.random.default_rng(1).standard_normal((1, 4, 16, 16)).astype(np.float32)
    start = torch.from_numpy(pack(noise, 2).astype(np.float32))
    drawn = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.5, "output_type": "np"}
    wanted = theirs(["a cat"], latents=start, max_sequence_length=6, **drawn).images
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        pictures = pipe.draw(Request(prompt=("a cat",), plan="full", noise=noise, **drawn)).images  # type: ignore[arg-type]
    assert np.abs(pictures - wanted).max() < 2e-5


@pytest.mark.parametrize("kind", narrow(["sd3", "qwen"]))
def test_the_exported_graph_answers_as_diffusers_fused_transformer(kind: str, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", KINDS[kind][0]())
    file = save(low_rank(KINDS[kind][0](), "transformer"), tmp_path / "style.safetensors")
    bundle = elastic_export.export(
        folder, output=tmp_path / "b", size="32", batch="1-2", adapters=[(file, SCALE)], components="transformer", verify="ends"
    )  # fmt: skip
    theirs, random = fused(file, kind).transformer, np.random.default_rng(0)
    latent = random.standard_normal((1, 4, 16, 16)).astype(np.float32)
    text = random.standard_normal((1, 6, folders.WIDTH)).astype(np.float32)
    tokens, sigma = pack(latent, 2).astype(np.float32), np.array([0.8], np.float32)
    rows, columns = (axis.reshape(-1) for axis in np.mgrid[:8, :8].astype(np.float32))
    feeds = {"hidden_states": tokens, "encoder_hidden_states": text, "timestep": sigma}
    with torch.no_grad():
        if kind == "sd3":
            pooled = random.standard_normal((1, 2 * folders.POOLED)).astype(np.float32)
            feeds |= {"pooled_projections": pooled, "pos_ids": np.stack([rows, columns], -1) + 2}  # 8 of 12 places, centred
            given = (torch.from_numpy(latent), torch.from_numpy(text), torch.from_numpy(pooled), torch.from_numpy(sigma) * 1000)
            wanted = pack(theirs(*given, return_dict=False)[0].numpy(), 2)
        else:
            places = np.arange(6, dtype=np.float32) + 4
            feeds |= {"img_ids": np.stack([0 * rows, rows - 4, columns - 4], -1), "txt_ids": np.stack([places] * 3, -1)}
            wanted = theirs(
                torch.from_numpy(tokens), torch.from_numpy(text), timestep=torch.from_numpy(sigma), img_shapes=[[(1, 8, 8)]],
                return_dict=False,
            )[0].numpy()  # fmt: skip
    with open_session(bundle) as session:
        prediction = session.run(feeds)["prediction"]
    assert np.abs(prediction - wanted).max() < 1e-5
    assert np.abs(prediction - wanted).max() < 1e-4 * np.abs(wanted).max()


def stray(weights: Weights) -> None:
    weights["transformer.double_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(3, 32)
    weights["transformer.double_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(32, 3)


KEY = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stray, r"double_blocks.0.attn.to_q.lora_A.weight, and FluxTransformer2DModel has no double_blocks.0.attn.to_q; it has .*"
         "attn.to_q.* and others: it is a LoRA of another model"),
        (lambda w: w.update({f"{KEY}.lora_A.weight": torch.ones(3, 31)}), r"to_q.lora_A.weight and its other half, \(3, 31\) and \(32, 3\),"
         r" do not make a change of transformer_blocks.0.attn.to_q.weight, which has shape \(32, 32\)"),
        (lambda w: w.update({f"{KEY}.lora_A.weight": torch.ones(2, 32)}), r"have shapes \(2, 32\) and \(32, 3\), and should share a rank"),
        (lambda w: w.pop(f"{KEY}.lora_B.weight") is None, "has .*to_q.lora_A.weight and not the other half"),
        (lambda w: w.update({f"{KEY}.lora_A.weight": torch.ones(3, 32).to(torch.int8)}), "lora_A.weight as int8: take the LoRA"),
        (lambda w: w.update({f"{KEY}.lora_magnitude_vector": torch.ones(32)}), "has lora_magnitude_vector of some modules, and of "),
        (lambda w: w.update({f"{KEY}.dora_scale": torch.ones(32)}), "dora_scale: that is DoRA as LyCORIS writes it"),
        (lambda w: w.update({"lora_te3_wo.lora_down.weight": torch.ones(3, 32)}), "kohya's change of a second text encoder"),
        (lambda w: w.update({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(3, 32),
                             "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(96, 3)}),
         r"qkv.lora_down.weight and transformer.transformer_blocks.0.attn.to_k.lora_A.weight, which both change"),
        (lambda w: w.update({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(3, 32),
                             "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(95, 3)}),
         "has no double_blocks_0_img_attn_qkv"),
        (lambda w: w.update({"transformer.norm_out.scale": torch.ones(3)}), "has transformer.norm_out.scale, which no LoRA of diffusers"),
        (lambda w: w.update({f"{KEY}.alpha": torch.tensor(2.0)}), "has alphas of transformer.transformer_blocks.0.attn.to_q, and none of"),
        (lambda w: w.update({"transformer.other.alpha": torch.tensor(2.0)}), "has an alpha of transformer.other and no weights of it"),
        (lambda w: w.update({f"{KEY}.alpha": torch.ones(2)}), r"to_q.alpha is one number, got a tensor of shape \(2,\)"),
        (lambda w: w.update({f"{KEY}.lora_B.bias": torch.ones(5)}), r"has a bias of shape \(5,\) for transformer_blocks.0.attn.to_q.bias"),
        (lambda w: w.update({f"{KEY}.lora_down.weight": torch.ones(3, 32)}), "lora_A.weight.* which one is meant|so has it"),
        (lambda w: w.update({"text_encoder_3.wo.lora_A.weight": torch.ones(1, 2), "text_encoder_3.wo.lora_B.weight": torch.ones(2, 1)}),
         "has text_encoder_3.wo.lora_A.weight, and .*flux has no text_encoder_3, but transformer, vae, text_encoder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: Callable[[Weights], object], message: str, flux: Path, tmp_path: Path) -> None:
    weights = low_rank(folders.flux(), "transformer")
    change(weights)
    with pytest.raises(ModelError, match=message):
        elastic_export.export(flux, output=tmp_path / "b", size="32", adapters=[save(weights, tmp_path / "a.safetensors")], verify="none")
    assert not (tmp_path / "b").exists()


def test_a_change_that_is_not_finite_is_named(flux: Path, tmp_path: Path) -> None:
    weights = low_rank(folders.flux(), "transformer") | {f"{KEY}.lora_A.weight": torch.full((3, 32), torch.nan)}
    read = ours(flux, save(weights, tmp_path / "a.safetensors"), "flux")
    with pytest.raises(ModelError, match=r"a.safetensors: .*to_q.lora_A.weight makes a change that is not finite: its training diverged"):
        read.transformer_blocks[0].attn.to_q.weight + 0


def test_what_is_no_lora_is_refused(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.safetensors is no LoRA: it holds .* and no lora_A"):
        read_adapter(flux / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ModelError, match="cut.safetensors is not a readable safetensors file"):
        read_adapter(tmp_path / "cut.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"lora.bin is no .safetensors file: pickles could run code"):
        read_adapter(tmp_path / "lora.bin")
    with pytest.raises(ModelError, match="is a folder, which holds cut.safetensors: name the file"):
        read_adapter(tmp_path)
    with pytest.raises(ModelError, match=r"none.safetensors does not exist"):
        read_adapter(tmp_path / "none.safetensors")


@pytest.mark.parametrize("config", ["{", "[]", '{"transformer.lora_alpha": "much"}', '{"transformer.use_dora": true}',
                                    '{"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"(a+)+b": 2}}'])  # fmt: skip
def test_a_header_that_tells_no_alpha_is_refused(config: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(low_rank(folders.flux(), "transformer"), file, metadata={"lora_adapter_metadata": config})
    with pytest.raises(ModelError, match="is no JSON object|alpha of .* is a number, got 'much'|is a DoRA|is no name of a module"):
        read_adapter(file)


def test_pefts_own_file_needs_its_config(tmp_path: Path) -> None:
    file = save(low_rank(folders.flux(), "base_model.model"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"whose alpha adapter_config.json tells, and there is none beside it"):
        read_adapter(file)


def test_a_scale_is_written_after_the_file(tmp_path: Path) -> None:
    assert parse("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse("a.safetensors:-0.5") == (Path("a.safetensors"), -0.5)
    odd = tmp_path / "a.safetensors:2"
    odd.write_bytes(b"")
    assert parse(str(odd)) == (odd, 1.0)
    for text in ("a.safetensors:x", "a.safetensors:nan", "a.safetensors:1e9", "a.safetensors:"):
        with pytest.raises(UsageError, match=r"is written FILE.safetensors or FILE.safetensors:0.8, and .* is no scale"):
            parse(text)


def test_adapters_are_for_folders_and_a_bundle_is_of_one_set(flux: Path, tmp_path: Path) -> None:
    file = save(low_rank(folders.flux(), "transformer"), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"--adapter are for a diffusers folder, and elit-mnist is none"):
        elastic_export.export("elit-mnist", output=tmp_path / "z", adapters=[file])
    given: dict[str, Any] = {"output": tmp_path / "b", "size": "32", "batch": 1, "components": "transformer", "verify": "none"}
    elastic_export.export(flux, adapters=[file], **given)
    with pytest.raises(BundleError, match=r"holds another export \(its adapters: a.safetensors:1 .* there, none here"):
        elastic_export.export(flux, precision="fp16", **given)


def test_the_command_takes_several_and_says_what_is_wrong(flux: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    file = save(low_rank(folders.flux(), "transformer"), tmp_path / "a.safetensors")
    both = save(low_rank(folders.flux(), "transformer") | low_rank(folders.clip(), "text_encoder"), tmp_path / "both.safetensors")
    asked = ("onnx", flux, "-o", tmp_path / "b", "--size", "32", "--components", "transformer", "--dry-run")
    done = run(*asked, "--adapter", f"{file}:0.5", "--adapter", both)
    assert (done.code, "both.safetensors changes text_encoder too" in " ".join(done.err.split())) == (0, True)
    wrong = run(*asked, "--adapter", f"{file}:loud")
    assert (wrong.code, "'loud' is no scale" in wrong.err) == (2, True)
    assert run("onnx", "-o", tmp_path / "z", "--adapter", file).code == 2
