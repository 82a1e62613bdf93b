"""ELIT on Qwen-Image: recorded outputs and whole runs, FLOPs, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import narrow

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import language_models
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elastic_export
from elastic_export.capture.capture import Capture
from elastic_export.capture.folders import capture_folder
from elastic_export.families.elit.interface import Read, Write
from elastic_export.families.elit.qwen_image import ElitQwenParams, flops
from elastic_export.sides import Sides, read_size
from elastic_runtime import Budget, BudgetError, Bundle, ElasticPipeline, ModelError, Span, UsageError, open_session
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.ralu.patches import pack, unpack
from elastic_runtime.ralu.plan import full

ONE = Span(1, 1)
GRID = (8, 12)  # of the recorded picture, in tokens
SIDES = Sides(16, 24)
GROUPS = 6
KEPT = (1, 4, 11, 16)  # latents a group at which outputs were recorded
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "elit-qwen-image-a"


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Arrays:
    with np.load(folder / "io.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tests must not change it."""
    return elastic_export.export(folder, output=tmp_path_factory.mktemp("b") / "b", size="16x24", batch="1-3")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def captured(folder: Path, size: Span | Sides | None = SIDES, **how: Any) -> Capture:
    return capture_folder(folder, None, size, Span(1, 2), **how)


def change(path: Path, **fields: Any) -> None:
    """Fields of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def feeds(recorded: Arrays, kept: int) -> Arrays:
    return {name: recorded[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")} | {"latent_ids": np.arange(kept)}


def forward(module: Any, arrays: Arrays) -> np.ndarray:
    with torch.inference_mode():
        output: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
    return output


def test_golden_outputs_in_torch(folder: Path, recorded: Arrays) -> None:
    module = captured(folder).graphs[0].module
    for kept in KEPT:
        wanted = recorded[f"out_latents_{kept * GROUPS}_nomask"]
        assert np.abs(forward(module, feeds(recorded, kept)) - wanted).max() <= 5e-6, kept


@pytest.mark.parametrize("opset", narrow([23, 20]))
def test_golden_outputs_and_untraced_budgets_through_onnx_runtime(
    folder: Path, recorded: Arrays, bundle: Bundle, opset: int, tmp_path: Path
) -> None:
    made = bundle
    if opset != 23:
        made = elastic_export.export(folder, output=tmp_path / "b", size="16x24", batch="1-3", opset=opset, verify="none")
    module, generator = captured(folder).graphs[0].module, np.random.default_rng(0)
    with open_session(made) as session:
        for kept in KEPT:
            wanted = recorded[f"out_latents_{kept * GROUPS}_nomask"]
            assert np.abs(session.run(feeds(recorded, kept))["prediction"] - wanted).max() <= 5e-6, kept
        every = [(2, kept, 7) for kept in range(1, 17)]
        for batch, kept, text in ((1, 2, 1), (3, 7, 33), (2, 15, 512), *every):
            arrays = {
                "hidden_states": generator.standard_normal((batch, 96, 16)).astype(np.float32),
                "encoder_hidden_states": generator.standard_normal((batch, text, 24)).astype(np.float32),
                "timestep": generator.uniform(0, 1, batch).astype(np.float32),
                "latent_ids": np.arange(kept),
            }
            assert np.abs(session.run(arrays)["prediction"] - forward(module, arrays)).max() <= 5e-6, (batch, kept, text)


def test_what_was_proven_covers_both_ends_of_latents_and_of_text(bundle: Bundle) -> None:
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    assert [row.budget for row in artifact.verified] == [
        {"T": 1, "latents": 6}, {"T": 172, "latents": 36}, {"T": 257, "latents": 54}, {"T": 512, "latents": 96},
    ]  # fmt: skip
    assert all(row.passed for row in artifact.verified)
    ((_, again),) = elastic_export.verify(bundle)
    assert len(again.verified) == 4
    assert all(row.passed for row in again.verified)


def test_whole_runs_are_the_recorded_ones(folder: Path, recorded: Arrays, bundle: Bundle) -> None:
    """CCFG: each branch at its own latents and with a text of its own length, tokens rescaled to the conditional branch's length, the
    scheduler's sigmas."""
    run = json.loads((folder / "case.json").read_text())["run"]
    seen = []
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        result = pipe(
            prompt_embeds=recorded["run_positive"], negative_prompt_embeds=recorded["run_negative"], guidance_scale=run["scale"],
            num_inference_steps=run["steps"], budget=Budget(latents=GROUPS * run["J"]), output_type="latent",
            guidance_budget=Budget(latents=GROUPS * run["J_weak"]), noise=unpack(recorded["run_start"], *GRID, 2),
            callback_on_step_end=lambda pipe, index, time, arrays: seen.append(pack(arrays["latents"], 2)),
        )  # fmt: skip
    times = [step.time for step in result.steps] + [result.steps[-1].next_time]
    np.testing.assert_allclose(times, recorded["run_sigmas"], atol=1e-7)
    for got, wanted in zip([*seen, pack(result.images, 2)], [*recorded["run_latents"], recorded["run_latents"][-1]], strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_prompts_of_several_lengths_are_read_as_qwen_image_s(copy: Path, tmp_path: Path) -> None:
    reader = language_models.qwen25_vl(hidden_size=24, rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 1, 1]})
    language_models.write(copy, reader)
    bundle = elastic_export.export(copy, output=tmp_path / "b", size="16x24", batch="1-2", verify="none", max_sequence_length=40)
    theirs = QwenImagePipeline(None, None, reader, language_models.tokenizer(), None)  # type: ignore[arg-type]
    prompts, negative = ["a red cat and a dog", "cat"], ["", "snow"]
    noise = np.random.default_rng(0).standard_normal((2, 4, 16, 24)).astype(np.float32)
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "budget": Budget(latents=54)}
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
        drawn = pipe(prompt=prompts, negative_prompt=negative, noise=noise, **asked).images
        for i, texts in enumerate(zip(prompts, negative, strict=True)):
            with torch.inference_mode():
                strong, weak = (theirs.encode_prompt([text], device="cpu")[0].numpy() for text in texts)
            wanted = pipe(prompt_embeds=strong, negative_prompt_embeds=weak, noise=noise[i : i + 1], **asked).images[0]
            assert np.abs(drawn[i] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_folder_says_what_the_runtime_must_know(folder: Path) -> None:
    capture = captured(folder, digest=True)
    model, graph = capture.manifest.model, capture.graphs[0]
    assert (model.family, model.packed, model.patches, model.guidance_rescale) == ("elit-qwen-image", 2, None, "norm")
    assert (model.sample_shape, model.num_classes, model.unconditional) == ((4, 16, 24), 0, False)
    plan = full(4, 96, model.config["scheduler"])
    assert model.schedule == RectifiedFlow(shift=plan.shifts[0], terminal=0.02)
    np.testing.assert_array_equal(model.schedule.times(4), plan.stages()[0].sigmas)
    assert model.config["elit"] == {"group_size": 4, "head_blocks": 1, "tail_blocks": 1, "write_kv": "all"}
    assert [spec.name for spec in graph.inputs] == ["hidden_states", "encoder_hidden_states", "timestep", "latent_ids"]
    assert graph.dimensions == {"B": Span(1, 2), "J": Span(1, 16), "T": Span(1, 512)}
    assert set(capture.manifest.provenance.weights_sha256) == {"transformer", "elit"}
    assert captured(folder, spans={"latents": Span(12, 48)}).manifest.axes[0].span == Span(12, 48)


def test_the_packaged_sample_is_listed_with_its_latents() -> None:
    (row,) = (row for row in elastic_export.models() if row["name"] == "elit-qwen-digits")
    assert (row["family"], row["axes"], row["weights"]) == ("elit-qwen-image", "latents 4-64", "packaged")
    assert row["gflops"][0] < row["gflops"][1]
    assert 1_900_000 < row["parameters"] < 2_000_000


def test_flops_are_torch_s_own_and_the_paper_s(folder: Path) -> None:
    """torch computes Read's queries, alike in every window, once; the published figures count them for each."""
    module = captured(folder).graphs[0].module
    params, generator = module.params, np.random.default_rng(0)
    for kept, text in ((1, 3), (16, 9)):
        arrays = {
            "hidden_states": generator.standard_normal((1, 96, 16)), "timestep": np.ones(1),
            "encoder_hidden_states": generator.standard_normal((1, text, 24)),
        }  # fmt: skip
        given = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(**given, latent_ids=torch.arange(kept))
        again = 2 * (96 - 16) * params.width**2
        assert counter.get_total_flops() == flops(params, kept * GROUPS, text) - again
    with torch.device("meta"):
        parts = Read(ElitQwenParams(QWEN, 64, 64, 8, 8, 8).interface), Write(ElitQwenParams(QWEN, 64, 64, 8, 8, 8).interface)
    assert sum(weight.numel() for part in parts for weight in part.parameters()) / 1e6 == pytest.approx(179.8, abs=0.05)
    # Of two branches with CCFG over those of plain guidance (figure 19), texts of 300 and 100 tokens.
    real = ElitQwenParams(QWEN, 64, 64, 8, 8, 8)
    plain = ElitQwenParams(QWEN, 64, 64, 8, 59, 0)  # nearly no core: what the interface costs is taken off
    free = flops(plain, 4096, 300) - elit_flops(plain), flops(plain, 4096, 100) - elit_flops(plain)
    for latents, share in ((4096, 0.688), (2048, 0.494), (1024, 0.409), (512, 0.369)):
        assert (flops(real, latents, 300) + flops(real, 320, 100)) / sum(free) == pytest.approx(share, abs=0.01)


QWEN = {
    "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 60, "in_channels": 64, "out_channels": 16, "patch_size": 2,
    "joint_attention_dim": 3584,
}  # fmt: skip


def elit_flops(params: ElitQwenParams) -> int:
    from elastic_export.families.elit import interface

    return interface.flops(params.interface)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": None}, "elit.json lacks group_size, which tells where Read and Write stand"),
        ({"head_blocks": -1}, "head_blocks is a whole number from 0, got -1"),
        ({"group_size": 0}, "group_size is a whole number from 1, got 0"),
        ({"tail_blocks": "1"}, "tail_blocks is a whole number from 0, got '1'"),
        ({"tail_blocks": True}, "tail_blocks is a whole number from 0, got True"),
        ({"head_blocks": 3}, "head_blocks 3 [+] tail_blocks 1 must leave a core in 4 blocks"),
        ({"write_kv": "kept"}, "write_kv is 'all', by which Write sees every latent, got 'kept', which is not supported"),
        ({"depth": 4}, "elit.json has an unknown field 'depth'; it has group_size, head_blocks, tail_blocks and write_kv"),
        ({"group_size": 2}, r"has read.learned_query_embed of shape \(16, 48\) where the model has \(4, 48\)"),
    ],
)
def test_words_about_elit_that_do_not_fit_are_named(copy: Path, fields: dict[str, Any], message: str) -> None:
    change(copy / "transformer" / "elit.json", **fields)
    with pytest.raises(ModelError, match=message):
        captured(copy)


