"""A model without an axis and without classes: pictures from noise alone, at the one budget that there is."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import denoiser_graph, manifest, model

from elastic_runtime import Auto, Budget, Bundle, Deadline, ElasticPipeline, FakeSession, Guidance, UsageError
from elastic_runtime.contract.bundle import encode
from elastic_runtime.contract.schedule import Edm

EDM = Edm(sigma_min=0.01, sigma_max=80.0, sigma_data=0.5)
PICTURE = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8))


def pipeline() -> tuple[ElasticPipeline, FakeSession]:
    """A model that always sees PICTURE."""
    whole = denoiser_graph(3)
    names = ("class_labels", "latent_ids")
    graph = msgspec.structs.replace(
        whole, inputs=tuple(spec for spec in whole.inputs if spec.name not in names), dimensions={"B": whole.dimensions["B"]}
    )
    described = model(3, family="hdit", prediction="edm", schedule=EDM, num_classes=0, null_label=0)
    contract = msgspec.structs.replace(manifest(3), model=described, axes=(), graphs={"denoiser": graph}, cost=())
    encode(contract)

    def run(feeds: Any) -> dict[str, np.ndarray]:
        assert set(feeds) == {"sample", "timestep"}
        c_skip, c_out, c_in = EDM.preconditioning(float(feeds["timestep"][0]))
        return {"prediction": ((PICTURE - c_skip * feeds["sample"] / c_in) / c_out).astype(np.float32)}

    fake = FakeSession(graph, run)
    return ElasticPipeline(Bundle(Path("bundle"), contract), {"denoiser": fake}), fake


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler", "heun"])
def test_pictures_are_drawn_from_noise_alone(sampler: str) -> None:
    pipe, fake = pipeline()
    result = pipe(num_images_per_prompt=6, num_inference_steps=5, sampler=sampler, seeds=3, output_type="latent")
    assert result.images.shape == (6, 3, 8, 8)
    np.testing.assert_allclose(result.images, np.broadcast_to(PICTURE, (6, 3, 8, 8)), atol=1e-3)
    assert [record.budget for record in result.steps] == [Budget()] * 5
    assert len(fake.calls) == 2 * (9 if sampler == "heun" else 5), "six pictures in two runs"
    again = pipe.draw(result.request)
    np.testing.assert_array_equal(again.images, result.images)


@pytest.mark.parametrize("policy", [Auto(), Deadline(60.0)])
def test_policies_find_the_one_budget(policy: Any) -> None:
    result = pipeline()[0](num_inference_steps=4, policy=policy, seeds=0)
    assert {record.budget for record in result.steps} == {Budget()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [1]}, "tiny has no classes and draws from noise alone: leave class_labels out"),
        ({"prompt": "a cat"}, "prompt does not fit tiny, which draws at budgets"),
        ({"guidance_scale": 2.0}, "tiny has no classes to lead away from: leave guidance_scale out, or give autoguidance"),
        ({"guidance_scale": 2.0, "autoguidance": True}, "autoguidance needs a guidance budget smaller"),
        ({"budget": Budget(latents=4)}, "this model has no axis 'latents'; it has none"),
    ],
)
def test_what_it_has_not_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline()[0](num_inference_steps=2, **arguments)


def test_guidance_counts_times_by_how_far_a_run_has_come() -> None:
    half = float(EDM.times(11)[5])
    assert Guidance(2.0, 0.5, 1.0).active(EDM.share(half))
    assert not Guidance(2.0, 0.0, 0.5).active(EDM.share(half))
