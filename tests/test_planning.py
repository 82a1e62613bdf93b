"""Forecasts: what an export's own manifest and the cost model say, from configs alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="models are described in torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")

import folders  # noqa: E402
import language_models  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.capture.capture import capture  # noqa: E402
from elastic_export.capture.folders import capture_folder  # noqa: E402
from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.planning import Forecast  # noqa: E402
from elastic_runtime import BudgetError, ModelError, Span, UsageError  # noqa: E402
from elastic_runtime.choosing.cost import Costs, Rates, plan_flops  # noqa: E402
from elastic_runtime.contract.budget import Budget  # noqa: E402
from elastic_runtime.device import catalogue, listed_peak  # noqa: E402
from elastic_runtime.ralu.offers import offers  # noqa: E402

ORIN = "jetson-agx-orin-64"
PEAK = next(listed_peak(entry) for entry in catalogue() if entry.id == ORIN)
FAMILIES: dict[str, tuple[Callable[[], Any], bool, int]] = {  # with text encoders of its own here, branches of guidance
    "flux": (folders.flux, True, 1), "sd3": (folders.sd3, True, 2), "qwen": (folders.qwen_image, False, 2),
    "flux2": (folders.flux2, False, 2), "z-image": (folders.z_image, False, 2), "krea2": (folders.krea2, False, 2),
}  # fmt: skip
LAST = {"flux": "text_encoder_2", "sd3": "text_encoder_3"}  # T5
# FLUX.2 klein 4B's transformer, as its repository has it.
KLEIN = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32], "in_channels": 128,
    "joint_attention_dim": 7680, "mlp_ratio": 3.0, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20,
    "out_channels": None, "patch_size": 1, "rope_theta": 2000, "timestep_guidance_channels": 256, "guidance_embeds": False, "eps": 1e-6,
}  # fmt: skip


def bare(folder: Path, made: Path) -> Path:
    """A copy of a folder with its configs and nothing else."""
    return Path(
        shutil.copytree(folder, made, ignore=lambda _, names: [name for name in names if "tokenizer" in name or "safetensors" in name])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_alone_tell_what_an_export_does(name: str, tmp_path: Path) -> None:
    make, text, branches = FAMILIES[name]
    folder = folders.write(tmp_path / "m", make(), text=text)
    forecast = elastic_export.plan(bare(folder, tmp_path / "bare"), device=ORIN, steps=3, precisions="fp16")
    captured = capture_folder(folder, None, None, Span(1, 2), digest=False)
    sizes = {graph.name: sum(p.numel() for p in graph.module.parameters()) for graph in captured.graphs}
    unwrapped = sum(parameter.numel() for parameter in make().parameters()) - sizes.get("text_fusion", 0)
    # T5's module holds its embedding under two names, and its graph once.
    t5 = {each: sum(p.numel() for p in folders.t5().parameters()) for each in sizes if each == LAST.get(name)}
    assert forecast.parameters == sizes | {"denoiser": unwrapped} | t5
    assert (forecast.branches, forecast.model) == (branches, "bare")
    manifest = capture_folder(folder, ("transformer", "vae"), None, Span(1, 2), digest=False).manifest  # of as much text as it may take
    assert manifest.model.patches is not None
    unit = manifest.model.patches.size * (manifest.model.vae.upscale if manifest.model.vae else 1)
    tokens = forecast.size[0] // unit, forecast.size[1] // unit
    offered = offers(3, tokens[0] * tokens[1], manifest.model.config["scheduler"], manifest.model.few_steps)
    plans = {each: offered[each] for each in ("full", "4x", "7x", "speed")}
    assert [way.name for way in forecast.ways] == list(plans)
    for way in forecast.ways:
        assert way.flops == pytest.approx(branches * plan_flops(manifest, plans[way.name], tokens), rel=1e-9)
        assert way.steps == plans[way.name].total
    alone = Costs(manifest, Rates.of(PEAK, "fp16"), "fp16")
    counts = manifest.model.patches.filled_all(plans["full"].step_tokens(*tokens))
    drawn = sum(alone.seconds(Budget(tokens=count), branches) for count in counts)
    assert drawn < forecast.ways[0].seconds["fp16"] < drawn + 0.01  # text and decoder are a small model's


def test_text_and_decoder_are_counted_as_the_exported_graphs_run(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.flux(), text=True)
    forecast = elastic_export.plan(bare(folder, tmp_path / "bare"), device=ORIN, size=32)
    vae, clip, t5 = folders.vae().eval(), folders.clip(), folders.t5()
    runs = {
        "decoder": lambda: vae.decode(torch.zeros(1, 4, 16, 16)), "text_encoder": lambda: clip(torch.zeros(1, 12, dtype=torch.long)),
        "text_encoder_2": lambda: t5(torch.zeros(1, 512, dtype=torch.long)),
    }  # fmt: skip
    for name, run in runs.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert forecast.flops[name] == counter.get_total_flops(), name


def test_text_encoders_are_held_one_after_the_other(tmp_path: Path) -> None:
    folder = bare(folders.write(tmp_path / "m", folders.sd3(), text=True), tmp_path / "bare")
    for name, rows in (("text_encoder_2", 3_000_000), ("text_encoder_3", 4_000_000)):  # more than drawing takes
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": rows}))
    (row,) = elastic_export.plan(folder, device=ORIN, precisions="fp32").memory
    assert row.peak == max(row.weights.values()) == row.weights["text_encoder_3"]


def test_the_fusion_of_text_is_counted_once_a_picture_and_branch(tmp_path: Path) -> None:
    transformer = folders.krea2()
    folder = bare(folders.write(tmp_path / "m", transformer), tmp_path / "bare")
    guided, alone = (elastic_export.plan(folder, device=ORIN, steps=2, precisions="fp32", guidance=scale) for scale in (3.0, 0.0))
    tapped = torch.zeros(1, guided.text_tokens, transformer.config.num_text_layers, folders.WIDTH)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer.text_fusion(tapped)
    assert guided.flops["text_fusion"] == counter.get_total_flops()
    assert guided.parameters["text_fusion"] == sum(parameter.numel() for parameter in transformer.text_fusion.parameters())
    assert guided.memory[0].weights["text_fusion"] == 4 * guided.parameters["text_fusion"]
    assert (guided.branches, alone.branches) == (2, 1)


def test_a_language_model_is_counted_down_to_the_last_state_that_is_kept(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", folders.z_image(), decoder=False)
    whole = language_models.qwen3()
    language_models.write(folder, whole)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "Qwen3ForCausalLM"]}))
    forecast = elastic_export.plan(folder, device=ORIN)
    kept = whole.model.embed_tokens, *whole.model.layers[:-1]  # Z-Image takes the state before the last layer
    assert forecast.parameters["text_encoder"] == sum(parameter.numel() for part in kept for parameter in part.parameters())
    assert forecast.flops["text_encoder"] > 0


def test_a_shorter_prompt_takes_less(tmp_path: Path) -> None:
    folder = bare(folders.write(tmp_path / "m", folders.flux(), text=True), tmp_path / "bare")
    short, usual = (elastic_export.plan(folder, max_sequence_length=length) for length in (64, None))
    assert (short.text_tokens, usual.text_tokens) == (64, 512)
    assert short.ways[0].flops < usual.ways[0].flops
    assert short.flops["text_encoder_2"] < usual.flops["text_encoder_2"]


def klein(folder: Path) -> Path:
    (folder / "klein.json").write_text(json.dumps(KLEIN))
    return folder / "klein.json"


def test_klein_4b_on_devices_before_anything_of_it_is_here(tmp_path: Path) -> None:
    forecast = elastic_export.plan(klein(tmp_path), device=ORIN, size=64, steps=4, guidance=1.0)  # latents: a VAE would tell of pixels
    assert forecast.parameters["denoiser"] / 1e9 == pytest.approx(3.88, rel=2e-3)
    full = forecast.ways[0]
    assert full.flops / 4e12 == pytest.approx(34.82, rel=2e-4)
    weights = {row.precision: row.weights["denoiser"] / forecast.parameters["denoiser"] for row in forecast.memory}
    few = {"int8qdq": 1, "fp8": 1, "int4qdq": 0.53125, "nvfp4": 0.5625}
    assert weights == pytest.approx({"fp32": 4, "fp16": 2, "bf16": 2, "int8w": 1 + 5 / 64, "int8": 1, "int4w": 0.640625} | few)
    rates = Rates.of(PEAK, "fp16")
    assert full.seconds["fp16"] == pytest.approx(4 * (34.82e12 / (rates.flops * rates.efficiency) + rates.overhead), rel=1e-3)
    assert any("--size counts those of the latent" in note for note in forecast.notes)
    small = elastic_export.plan(klein(tmp_path), device="jetson-orin-nano-8", size=64, precisions=["fp32", "int4w"])
    assert [row.fits for row in forecast.memory if row.precision == "fp16"] == [True]
    assert small.memory[0].fits is False


def test_budgets_of_the_zoo_are_its_own_rows() -> None:
    forecast = elastic_export.plan("elit-mnist", device="apple-m2", steps=5, precisions=["fp32", "fp16"])
    manifest = capture(load(Request("elit-mnist")), {}, Span(1, 2)).manifest
    peak = next(listed_peak(entry) for entry in catalogue() if entry.id == "apple-m2")
    for way in forecast.ways:
        budget = Budget(latents=int(way.name.removeprefix("latents=")))
        for precision in ("fp32", "fp16"):
            costs = Costs(manifest, Rates.of(peak, precision), precision)
            assert way.seconds[precision] == pytest.approx(5 * costs.seconds(budget, 2))
        assert way.flops == 10 * Costs(manifest, Rates(1, 1)).work(budget).flops
    assert [way.name for way in (forecast.ways[0], forecast.ways[-1])] == ["latents=16", "latents=256"]
    assert forecast.parameters["denoiser"] == manifest.cost[0].weight_bytes // 4
    assert elastic_export.plan("elit-mnist", device="apple-m2", guidance=1.0).branches == 1


def test_a_model_of_classes_is_led_as_generate_leads_it_whatever_draws_it() -> None:
    for name in ("elit-mnist", "ralu-digits"):
        forecast, alone = (elastic_export.plan(name, device="apple-m2", guidance=scale) for scale in (None, 1.0))
        assert (forecast.branches, alone.branches) == (2, 1), name
        assert forecast.ways[0].flops == 2 * alone.ways[0].flops, name


def test_presets_families_with_a_config_and_this_machine(tmp_path: Path) -> None:
    config = {
        "family": "elit-sit", "input_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 3, "num_heads": 2,
        "num_classes": 10, "group_size": 2, "head_blocks": 1, "tail_blocks": 1,
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(config))
    by_config, by_name = elastic_export.plan(tmp_path / "own.json"), elastic_export.plan("elit-sit", config=tmp_path / "own.json")
    assert (by_config.parameters, by_config.ways) == (by_name.parameters, by_name.ways)
    assert by_config.memory_bytes
    assert any("its decoder (--vae at export) is not counted" in note for note in by_config.notes)
    with pytest.raises(UsageError, match="own.json is a config itself: --config does not go with it"):
        elastic_export.plan(tmp_path / "own.json", config=tmp_path / "own.json")
    with pytest.raises(UsageError, match="are for a diffusers folder, and .*own.json is none"):
        elastic_export.plan(tmp_path / "own.json", size=512)
    assert elastic_export.plan("elit-sit-xl-256", device="l4").parameters["denoiser"] / 1e6 == pytest.approx(705, rel=1e-2)


def test_a_folder_of_one_size_has_budgets(golden: Path) -> None:
    forecast: Forecast = elastic_export.plan(golden / "elit-qwen-image-a", device=ORIN, size="16x24")
    assert forecast.size == (16, 24)
    assert all(way.name.startswith("latents=") for way in forecast.ways)
    assert forecast.ways[0].flops < forecast.ways[-1].flops


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": "orin"}, UsageError, r"there is no device 'orin' in the catalogue; there are jetson-orin-nano-8, .*and here"),
        ({"device": "pdp-11"}, UsageError, "there are jetson-orin-nano-8, .*raspberry-pi-5, and here"),
        ({"precisions": "fp16,int3"}, UsageError, "--precision is of fp32, fp16, .*got 'int3'"),
        ({"size": 30}, BudgetError, "sides of pictures must be multiples of"),
        ({"size": "16-32"}, UsageError, "--size 16-32: a picture has one size"),
        ({"steps": 0}, UsageError, "--steps is 1 or more, got 0"),
        ({"guidance": -1.0}, UsageError, "guidance_scale must be a number, 0 or more"),
        ({"config": "x.json"}, UsageError, "is a diffusers folder and has its own sizes"),
    ],
)
def test_what_cannot_be_forecast_is_said(given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    folder = bare(folders.write(tmp_path / "m", folders.flux(), text=True), tmp_path / "bare")
    with pytest.raises(error, match=message):
        elastic_export.plan(folder, **given)


def test_models_that_there_are_not_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model 'elit-mnits'; did you mean elit-mnist"):
        elastic_export.plan("elit-mnits")
    with pytest.raises(UsageError, match="--size and --max-sequence-length are for a diffusers folder, and elit-mnist is none"):
        elastic_export.plan("elit-mnist", size=28)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ModelError, match=r"c.json tells no model: a transformer's config of diffusers has _class_name"):
        elastic_export.plan(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    with pytest.raises(ModelError, match="is a PixArtTransformer2DModel; diffusers folders of"):
        elastic_export.plan(tmp_path / "c.json")
