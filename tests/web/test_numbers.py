"""A real browser draws what Python draws: from the same noise or seed, at every budget, with each sampler."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from chromium import CHROMIUM, Browser, browser
from fakes import write_manifest
from tiny import tiny_feeds

from elastic_runtime import Budget, Bundle, ElasticPipeline
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.reference import pack
from elastic_runtime.sessions.opening import open_artifact

pytestmark = pytest.mark.browser
CLOSE = 1e-4


def drawn(page: Browser, **request: Any) -> dict[str, Any]:
    """What the page's `elastic.draw` gives for a request of JSON's kinds; a seed is a text there, where numbers end at 2^53."""
    request |= {"seeds": str(request["seeds"])} if "seeds" in request else {}
    expression = f"""elastic.draw({json.dumps(request)}).then(done => JSON.stringify(
        {{latents: Array.from(done.latents), records: done.records, seed: done.seed, late: done.late,
          picture: [done.picture.width, done.picture.height, Array.from(done.picture.rgba)]}}))"""
    return dict(json.loads(page.value(expression)))


def budgets(request: dict[str, Any]) -> dict[str, Any]:
    """A request's words for Python."""
    return {name: Budget(**value) if name in ("budget", "guidance_budget") else value for name, value in request.items()}


def assert_alike(page: Browser, pipe: ElasticPipeline, noise: np.ndarray | None = None, **request: Any) -> None:
    """Assert that the page's final latents are Python's."""
    theirs = pipe(**budgets(request), noise=noise, output_type="latent").images
    given = {} if noise is None else {"noise": noise.ravel().tolist()}
    ours = np.array(drawn(page, **request, **given)["latents"]).reshape(theirs.shape)
    np.testing.assert_allclose(ours, theirs, atol=CLOSE, rtol=0, err_msg=str(request))


@pytest.fixture(scope="module")
def pipe(digits: Path) -> ElasticPipeline:
    return ElasticPipeline.from_pretrained(digits, "ort", lanes=1)


def test_every_budget_draws_what_python_draws(visit: Any, sited: Callable[..., Path], digits: Path, pipe: ElasticPipeline) -> None:
    noise = np.random.default_rng(3).standard_normal((1, *pipe.bundle.manifest.model.sample_shape))
    with visit(sited(digits)) as page:
        for latents in pipe.bundle.manifest.axes[0].values:
            asked = {"class_labels": 7, "num_inference_steps": 4, "budget": {"latents": latents}}
            assert_alike(page, pipe, noise, **asked, guidance_scale=2.0)
            assert_alike(page, pipe, seeds=latents, **asked)


def test_samplers_guidance_and_seeds_are_pythons(visit: Any, sited: Callable[..., Path], digits: Path, pipe: ElasticPipeline) -> None:
    asked: dict[str, Any] = {"class_labels": 3, "seeds": 2**62 + 1, "num_inference_steps": 5, "budget": {"latents": 64}}
    with visit(sited(digits)) as page:
        for sampler in ("euler", "heun", "ab2", "ab3"):
            assert_alike(page, pipe, **asked, sampler=sampler, guidance_scale=1.5)
        assert_alike(page, pipe, **asked, guidance_scale=3.0, guidance_budget={"latents": 16})
        assert_alike(page, pipe, **asked, guidance_scale=3.0, guidance_interval=(0.3, 0.7))
        assert_alike(page, pipe, class_labels=0, seeds=0, num_inference_steps=1)
        done = drawn(page, **asked, guidance_scale=3.0, guidance_budget={"latents": 16}, guidance_interval=[0.5, 1.0])
        assert [record["guidance_budget"] for record in done["records"]] == [{"latents": 16}] * 3 + [None] * 2
        assert [record["time"] for record in done["records"]] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_picture_has_pythons_pixels(visit: Any, sited: Callable[..., Path], digits: Path, pipe: ElasticPipeline) -> None:
    with visit(sited(digits)) as page:
        width, height, rgba = drawn(page, class_labels=1, seeds=4, num_inference_steps=3)["picture"]
    (picture,) = pipe(class_labels=1, seeds=4, num_inference_steps=3).images
    pixels = np.array(rgba).reshape(height, width, 4)
    assert (pixels[..., 3] == 255).all()
    assert np.abs(pixels[..., 0] - np.asarray(picture, dtype=int)).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_loops_on_a_cosine_schedule(visit: Any, sited: Callable[..., Path], looped: Path) -> None:
    pipe = ElasticPipeline.from_pretrained(looped, "ort", lanes=1)
    with visit(sited(looped)) as page:
        assert page.value("document.getElementById('sampler').value") == "ddpm"
        for sampler in ("ddpm", "ddim"):
            for loops in (1, 4):
                asked = {"class_labels": 2, "seeds": 9, "num_inference_steps": 4, "budget": {"loops": loops}}
                assert_alike(page, pipe, **asked, sampler=sampler, guidance_scale=2.0)


def test_a_decoder_makes_the_picture(visit: Any, sited: Callable[..., Path], latent: Path) -> None:
    pipe = ElasticPipeline.from_pretrained(latent, "ort", lanes=1)
    asked = {"class_labels": 2, "seeds": 9, "num_inference_steps": 3}
    with visit(sited(latent)) as page:
        width, height, rgba = drawn(page, **asked)["picture"]
    (picture,) = pipe(**asked).images
    pixels = np.array(rgba).reshape(height, width, 4)[..., :3]
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - np.asarray(picture, dtype=int)).max() <= 1
    assert pixels.std() > 10


