import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")

import folders
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from elastic_export.capture.folders import Sizes, capture_folder, stages
from elastic_export.families.flux import FAMILY as FLUX
from elastic_export.families.tokens import axis
from elastic_export.foreign.folder import Folder
from elastic_runtime import Budget, BudgetError, ModelError, Span
from elastic_targets.weights import Streamed

ONE = Span(1, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX folder with everything. Tests that change it take a copy."""
    return folders.write(tmp_path_factory.mktemp("f") / "tiny-flux", folders.flux(), text=True)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "copy"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_a_capture_reads_no_weights_and_tells_everything(whole: Path) -> None:
    captured = capture_folder(whole, None, None, Span(1, 2))
    assert [graph.name for graph in captured.graphs] == ["denoiser", "decoder", "text_encoder", "text_encoder_2"]
    assert all(isinstance(weight, Streamed) for graph in captured.graphs for weight in graph.module.parameters())
    model = captured.manifest.model
    assert (model.name, model.family, model.sample_shape, model.num_classes) == ("tiny-flux", "flux", (4, 16, 16), 0)
    assert model.patches is not None
    assert (model.patches.size, model.patches.positions, model.patches.guidance_embeds) == (2, "img_ids", True)
    assert model.text is not None
    assert (model.text.length, model.text.width, model.text.pooled) == (6, 16, 8)
    assert [(encoder.graph, encoder.max_length, encoder.pad_token_id, encoder.gives) for encoder in model.text.encoders] == [
        ("text_encoder", 12, 1, ("pooled",)), ("text_encoder_2", 6, 0, ("last_hidden_state",)),
    ]  # fmt: skip
    assert model.vae is not None
    assert model.config["scheduler"]["shift"] == 1.0
    assert (model.vae.scaling_factor, model.vae.shift_factor, model.vae.upscale) == (0.5, 0.1, 2)
    denoiser, decoder = captured.graphs[:2]
    assert denoiser.dimensions == {"B": Span(1, 2), "S": Span(4, 64), "T": Span(1, 6)}
    assert [point["tokens"] for point in denoiser.stages] == [16, 19, 28, 64]
    assert decoder.dimensions == {"B": Span(1, 2), "h": Span(4, 16), "w": Span(4, 16)}
    assert captured.manifest.axes == denoiser.axes == (axis(Span(4, 64), FLUX.patches(folders.flux().config)),)
    assert set(captured.peaks) == {graph.name for graph in captured.graphs}
    assert captured.manifest.cost[0].flops > 0
    assert set(captured.files) == {"tokenizer/text_encoder/tokenizer.json", "tokenizer/text_encoder_2/tokenizer.json"}


def test_sizes_of_a_graph_are_filled_in_checked_and_traced_away_from_the_ends(whole: Path) -> None:
    graph = capture_folder(whole, None, None, ONE).graphs[0]
    assert graph.at(Budget(tokens=20)) == Budget(tokens=20, T=6)
    with pytest.raises(BudgetError, match="tokens 3 is not available: this model offers 4-64; the nearest is 4"):
        graph.at(Budget(tokens=3))
    with pytest.raises(BudgetError, match="T 7 is not available: denoiser takes 1-6"):
        graph.at(Budget(T=7))
    with pytest.raises(BudgetError, match="no axis 'latents'"):
        graph.at(Budget(latents=4))
    spans = {"tokens": graph.axes[0].span} | graph.open_dimensions
    assert all(span.min < graph.traced[name] < span.max for name, span in spans.items())
    assert len(set(graph.traced.values())) == 2, "no two may be taken for one"
    large, small = graph.feeds(Budget(), 2), graph.feeds(Budget(tokens=5, T=2), 2)
    assert (small["hidden_states"] == large["hidden_states"][:, :5]).all()
    assert (small["img_ids"] == large["img_ids"][:5]).all()
    assert (small["encoder_hidden_states"] == large["encoder_hidden_states"][:, :2]).all()
    assert small["txt_ids"].shape == (2, 3)
    assert (small["timestep"] == large["timestep"]).all()


def test_peaks_count_the_weights_in_the_files(whole: Path) -> None:
    count = sum(parameter.numel() for parameter in folders.flux().parameters())
    assert Folder.open(whole).component("transformer").parameters() == count
    assert capture_folder(whole, ("transformer",), None, ONE).peaks["denoiser"] > 3 * 4 * count


def test_prompts_of_sd3_are_clips_beside_each_other_and_t5_after_them(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.sd3(**folders.SD35), text=True)
    text = capture_folder(tmp_path / "f", ("text",), None, ONE).manifest.model.text
    assert text is not None
    assert (text.length, text.width, text.pooled, len(text.encoders)) == (12 + 6, 16, 16, 3)
    index = json.loads((tmp_path / "f" / "model_index.json").read_text()) | {"text_encoder_3": [None, None]}
    (tmp_path / "f" / "model_index.json").write_text(json.dumps(index))
    without = capture_folder(tmp_path / "f", None, None, ONE).manifest.model.text
    assert without is not None
    assert (without.length, len(without.encoders)) == (12 + 256, 2)  # as many zeros as its pipeline takes tokens of T5


def test_a_folder_with_labels_has_classes_and_no_text(copy: Path) -> None:
    index = {"_class_name": "FluxPipeline", "id2label": {"0": "cat", "1": "dog"}} | {
        name: ["diffusers", name] for name in ("transformer", "vae")
    }
    (copy / "model_index.json").write_text(json.dumps(index))
    captured = capture_folder(copy, None, None, ONE)
    assert (captured.manifest.model.num_classes, captured.manifest.model.null_label, captured.manifest.model.text) == (2, 2, None)
    assert captured.graphs[0].dimensions == {"B": ONE, "S": Span(4, 64)}
    assert captured.graphs[0].inputs[1].shape == ("B", 1, 16)
    many = index | {"id2label": {str(number): "cat" for number in range(9)}}
    (copy / "model_index.json").write_text(json.dumps(many))
    with pytest.raises(ModelError, match="names 9 classes, and the transformer takes one of 8"):
        capture_folder(copy, None, None, ONE)
    (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(ModelError, match=r"has classes \(id2label\) and text encoders \(text_encoder\).* --components transformer,vae"):
        capture_folder(copy, None, None, ONE)
    assert capture_folder(copy, ("transformer", "vae"), None, ONE).manifest.model.num_classes == 2


def test_other_components_need_the_transformer_s_config_alone(copy: Path) -> None:
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    captured = capture_folder(copy, ("vae",), None, ONE)
    assert [graph.name for graph in captured.graphs] == ["decoder"]
    assert (captured.manifest.axes, captured.manifest.cost, captured.manifest.provenance.checkpoint_sha256) == ((), (), None)
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        capture_folder(copy, None, None, ONE)


def test_without_a_vae_a_pixel_is_the_latent_s(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.flux(), decoder=False)
    captured = capture_folder(tmp_path / "f", None, Span(32, 64), ONE)
    assert captured.manifest.model.vae is None
    assert captured.manifest.model.sample_shape[1:] == (64, 64)
    assert captured.graphs[0].dimensions["S"] == Span(64, 1024)


def test_three_costs_give_every_other_and_the_decoder_s_peak_grows_with_the_picture(whole: Path) -> None:
    small, large = (capture_folder(whole, None, size, Span(1, 2)) for size in (Span(32, 32), Span(64, 64)))
    assert [row.budget for row in small.manifest.cost] == [{"tokens": count} for count in (16, 40, 64)]
    config = folders.flux().config
    fitted = np.polyfit([row.budget["tokens"] for row in small.manifest.cost], [row.flops for row in small.manifest.cost], 2)
    assert [round(np.polyval(fitted, count)) for count in range(16, 65)] == [FLUX.flops(config, count, 6) for count in range(16, 65)]
    grown = 2 * 4 * (64**2 - 32**2) * (3 * 8 + 8)
    assert large.peaks["decoder"] - small.peaks["decoder"] == grown, "bytes of the activations of a batch of two"


def test_sizes_are_of_pictures_and_of_the_stages_of_the_largest() -> None:
    sizes = Sizes(Span(512, 1024), 8, 2)
    assert (sizes.latent, sizes.tokens) == (Span(32, 128), Span(256, 4096))
    patches = FLUX.patches(folders.flux().config)
    assert stages(axis(sizes.tokens, patches), patches, 4096) == [1024, 1330, 1945, 4096]  # as the paper's presets have them at 1024 px
    assert stages(axis(Span(1500, 4096), patches), patches, 4096) == [1945, 4096]


def test_tokens_narrow_the_axis_that_the_sides_set(whole: Path) -> None:
    narrow = capture_folder(whole, None, Span(16, 32), ONE, spans={"tokens": Span(16, 40)})
    assert narrow.graphs[0].dimensions["S"] == narrow.manifest.axes[0].span == Span(16, 40)
    assert [point["tokens"] for point in narrow.graphs[0].stages] == [19, 40]
    assert narrow.manifest.model.sample_shape == (4, 12, 12), "the largest square picture: 6 x 6 tokens"
    assert narrow.graphs[1].dimensions["h"] == Span(4, 16)
    for span in (Span(2, 64), Span(16, 65), Span(4, 15)):
        with pytest.raises(BudgetError, match=rf"--tokens {span} does not go with sides of 16-32 pixels: .* 16 to 64 tokens"):
            capture_folder(whole, None, Span(16, 32), ONE, spans={"tokens": span})
    with pytest.raises(BudgetError, match="has no axis 'latents'; it has tokens"):
        capture_folder(whole, None, None, ONE, spans={"latents": Span(4, 8)})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Span(16, 36), "must be multiples of 8 pixels for this model, got 36"),
        (Span(4, 32), "multiples of 8 pixels for this model, got 4"),
    ],
)
def test_sides_that_do_not_divide_are_refused(whole: Path, size: Span, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        capture_folder(whole, None, size, ONE)


def test_a_picture_beyond_sd3s_table_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path / "f", folders.sd3())
    with pytest.raises(BudgetError, match="this model has places for pictures of up to 48 pixels"):
        capture_folder(tmp_path / "f", None, Span(32, 56), ONE)


@pytest.mark.parametrize("component", ["vae", "text_encoder_2"])
def test_a_missing_component_is_named(copy: Path, component: str) -> None:
    (copy / component / "config.json").unlink()
    others = "transformer,text" if component == "vae" else "transformer,vae"
    with pytest.raises(ModelError, match=rf"lacks its component {component} \(\w+\).*leave it out with --components {others}"):
        capture_folder(copy, None, None, ONE)
    assert capture_folder(copy, ("transformer",), None, ONE).graphs[0].name == "denoiser"


def test_an_encoder_that_no_index_lists_is_missed_by_what_it_gives(copy: Path) -> None:
    (copy / "model_index.json").unlink()
    (copy / "text_encoder_2").rename(copy / "elsewhere")
    with pytest.raises(ModelError, match=r"has text_encoder, .* with no sequence beside them: one is missing or another model's"):
        capture_folder(copy, None, None, ONE)


def test_encoders_of_another_model_are_refused(copy: Path) -> None:
    config = json.loads((copy / "text_encoder_2" / "config.json").read_text()) | {"d_model": 32}
    (copy / "text_encoder_2" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gives 32 values a token where the transformer takes 16"):
        capture_folder(copy, None, None, ONE)


def test_weights_that_are_not_there_not_whole_or_pickled_are_said_to_be(copy: Path) -> None:
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"no safetensors weights; it has config.json, .*\.bin.*Pickled weights could run code"):
        capture_folder(copy, None, None, ONE)
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    with pytest.raises(ModelError, match=r"lacks lost.safetensors, which .*index.json lists"):
        Folder.open(copy).component("transformer").weight_files()


def test_weights_that_do_not_fit_are_named(copy: Path) -> None:
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda weights: weights.pop("proj_out.bias"))
    with pytest.raises(ModelError, match=r"transformer does not fit FluxTransformer2DModel: it lacks proj_out.bias"):
        Folder.open(copy).component("transformer").load(FluxTransformer2DModel)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is damaged or incomplete, 1000 bytes"):
        Folder.open(copy).component("transformer").load(FluxTransformer2DModel)


def test_damaged_weights_are_found_before_they_are_needed(copy: Path) -> None:
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    for content, message in (
        (b"", "is damaged or incomplete, 0 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n",
            "is a git-lfs pointer and not the weights: run git lfs pull",
        ),
    ):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            capture_folder(copy, None, None, ONE)


def test_a_scheduler_that_the_index_lists_is_missed(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks scheduler/scheduler_config.json, which model_index.json lists"):
        capture_folder(copy, None, None, ONE)


def test_a_scheduler_that_follows_no_flow_is_refused(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(ModelError, match="is of a DDIMScheduler; these models are drawn along a flow"):
        capture_folder(copy, None, None, ONE)


def test_what_is_no_such_folder_is_said_to_be_none(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a diffusers folder of a diffusion transformer: it has no transformer, but copy"):
        capture_folder(tmp_path, None, None, ONE)
    with pytest.raises(ModelError, match="--components are transformer, vae, text, encoder, got unet"):
        capture_folder(copy, ("unet",), None, ONE)
    with pytest.raises(BudgetError, match="--batch must start at 1 or more, got 0-1"):
        capture_folder(copy, None, None, Span(0, 1))
    (copy / "transformer" / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    with pytest.raises(ModelError, match=r"is a PixArtTransformer2DModel; diffusers folders of FluxTransformer2DModel, Flux2"):
        capture_folder(copy, None, None, ONE)
    (copy / "transformer" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not JSON: .*Download or copy it again"):
        capture_folder(copy, None, None, ONE)
    (copy / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "num_layers": "many"}')
    with pytest.raises(ModelError, match="does not describe a FluxTransformer2DModel"):
        capture_folder(copy, None, None, ONE)
