"""Whole sampling runs of the public samplers on `elit-c`, reproduced through ONNX Runtime."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_runtime import Budget, Bundle, ElasticPipeline

NAMES = ["autoguidance", "ccfg", "ccfg_interval", "cfg", "euler", "heun", "sde", "sde_ccfg"]


class Replay(np.random.Generator):
    """A generator whose normal draws are recorded ones, in order."""

    def __init__(self, draws: np.ndarray):
        super().__init__(np.random.PCG64(0))
        self._draws = iter(draws)

    def standard_normal(self, size: Any = None, *_: Any, **__: Any) -> Any:
        draw = next(self._draws)
        assert draw.shape == size
        return draw

    def left(self) -> int:
        return len(list(self._draws))


def arguments(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A recorded run's settings in the pipeline's words; every setting must be understood."""
    low = settings.get("unconditional_inference_budget")
    known = {
        "num_steps", "heun", "cfg_scale", "inference_budget", "unconditional_inference_budget",
        "guidance_low", "guidance_high", "autoguidance",
    }  # fmt: skip
    assert settings.keys() <= known
    return {
        "num_inference_steps": settings["num_steps"],
        "guidance_scale": settings["cfg_scale"],
        "budget": Budget(latents=settings["inference_budget"]),
        "guidance_budget": None if low is None else Budget(latents=low),
        "guidance_interval": (settings.get("guidance_low", 0.0), settings.get("guidance_high", 1.0)),
        "autoguidance": settings.get("autoguidance", False),
        "sampler": "heun" if settings.get("heun") else "sde" if name.startswith("sde") else "euler",
    }


def test_every_recorded_run_is_reproduced(golden: Path) -> None:
    assert sorted(json.loads((golden / "elit-c.samples.json").read_text())) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_is_reproduced(name: str, golden: Path, golden_bundle: Callable[[str], Bundle]) -> None:
    settings = json.loads((golden / "elit-c.samples.json").read_text())[name]
    with np.load(golden / "elit-c.samples.npz") as arrays:
        recorded = dict(arrays)
    generator = Replay(recorded.get(f"{name}.eps", np.empty(0)))
    with ElasticPipeline.from_pretrained(golden_bundle("c")) as pipe:
        result = pipe(
            recorded["class_labels"],
            noise=recorded["noise"],
            generator=generator,
            output_type="latent",
            **arguments(name, settings),
        )
    assert np.abs(result.images - recorded[name]).max() <= 2e-4
    assert generator.left() == 0
