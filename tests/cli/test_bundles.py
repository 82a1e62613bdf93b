"""The commands that read a bundle: generate, verify, inspect; and models."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import Outcome
from fakes import write_bundle, write_manifest
from PIL import Image

from elastic_export import cli
from elastic_runtime import Bundle, ElasticPipeline
from elastic_runtime.files.folder import writing

Run = Callable[..., Outcome]


def test_generate_writes_a_picture_that_tells_how_it_was_made(run: Run, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "row.png"
    done = run(
        "generate", digits, "-o", out, "--classes", "0-2,7", "--latents", 32, "--guidance-latents", 16, "--steps", 3, "--seed", 5, "--json"
    )
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["schema"] == "elastic-export/generate/1"
    assert (record["classes"], record["seed"], len(record["steps"])) == ([0, 1, 2, 7], 5, 3)
    assert record["steps"][0]["guidance_budget"] == {"latents": 16}
    with Image.open(out) as picture:
        assert picture.width > 3 * picture.height
        facts = json.loads(picture.text["elastic-export"])
    assert (facts["seed"], facts["sampler"], facts["guidance"]) == (5, "euler", 2.0)
    assert [path.name for path in out.parent.iterdir()] == ["row.png"]


def test_the_same_seed_draws_the_same_file_and_a_picture_is_not_clobbered(run: Run, digits: Path, tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{name}.png" for name in ("one", "two", "other"))
    for out, seed in ((one, 1), (two, 1), (other, 2)):
        assert run("generate", digits, "-o", out, "--steps", 2, "--seed", seed).code == 0
    pixels = [np.asarray(Image.open(path)) for path in (one, two, other)]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert (pixels[0] != pixels[2]).any()
    before = one.read_bytes()
    refused = run("generate", digits, "-o", one, "--steps", 1)
    assert refused.code == 2
    assert "one.png exists: choose another -o/--output, or replace it with --overwrite" in refused.err
    assert one.read_bytes() == before
    assert run("generate", digits, "-o", one, "--steps", 1, "--overwrite").code == 0
    assert one.read_bytes() != before


def test_a_schedule_of_budgets(run: Run, digits: Path, tmp_path: Path) -> None:
    done = run("generate", digits, "-o", tmp_path / "x.png", "--steps", 3, "--latents", "16,32,64", "--guidance", 1, "--json")
    assert [step["budget"]["latents"] for step in json.loads(done.out)["steps"]] == [16, 32, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "10"], "this model has classes 0 to 9, got 10"),
        (["--classes", "seven"], "numbers are written 7 or 0,3,7 or 0-9, got 'seven'"),
        (["--classes", "9-0"], "9-0 is reversed: write 0-9"),
        (["--classes", "0-99999999999"], "0-99999999999 is more than 10000 numbers: give fewer"),
        (["--classes", "9" * 5000], "a number has 18 digits at most, got one of 5000, 999999999999999999..."),
        (["--latents", "16-" + "9" * 5000], "a number has 18 digits at most, got one of 5000, 999999999999999999..."),
        (["--max-memory", "9" * 5000 + "GB"], "a memory limit must be a number of bytes above zero, got inf"),
        (["--latents", "63"], "latents 63 is not available: this model offers 16-64 in steps of 16; the nearest is 64"),
        (["--latents", "16,32", "--steps", "3"], "2 budgets were given for 3 steps"),
        (["--guidance", "0.5"], "guidance_scale must be 1 (off) or more, got 0.5"),
        (["--interval", "0.8-0.3"], "the guidance interval must lie in 0 to 1 and rise"),
        (["--interval", "often"], "an interval is written 0.3-0.8, got 'often'"),
        (["--sampler", "dpm"], "takes euler, heun, sde, ab2 or ab3"),
        (["--sampler", "sde", "--steps", "1"], "at least 2 steps, got 1"),
        (["--autoguidance"], "autoguidance needs a guidance budget smaller than the budget"),
        (["--steps", "0"], "Invalid value for '--steps'"),
    ],
)
def test_a_wrong_wish_is_answered_in_a_sentence_and_no_picture(
    options: list[str], message: str, run: Run, digits: Path, tmp_path: Path
) -> None:
    done = run("generate", digits, "-o", tmp_path / "x.png", *options)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_a_png_and_a_backend_exists(run: Run, digits: Path, tmp_path: Path) -> None:
    done = run("generate", digits, "-o", tmp_path / "x.jpg")
    assert (done.code, "pictures are written as .png, got 'x.jpg'" in done.err) == (2, True), done.err
    done = run("generate", digits, "-o", tmp_path / "x.png", "--backend", "abacus")
    assert (done.code, "there is no backend 'abacus'; there are" in done.err) == (2, True), done.err


def test_the_command_draws_what_the_library_draws(run: Run, digits: Path, tmp_path: Path) -> None:
    assert run("generate", digits, "-o", tmp_path / "x.png", "--classes", 3, "--steps", 4, "--seed", 9).code == 0
    with ElasticPipeline.from_pretrained(digits) as pipe:
        (ours,) = pipe([3], num_inference_steps=4, guidance_scale=2.0, generator=np.random.default_rng(9)).images
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture.resize(ours.size, Image.Resampling.NEAREST)), np.asarray(ours))


def test_verify_proves_every_budget_again(run: Run, digits: Path) -> None:
    done = run("verify", digits)
    assert done.code == 0, done.err
    assert "latents=16" in done.out
    document = json.loads(run("verify", digits, "--json").out)
    assert document["schema"] == "elastic-export/verify/1"
    assert all(row["passed"] for row in document["results"][0]["verified"])


def test_verify_names_the_budget_and_the_figure_that_fail(run: Run, digits: Path) -> None:
    done = run("verify", digits, "--tolerance", "1e-12", "--json")
    assert done.code == 1
    assert "fails at latents=16: max abs error" in done.err
    assert not all(row["passed"] for row in json.loads(done.out)["results"][0]["verified"])


def test_verify_notices_a_file_of_the_right_size_with_wrong_content(run: Run, digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits, tmp_path / "copy")
    file = folder / "onnx/denoiser.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = run("verify", folder)
    assert (done.code, "denoiser.onnx is damaged: its SHA-256 is not the manifest's" in done.err) == (2, True), done.err


def test_verify_notices_other_weights(run: Run, digits: Path, tmp_path: Path) -> None:
    """A reference from another model: what an export of wrong weights would look like."""
    folder = shutil.copytree(digits, tmp_path / "copy")
    bundle = Bundle.open(folder)
    arrays = {name: array + 0.1 if "/latents=64/" in name else array for name, array in bundle.reference().items()}
    from elastic_export.verifying import verify

    ((_, artifact),) = verify(bundle, arrays=arrays)
    assert [row.passed for row in artifact.verified] == [row.budget["latents"] != 64 for row in artifact.verified]


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_what_is_no_bundle_is_said_to_be_none(command: str, run: Run, tmp_path: Path) -> None:
    more = ["-o", tmp_path / "x.png"] if command == "generate" else []
    done = run(command, tmp_path / "nowhere", *more)
    assert (done.code, "nowhere is not a bundle: it does not exist" in done.err) == (2, True), done.err
    done = run(command, tmp_path, *more)
    assert (done.code, "holds no elastic.json" in done.err) == (2, True), done.err


def test_inspect_shows_and_gives_the_whole_manifest(run: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    done = run("inspect", bundle.folder)
    assert done.code == 0, done.err
    for text in ("axis latents: 4-64 in steps of 4", "sample float32[B, 4, 8, 8]", "B 1-4", "J 1-16"):
        assert text in done.out
    document = json.loads(run("inspect", bundle.folder, "--json").out)
    assert document["schema"] == "elastic-export/inspect/1"
    assert document["manifest"] == json.loads((bundle.folder / "elastic.json").read_text())


def test_inspect_shows_a_bundle_whose_costs_nobody_counted(run: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    nothing = tuple(msgspec.structs.replace(row, flops=0) for row in bundle.manifest.cost)
    write_manifest(bundle.folder, msgspec.structs.replace(bundle.manifest, cost=nothing))
    done = run("inspect", bundle.folder)
    assert (done.code, "0.000" in done.out) == (0, True), done.err


def test_inspect_shows_how_weights_came_to_few_bits(run: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    fitted = msgspec.structs.replace(artifact, precision="int4w", weight_rounding="gptq", unverified="it was not to be")
    write_manifest(bundle.folder, bundle.manifest.joined("denoiser", [fitted]))
    assert "onnx/denoiser.onnx (int4w, gptq) was not verified: it was not to be" in run("inspect", bundle.folder).err


def test_inspect_compares_hashes_on_request(run: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    bundle.file("onnx/denoiser.onnx").write_bytes(b"NOT really a graph")
    assert run("inspect", bundle.folder).code == 0
    done = run("inspect", bundle.folder, "--hashes")
    assert (done.code, "SHA-256" in done.err) == (2, True), done.err


def test_models_lists_what_may_be_exported(run: Run) -> None:
    pytest.importorskip("torch", reason="the zoo needs torch")
    done = run("models")
    assert done.code == 0, done.err
    rows = json.loads(run("models", "--json").out)["models"]
    assert {"elit-mnist", "elit-sit-xl-256", "elit-sit-s-512"} <= {row["name"] for row in rows}
    assert all(row["name"] in done.out for row in rows)
    xl = next(row for row in rows if row["name"] == "elit-sit-xl-256")
    assert xl["gflops"] == pytest.approx([118.3, 245.4], rel=1e-3)


def test_no_arguments_is_help_and_an_unknown_command_is_said(run: Run) -> None:
    assert "Usage: elastic-export" in run().out + run().err
    done = run("onix")
    assert (done.code, "onix" in done.err) == (2, True), done.err


@pytest.mark.skipif(os.name == "nt", reason="there, a process is ended without asking it")
def test_a_killed_command_leaves_no_half_written_folder(run: Run, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run("--help").code == 0  # from here on a signal is taken as Ctrl-C is
        with pytest.raises(SystemExit) as end, writing(tmp_path / "out") as draft:
            (draft.stage / "part").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert end.value.code == 128 + signal.SIGTERM
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="there, a process is ended without asking it")
def test_a_killed_command_says_that_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        done = run("inspect", "anything")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.code, done.err.strip()) == (128 + signal.SIGTERM, "error: terminated; what was there before is as it was")
