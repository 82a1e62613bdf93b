"""Whole runs of the public code, reproduced with its own choice of patches and its own noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_flux import denoiser_graph, spec

from elastic_runtime import FakeSession, Session, Span, open_session
from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.contract.manifest import Patches, Vae
from elastic_runtime.denoising.denoiser import Guidance
from elastic_runtime.denoising.pictures import decode
from elastic_runtime.denoising.tokens import Conditions, TokenDenoiser
from elastic_runtime.ralu.patches import best, edge_scores, unpack
from elastic_runtime.ralu.plan import PRESETS, Plan
from elastic_runtime.sampling.stages import PlanStep, along

PATCHES = Patches(size=2, positions="img_ids", guidance_embeds=True)
VAE = Vae(scaling_factor=0.3611, shift_factor=0.1159, upscale=8)
SIDE = 32
# (denoiser, decoder) of the golden folder
Opened = tuple[Session, Session]


def through_torch(folder: Path) -> Opened:
    torch = pytest.importorskip("torch", reason="runs the golden model in torch")
    diffusers = pytest.importorskip("diffusers", reason="runs the golden model in diffusers' class")
    loading = {"low_cpu_mem_usage": False, "use_safetensors": True}
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", **loading).eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", **loading).eval()

    def predict(feeds: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
            return {"prediction": transformer(**tensors, return_dict=False)[0].numpy()}

    def image(feeds: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"image": vae.decode(torch.from_numpy(feeds["latent"])).sample.numpy()}

    whole = denoiser_graph(PATCHES, channels=16, width=32, pooled=32)
    decoder = Graph(
        inputs=(spec("latent", "B", 16, "h", "w"),),
        outputs=(spec("image", "B", 3, "H", "W"),),
        dimensions={"B": Span(1, 4), "h": Span(2, 64), "w": Span(2, 64), "H": Span(16, 512), "W": Span(16, 512)},
        artifacts=(),
    )
    return FakeSession(whole, predict), FakeSession(decoder, image)


def through_onnxruntime(folder: Path, bundle: Path) -> Opened:
    components = pytest.importorskip("elastic_export.capture.folders", reason="makes a bundle of the golden folder")
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
    pytest.importorskip("onnxruntime", reason="runs the golden model in ONNX Runtime")
    from elastic_export.exporting import export_capture
    from elastic_targets import target

    captured = components.capture_folder(folder, ("transformer", "vae"), Span(512, 512), Span(1, 1))
    made = export_capture(captured, "onnx", target("onnx").options(), bundle, "elastic-export onnx")
    assert made.manifest.model.patches == PATCHES
    assert made.manifest.model.vae == VAE
    return open_session(made, "denoiser", "ort", threads=1), open_session(made, "decoder", "ort", threads=1)


BACKENDS: dict[str, Callable[[Path, Path], Opened]] = {
    "torch": lambda folder, bundle: through_torch(folder),
    "onnxruntime": through_onnxruntime,
}


@pytest.fixture(scope="module", params=BACKENDS)
def opened(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return BACKENDS[request.param](golden / "ralu-flux", tmp_path_factory.mktemp("golden") / "bundle")


def _never(latents: np.ndarray, sigma: float) -> np.ndarray:
    raise AssertionError("patches grow here, nothing else")


class Run:
    """One recorded run replayed; keeps what went into each stage and what the edges of the preview were."""

    def __init__(self, name: str, folder: Path, opened: Opened):
        self.case = json.loads((folder / "case.json").read_text())
        with np.load(folder / "io.npz") as arrays:
            self.shared = {key: arrays[key] for key in arrays.files if "." not in key}
            self.recorded = {key.removeprefix(f"{name}."): arrays[key] for key in arrays.files if key.startswith(f"{name}.")}
        self.settings = self.case["cases"][name]
        self.inputs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._decoder = opened[1]
        denoiser = TokenDenoiser(opened[0], PATCHES, self.case["guidance_scale"])
        conditions = Conditions(self.shared["prompt_embeds"], self.shared["pooled"])

        def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
            self.inputs.setdefault(x.shape[1], (x[0], positions[0]))
            return denoiser.guided(x, positions, (SIDE, SIDE), sigma, conditions, None, Guidance())

        noise = unpack(self.shared["noise"][None], SIDE, SIDE, 2)
        plan = PRESETS[name.replace("preset", "") + "x"]
        self.steps: list[PlanStep] = list(along(velocity, noise, plan, 2, self._choose, self._renoise, _never))

    def _choose(self, latents: np.ndarray, count: int) -> np.ndarray:
        self.scores = edge_scores(decode(self._decoder, VAE, latents), 16)
        self.count = count
        return self.recorded["selected"][None]

    def _renoise(self, shape: tuple[int, ...], grew: slice, z: float) -> np.ndarray:
        assert z == self.settings["Z"]
        return self.recorded["noise_stage3" if shape[1] == SIDE**2 else "noise_stage2"][None]


@pytest.fixture(scope="module", params=["preset4", "preset7"])
def run(request: pytest.FixtureRequest, golden: Path, opened: Opened) -> Run:
    return Run(request.param, golden / "ralu-flux", opened)


def test_the_plan_is_the_recorded_one(run: Run) -> None:
    recorded = run.settings
    wanted = Plan(*(tuple(recorded[name]) for name in ("steps", "end_times", "shift")), recorded["Z"], recorded["up_ratio"])
    assert wanted in PRESETS.values()
    np.testing.assert_allclose([step.time for step in run.steps], run.recorded["timesteps"], atol=1e-7)
    assert [step.sample.shape[1] for step in run.steps] == run.recorded["tokens"].tolist()


def test_every_stage_begins_with_the_recorded_tokens_at_the_recorded_places(run: Run) -> None:
    assert sorted(run.inputs) == sorted(set(run.recorded["tokens"].tolist()))
    for tokens, (x, positions) in run.inputs.items():
        np.testing.assert_allclose(x, run.recorded[f"stage_input_{tokens}"], atol=1e-6)
        np.testing.assert_array_equal(positions, run.recorded[f"ids_{tokens}"][:, 1:])


def test_the_final_latents_are_the_recorded_ones(run: Run) -> None:
    wanted = run.recorded["latents"]
    assert np.abs(run.steps[-1].sample[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_edges_of_the_preview_are_the_recorded_ones(run: Run) -> None:
    np.testing.assert_array_equal(run.scores[0], np.rint(run.recorded["edge_score"] / 255))


def test_the_recorded_choice_differs_from_ours_in_ties_only(run: Run) -> None:
    """The public code leaves ties to an unstable top-k. Of higher scores both choose all; with its ties put first, so do we."""
    recorded, ours = run.recorded["selected"], best(run.scores, run.count)[0]
    scores = run.scores[0].astype(np.float64)
    last = scores[ours].min()
    assert set(ours[scores[ours] > last]) == set(recorded[scores[recorded] > last])
    assert sorted(scores[ours]) == sorted(scores[recorded])
    scores[recorded] += 0.5
    np.testing.assert_array_equal(best(scores[None], run.count)[0], recorded)