@pytest.mark.parametrize("variant", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_variants_are_refused_by_name(copy: Path, variant: str) -> None:
    change(copy / "transformer" / "config.json", **{variant: True})
    with pytest.raises(ModelError, match=rf"transformer has {variant}, .* are not supported: export Qwen-Image itself"):
        captured(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("input_token_editor.adapters.0.pos_embed"), "lacks read.pos_embed"),
        (lambda weights: weights.update({"output_token_editor.adapters.0.pos_embed": torch.zeros(16, 48)}), "has unknown write.pos_embed"),
        (
            lambda weights: weights.update({"input_token_editor.adapters.0.latent_pos_embed": torch.zeros(1)}),
            "unknown read.latent_pos_embed",
        ),
    ],
)
def test_weights_of_the_interface_that_do_not_fit_are_named(copy: Path, edit: Any, message: str) -> None:
    rewrite(copy / "transformer" / "elit.safetensors", edit)
    with pytest.raises(ModelError, match=rf"elit.safetensors does not fit the interface .* {message}"):
        captured(copy)


@pytest.mark.parametrize(("lost", "there"), [("elit.json", "elit.safetensors"), ("elit.safetensors", "elit.json")])
def test_half_of_elit_is_refused(copy: Path, lost: str, there: str) -> None:
    (copy / "transformer" / lost).unlink()
    with pytest.raises(ModelError, match=f"transformer has {there} and no {lost}, which go together: copy the folder again"):
        captured(copy)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Sides(16, 18), "--size 16x18: sides of pictures must be multiples of 8 pixels for this model, whose windows are 4 x 4 tokens of 2 "
         "pixels, got 18: the nearest is 16"),
        (Sides(2, 16), "got 2: the nearest is 8"),
        (Sides(15, 16), "got 15: the nearest is 16"),
        (Span(13, 13), "--size 13x13: .* got 13: the nearest is 16"),
        (Span(8, 16), "--size 8-16: elit draws pictures of one size, as its windows need: give --size 16"),
    ],
)  # fmt: skip
def test_sizes_that_windows_do_not_divide_are_named(folder: Path, size: Span | Sides, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        captured(folder, size, name="elit")


def test_other_axes_and_sizes_are_refused(folder: Path, golden: Path) -> None:
    with pytest.raises(BudgetError, match="elit has no axis 'tokens'; it has latents"):
        captured(folder, name="elit", spans={"tokens": Span(4, 8)})
    with pytest.raises(BudgetError, match="latents 7 is not available: this model offers 6-96 in steps of 6; the nearest is 6"):
        captured(folder, spans={"latents": Span(7, 96)})
    with pytest.raises(BudgetError, match="--size 16x24 is one size, and qwen-image-a draws any: give a side, or a span of them"):
        captured(golden / "qwen-image-a")
    with pytest.raises(BudgetError, match="--size: a span is written 32-256 or 64, got '16x'; a single size is written 1024x768"):
        read_size("16x")


def test_elit_in_another_transformer_is_refused(folder: Path, tmp_path: Path) -> None:
    import folders

    other = folders.write(tmp_path / "f", folders.flux())
    for name in ("elit.json", "elit.safetensors"):
        shutil.copy(folder / "transformer" / name, other / "transformer" / name)
    with pytest.raises(ModelError, match="puts ELIT into a FluxTransformer2DModel: it is read in a QwenImageTransformer2DModel"):
        captured(other)


def test_the_usual_size_is_taken_where_none_is_said(folder: Path) -> None:
    """Without a VAE a latent of 128 is usual."""
    capture = captured(folder, None)
    assert capture.manifest.model.sample_shape == (4, 128, 128)
    assert capture.manifest.axes[0].span == Span(256, 4096)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "elit-qwen-image-a draws from prompt or prompt_embeds, got neither"),
        ({"class_labels": 1}, "draws from prompt or prompt_embeds, got class_labels"),
        ({"prompt": "a cat"}, "classifier-free|has no text encoders in this bundle: give prompt_embeds"),
        ({"prompt_embeds": np.zeros((1, 3, 24))}, "leads away from negative_prompt_embeds: give them, or turn it off"),
        ({"prompt_embeds": np.zeros((1, 3, 23)), "guidance_scale": 1}, r"prompt_embeds must be \(B, T, 24\), got \(1, 3, 23\)"),
        ({"prompt_embeds": np.zeros((1, 513, 24)), "guidance_scale": 1}, "takes 1-512 text tokens, and prompt_embeds has 513"),
        ({"prompt_embeds": np.zeros((1, 3, 24)), "pooled_prompt_embeds": np.zeros((1, 3))}, "takes no pooled embeddings"),
        ({"prompt_embeds": np.zeros((1, 3, 24)), "height": 16}, "height does not fit elit-qwen-image-a, which draws at budgets"),
        ({"prompt_embeds": np.zeros((1, 3, 24)), "sampler": "sde", "guidance_scale": 1}, "takes euler, heun, ab2 or ab3"),
        ({"prompt_embeds": np.zeros((1, 3, 24)), "guidance_scale": 1, "budget": Budget(latents=7)}, "latents 7 is not available"),
    ],
)
def test_what_does_not_fit_a_drawing_is_named(bundle: Bundle, how: dict[str, Any], message: str) -> None:
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe, pytest.raises(UsageError, match=message):
        pipe(num_inference_steps=2, output_type="latent", **({"noise": np.zeros((1, 4, 16, 24))} | how))