def recorded(folder: Path, off: float) -> Path:
    """A bundle with a decoder and what the original answered, of the decoder `off` beside what it answers."""
    bundle = Bundle.open(folder)
    graphs, random = bundle.manifest.graphs, np.random.default_rng(0)
    feeds = {name: array for name, array in tiny_feeds(2, 16).items() if name != "latent_ids"}
    latent = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    with open_artifact(bundle, "decoder", graphs["decoder"].artifacts[0], "ort") as session:
        image = session.run({"latent": latent})["image"]
    arrays = pack("denoiser", feeds, {Budget(latents=64): {"prediction": feeds["sample"] + np.float32(16)}})
    arrays |= pack("decoder", {"latent": latent}, {Budget(): {"image": image + np.float32(off)}})
    np.savez(folder / "reference.npz", **arrays)
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, reference=entry(folder, folder / "reference.npz")))
    return folder


def test_the_decoder_is_compared_with_the_original(visit: Any, sited: Callable[..., Path], latent: Path, tmp_path: Path) -> None:
    pattern = (
        r"Compared with what the original answered at 1 budgets: the largest difference is [\d.e+-]+; and as the picture of a latent: "
        r"the largest difference is [\d.e+-]+\. onnxruntime-web .*"
    )
    with visit(sited(recorded(Path(shutil.copytree(latent, tmp_path / "right")), 0.0))) as page:
        assert re.fullmatch(pattern, page.value("document.getElementById('proof').textContent"))
    wrong = sited(recorded(Path(shutil.copytree(latent, tmp_path / "wrong")), 0.5))
    with visit(wrong, until="document.getElementById('status')?.classList.contains('wrong')") as page:
        status = page.value("document.getElementById('status').textContent")
        assert re.fullmatch(r"the decoder answers otherwise than the original, by 0\.50 where [\d.e+-]+ is allowed\.", status)
        assert page.value("document.getElementById('draw').disabled") is True


def test_a_seed_is_numpys_noise(visit: Any, sited: Callable[..., Path], digits: Path) -> None:
    with visit(sited(digits)) as page:
        module = page.value("new URL('noise.js', document.querySelector('script[src]').src).href")
        for seed in (0, 7, 2**32, 2**63 - 1):
            numbers = f"import('{module}').then(({{Source}}) => Array.from(new Source('{seed}').normals(20000)))"
            np.testing.assert_allclose(page.value(numbers), np.random.default_rng(seed).standard_normal(20000), atol=1e-13, rtol=0)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium-headless-shell")
def test_webgpu_answers_the_same(
    showing: Any, sited: Callable[..., Path], digits: Path, pipe: ElasticPipeline, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with browser(tmp_path_factory.mktemp("profile"), gpu=True) as software, showing(software, sited(digits)) as page:
        if not page.value("navigator.gpu ? navigator.gpu.requestAdapter().then(Boolean) : false"):
            pytest.skip("this Chromium has no WebGPU, not even in software")
        assert "WebAssembly" in page.value("document.getElementById('where').textContent"), "a GPU in software is left aside"
        page.value("""(at => {
            const name = `${elastic.site.models.denoiser.sha256} WebGPU`;  // nothing to measure: it takes a minute in software
            localStorage.setItem('elastic-export-times', JSON.stringify({[name]: {'1 latents=64': 1}}));
            at.value = 'webgpu';
            at.dispatchEvent(new Event('change'));
        })(document.getElementById('provider'))""")
        page.until("/WebGPU$/.test(document.getElementById('where').textContent) && !document.getElementById('draw').disabled")
        assert "Compared with what the original answered at 4 budgets" in page.value("document.getElementById('proof').textContent")
        for latents in (16, 64):
            assert_alike(page, pipe, class_labels=5, seeds=1, num_inference_steps=2, budget={"latents": latents}, guidance_scale=2.0)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_packaged_sample_runs_in_both_precisions(visit: Any, sited: Callable[..., Path], sample: Path, precision: str) -> None:
    pipe = ElasticPipeline.from_pretrained(sample, "ort", precisions=precision, lanes=1)
    noise = np.random.default_rng(1).standard_normal((1, *pipe.bundle.manifest.model.sample_shape))
    with visit(sited(sample, precision)) as page:
        assert page.value("elastic.site.precision") == precision
        assert "Compared with what the original answered at" in page.value("document.getElementById('proof').textContent")
        pictures: list[np.ndarray] = []
        for latents in (16, 128, 256):
            asked: dict[str, Any] = {"class_labels": 8, "num_inference_steps": 2, "budget": {"latents": latents}, "guidance_scale": 2.0}
            theirs = pipe(**budgets(asked), noise=noise, output_type="latent").images
            ours = np.array(drawn(page, **asked, noise=noise.ravel().tolist())["latents"]).reshape(theirs.shape)
            pictures.append(ours)
            if precision == "fp32":
                np.testing.assert_allclose(ours, theirs, atol=CLOSE, rtol=0)
            else:  # whose kernels round activations, each in its own way: as alike as both are to the original
                assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.05
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.pairwise(pictures)), "a budget is seen in the picture"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged sample in float32 and in eight bits."""
    pytest.importorskip("torch", reason="exporting needs torch")
    import elastic_export

    folder = tmp_path_factory.mktemp("sample") / "bundle"
    for precision in ("fp32", "int8"):
        elastic_export.export("elit-mnist", output=folder, precision=precision, verify="ends")
    assert {each.precision for each in Bundle.open(folder).manifest.graphs["denoiser"].artifacts} == {"fp32", "int8"}
    return folder
