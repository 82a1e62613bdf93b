"""The whole path on the packaged samples, and the one among them that is a diffusers folder."""

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("diffusers", reason="ralu-digits is a diffusers folder")
pytest.importorskip("onnxruntime", reason="drawing needs ONNX Runtime")

from elastic_export.cli.demo import SAMPLES as DRAWN
from elastic_runtime import Bundle, ElasticPipeline
from elastic_runtime.errors import UsageError

Run = Callable[..., Outcome]
SAMPLES = ("elit-mnist", "elt-mnist", "dcdit-mnist", "ralu-digits")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves, with two steps a picture in place of 20. Tests must not change it."""
    from elastic_export.cli.demo import demo as command

    folder = tmp_path_factory.mktemp("demo") / "demo"
    with redirect_stdout(io.StringIO()) as output:
        command(folder, steps=2, quiet=True)
    folder.with_name("said.txt").write_text(output.getvalue())
    return folder


def test_every_sample_is_proven_and_drawn_at_its_budgets_and_plans(demo: Path) -> None:
    for sample in SAMPLES:
        graphs = Bundle.open(demo / sample).manifest.graphs
        assert all(row.passed for graph in graphs.values() for artifact in graph.artifacts for row in artifact.verified)
        assert all(artifact.verified for graph in graphs.values() for artifact in graph.artifacts)
    with Image.open(demo / "digits.png") as picture:
        sheet = np.asarray(picture.convert("L"))
    columns, cell = 3 * 5 + 4, 64 + 4
    assert sheet.shape == (28 + 10 * cell - 4, 44 + columns * cell - 4)
    last = sheet[28 : 28 + 64, -64:]
    assert np.ptp(last) > 100, "something is drawn in the last plan's column"


def test_the_table_has_a_row_a_budget_and_a_plan_in_the_words_of_the_card(demo: Path) -> None:
    output = demo.with_name("said.txt").read_text()
    rows = re.findall(r"((?:latents|loops|tokens) \d+|plan (?:full, \d+ steps|4x|7x)) +[│|]? *\d", output)
    budgets = [f"{axis} {value}" for _, axis, values in DRAWN.values() for value in values]
    assert rows == [*budgets, "plan full, 2 steps", "plan full, 1 steps", "plan 4x", "plan 7x"]


def test_the_packaged_flux_brings_its_card_and_tells_no_place(demo: Path) -> None:
    manifest = Bundle.open(demo / "ralu-digits").manifest
    assert manifest.provenance.checkpoint is None
    assert (manifest.model.family, manifest.model.num_classes, manifest.model.config["scheduler"]["shift"]) == ("flux", 10, 2.0)
    assert [row.budget["tokens"] for row in manifest.cost] == [16, 136, 256]
    assert {"4x", "7x", "full, 20 steps"} <= {row.where for row in manifest.quality}
    assert all(row.accuracy > 0.5 for row in manifest.quality)


def test_it_is_listed_inspected_and_verified(demo: Path, run: Run) -> None:
    done = run("models", "--json")
    (row,) = (row for row in json.loads(done.out)["models"] if row["name"] == "ralu-digits")
    assert (row["axes"], row["weights"]) == ("tokens 16-256", "packaged")
    assert run("verify", demo / "ralu-digits").code == 0
    outcome = run("inspect", demo / "ralu-digits")
    assert "quality, from the model card" in outcome.out
    assert "full, 20 steps" in outcome.out


def test_the_same_noise_is_the_same_digit_along_plans(demo: Path) -> None:
    with ElasticPipeline.from_pretrained(demo / "ralu-digits") as pipe:
        drawn = [
            pipe(class_labels=[1], plan=plan, guidance_scale=2.0, generator=np.random.default_rng([0, 1]), output_type="np").images
            for plan in ("4x", "4x", "7x")
        ]
        with pytest.raises(UsageError, match="multiple of 8 px for this plan"):
            pipe(class_labels=[1], height=60, plan="4x")
        with pytest.raises(UsageError, match="multiple of 4 px, got 62"):
            pipe(class_labels=[1], height=62)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert all(picture.shape == (1, 64, 64, 3) for picture in drawn)
    assert all(picture.mean() < 0.5 < picture.max() for picture in drawn), "white on black"


def test_a_picture_that_is_there_is_not_replaced_unasked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "digits.png").write_bytes(b"mine")
    done = run("demo", "-o", tmp_path)
    assert (done.code, "digits.png exists" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["digits.png"]