def test_a_picture_is_the_same_alone_and_beside_others(bundle: Bundle) -> None:
    """Two pictures of embeddings of their own; autoguidance keeps the text; a policy may choose the latents."""
    generator = np.random.default_rng(1)
    embeds, negative = (generator.standard_normal((2, length, 24)).astype(np.float32) for length in (5, 2))
    with ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:

        def draw(rows: slice, seeds: Any, **how: Any) -> Any:
            given = {"negative_prompt_embeds": negative[rows]} if "autoguidance" not in how else {}
            return pipe(
                prompt_embeds=embeds[rows], seeds=seeds, num_inference_steps=3, output_type="latent", guidance_scale=3.0, **given, **how
            )

        both = draw(slice(0, 2), (4, 9), budget=Budget(latents=48))
        alone = draw(slice(1, 2), (9,), budget=Budget(latents=48))
        np.testing.assert_allclose(both.images[1:], alone.images, atol=2e-6)
        again = pipe.draw(type(both.request).from_json(both.request.to_json()))
        np.testing.assert_array_equal(both.images, again.images)
        small = {"autoguidance": True, "guidance_budget": Budget(latents=12)}
        led = draw(slice(0, 1), (4,), budget=Budget(latents=48), sampler="heun", **small)
        assert led.steps[0].guidance_budget == Budget(latents=12)
        repeated = pipe(
            prompt_embeds=embeds[:1], num_images_per_prompt=2, seeds=(4, 5), guidance_scale=1, num_inference_steps=2, output_type="latent"
        )
        assert repeated.images.shape == (2, 4, 16, 24)
        assert not re.search("nan", str(repeated.images))
