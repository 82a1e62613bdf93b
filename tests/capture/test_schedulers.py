"""Plan `full` visits the very sigmas that diffusers' pipelines visit, or the scheduler is refused by name."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="diffusers' schedulers need torch")
pytest.importorskip("diffusers", reason="the schedulers are diffusers'")

import folders
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from elastic_export.capture.folders import capture_folder
from elastic_runtime import ModelError, Span
from elastic_runtime.ralu.plan import full


def theirs(family: str, config: dict[str, Any], steps: int, tokens: int) -> np.ndarray:
    """Sigmas as diffusers' pipeline of the family asks for them."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    known = scheduler.config
    lengths = known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift
    shifted = {"mu": calculate_shift(tokens, *lengths)} if known.use_dynamic_shifting else {}
    given = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if family == "flux" else {}
    scheduler.set_timesteps(steps, **given, **shifted)
    return scheduler.sigmas.numpy().astype(np.float64)


def captured(folder: Path, family: str, config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler in the manifest of a folder with this config."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"} | config))
    scheduler: dict[str, Any] = capture_folder(folder, ("transformer",), Span(16, 24), Span(1, 1), digest=False).manifest.model.config[
        "scheduler"
    ]
    return scheduler


MAKERS = {"flux": folders.flux, "flux2": folders.flux2, "sd3": folders.sd3}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {name: folders.write(root / name, make(), decoder=False) for name, make in MAKERS.items()}


@given(
    family=st.sampled_from(["flux", "sd3"]),
    shift=st.floats(0.5, 8.0),
    dynamic=st.booleans(),
    ends=st.tuples(st.floats(0.1, 1.0), st.floats(0.2, 2.0)),
    kind=st.sampled_from(["exponential", "linear"]),
    terminal=st.sampled_from([None, 0.02, 0.1]),
    steps=st.integers(2, 50),
    tokens=st.sampled_from([64, 256, 1024, 4096]),
)
def test_full_visits_diffusers_sigmas(
    places: dict[str, Path], family: str, shift: float, dynamic: bool, ends: tuple[float, float], kind: str, terminal: float | None,
    steps: int, tokens: int,
) -> None:  # fmt: skip
    config = {
        "shift": shift, "use_dynamic_shifting": dynamic, "base_shift": ends[0], "max_shift": ends[1], "time_shift_type": kind,
        "shift_terminal": terminal,
    }  # fmt: skip
    ours = full(steps, tokens, captured(places[family], family, config)).stages()[0].sigmas
    np.testing.assert_allclose(ours, theirs(family, config, steps, tokens), atol=2e-6)


@given(steps=st.integers(1, 200), tokens=st.one_of(st.sampled_from([64, 4096, 4300, 4301]), st.integers(1, 65536)))
def test_full_visits_the_sigmas_of_flux_2_s_pipelines(places: dict[str, Path], steps: int, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    known = captured(places["flux2"], "flux2", {"use_dynamic_shifting": True, "shift": 3.0})
    plan = full(steps, tokens, known)
    assert plan.shifts[0] == pytest.approx(np.exp(compute_empirical_mu(tokens, steps)))
    np.testing.assert_allclose(plan.stages()[0].sigmas, scheduler.sigmas.numpy(), atol=2e-6)


def test_flux_2_s_scheduler_may_shift_by_itself(places: dict[str, Path]) -> None:
    assert full(4, 64, captured(places["flux2"], "flux2", {"shift": 3.0})).shifts == (3.0,)
    with pytest.raises(ModelError, match="time_shift_type is exponential for FLUX.2, got 'linear'"):
        captured(places["flux2"], "flux2", {"use_dynamic_shifting": True, "time_shift_type": "linear"})


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_one_step_starts_from_noise(family: str, places: dict[str, Path]) -> None:
    for config in ({"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}):
        assert full(1, 256, captured(places[family], family, config)).stages()[0].sigmas == (1.0, 0.0)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"])
def test_what_is_not_drawn_is_refused_by_name(key: str, places: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=rf"scheduler_config.json: the scheduler has {key}, which is not drawn here"):
        captured(places["flux"], "flux", {key: True})


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_other_schedulers_are_refused_by_name(name: str, places: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=rf"is of a {name}; these models are drawn along a flow in Euler's steps"):
        captured(places["flux"], "flux", {"_class_name": name})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_shift": None, "use_dynamic_shifting": True}, "the scheduler's base_shift is a number, got None"),
        ({"shift": "3"}, "the scheduler's shift is a number, got '3'"),
        ({"shift": 0}, "shift is above 0"),
        ({"shift": 1e-320}, "the scheduler's shift is beyond any use"),
        ({"base_shift": 1000, "use_dynamic_shifting": True}, "the scheduler's base_shift is beyond any use"),
        ({"base_image_seq_len": 4096}, "base_image_seq_len below max_image_seq_len, got 1.0, 4096 and 4096"),
        ({"time_shift_type": "cubic"}, "time_shift_type is exponential or linear, got 'cubic'"),
        ({"shift_terminal": 1.5}, "shift_terminal is a sigma between 0 and 1, got 1.5"),
        ({"sigma_max": 0.9}, "unknown key 'sigma_max'"),
        ({"mu": 1.15}, "unknown key 'mu'"),
    ],
)
def test_a_config_that_is_none_is_refused_with_what_is_wrong(config: dict[str, Any], message: str, places: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=message):
        captured(places["flux"], "flux", config)


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("times", [500, 0, None, "1000", True])
def test_other_training_times_are_refused(times: Any, family: str, places: dict[str, Path]) -> None:
    """The models' times are counted in them, in diffusers' pipelines and in ours."""
    with pytest.raises(ModelError, match="num_train_timesteps is 1000, which the models' times are counted in"):
        captured(places[family], family, {"num_train_timesteps": times})


def test_what_is_left_of_a_run_is_spaced_on_to_the_same_end() -> None:
    for config in ({"shift": 3.0, "sigma_min": 0.003}, {"shift": 3.0, "shift_terminal": 0.1}, {"shift": 3.0}):
        stage = full(10, 256, config).stages()[0]
        left = stage.spaced(4, stage.sigmas[5])
        assert (left[0], left[-1], len(left)) == (stage.sigmas[5], 0.0, 5)
        assert all(a > b for a, b in itertools.pairwise(left))
        if len(config) > 1:
            assert left[-2] == pytest.approx(stage.sigmas[-2], rel=1e-6)
