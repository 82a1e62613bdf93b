"""Drawing along a plan from the command line, over sessions that need no backend."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome
from fake_flux import ENCODER, FLUX2, SCHNELL, Opener, manifest, to_zero
from fake_prompts import flux as with_text
from fakes import write_bundle, write_manifest
from msgspec.structs import replace
from PIL import Image

from elastic_runtime import Bundle, ElasticPipeline, fit_plan
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.manifest import Cost, Manifest
from elastic_runtime.ralu.plan import full

Run = Callable[..., Outcome]
# Exactly quadratic in the tokens, as attention is.
COST = tuple(
    Cost(budget={"tokens": count}, flops=count**2 + 100 * count, weight_bytes=1000, activation_bytes=10 * count) for count in (1, 512, 1024)
)

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def opened(monkeypatch: pytest.MonkeyPatch, folder: Path, opener: Opener) -> Path:
    """Write the opener's manifest and let the pipeline of any folder open its sessions."""
    whole: Manifest = opener.bundle.manifest
    model = whole.model
    if model.text:
        encoders = tuple(replace(one, tokenizer=entry(folder, folder / one.tokenizer.path)) for one in model.text.encoders)
        model = replace(model, text=replace(model.text, encoders=encoders))
    folder.mkdir(exist_ok=True)
    write_manifest(folder, replace(whole, model=model, cost=COST))
    monkeypatch.setattr(ElasticPipeline, "from_pretrained", lambda bundle, backend=None, precisions=(): ElasticPipeline(bundle, opener))
    opener.bundle = Bundle.open(folder)
    return folder


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bundle of a model of five classes."""
    return opened(monkeypatch, tmp_path / "digits", Opener(manifest(SCHNELL, classes=5), to_zero))


def test_classes_are_drawn_along_a_plan_and_the_saving_is_said_both_ways(run: Run, digits: Path, tmp_path: Path) -> None:
    done = run("generate", digits, "-o", tmp_path / "a.png", "--classes", "0-2", "--plan", "7x", "--guidance", "2", "-q")
    assert done.code == 0, done.err
    assert "plan 7x, 10 steps at 16/19/64 tokens" in done.out
    assert "x less than 10 steps at full resolution" in done.out
    assert "x less than 50" in done.out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 64 + 2 * 4, 64)
        assert json.loads(picture.info["elastic-export"])["plan"] == "7x"


def test_json_tells_the_plan_the_steps_and_what_they_cost(run: Run, digits: Path, tmp_path: Path) -> None:
    done = run(
        "generate", digits, "-o", tmp_path / "a.png", "--plan", "full", "--steps", "4", "--cache", "2", "--width", "32", "--json", "-q"
    )
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["schema"].startswith("elastic-export/generate/")
    assert record["schedule"]["steps"] == [4]
    assert [step["computed"] for step in record["steps"]] == [True, True, False, True]
    assert [step["budget"]["tokens"] for step in record["steps"]] == [32] * 4
    assert record["flops"]["plan"] == record["flops"]["same_steps"] * 3 // 4
    assert record["classes"] == [0]
    assert (record["height"], record["width"], record["guidance"], record["embedded_guidance"], record["skipped"]) == (64, 32, 2.0, None, 1)
    assert record["seconds"] >= sum(step["seconds"] for step in record["steps"])


def test_a_plan_of_one_s_own_gets_a_fitted_schedule(run: Run, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="fitting needs scipy")
    done = run("generate", digits, "-o", tmp_path / "a.png", "--plan", "2,3,5/0.2,0.3,1/0.25", "--json", "-q")
    assert done.code == 0, done.err
    schedule = json.loads(done.out)["schedule"]
    assert (schedule["steps"], schedule["up_ratio"]) == ([2, 3, 5], 0.25)
    assert schedule["z"] == pytest.approx(6.261, abs=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "size", "shift"),
    [
        ({"shift": 2.0}, (64, 64), 2.0),
        (DYNAMIC, (64, 64), full(10, 64, DYNAMIC).shifts[0]),
        (DYNAMIC, (64, 96), full(10, 96, DYNAMIC).shifts[0]),
        ({"use_dynamic_shifting": True, "mu": "empirical"}, (64, 64), None),
    ],
    ids=["static", "dynamic", "of a larger picture", "none"],
)
def test_its_schedule_is_fitted_to_the_shift_that_the_bundle_has_at_that_size(
    run: Run, digits: Path, tmp_path: Path, scheduler: dict[str, Any], size: tuple[int, int], shift: float | None
) -> None:
    pytest.importorskip("scipy", reason="fitting needs scipy")
    whole = Bundle.open(digits).manifest
    write_manifest(digits, replace(whole, model=replace(whole.model, config={"scheduler": scheduler})))
    words = ["--plan", "2,3,5/0.2,0.3,1/0.25", "--height", size[0], "--width", size[1], "--json", "-q"]
    done = run("generate", digits, "-o", tmp_path / "a.png", *words)
    if shift is None:
        message = " ".join(done.err.replace("│", " ").split())
        assert (done.code, f"with base_shift {full(10, 64, scheduler).shifts[0]:g}: the search runs into its bound" in message) == (2, True)
        return
    schedule, wanted = json.loads(done.out)["schedule"], fit_plan((2, 3, 5), (0.2, 0.3, 1.0), 0.25, shift)
    assert (schedule["z"], schedule["shifts"]) == (pytest.approx(wanted.z), pytest.approx(wanted.shifts))
    assert schedule["z"] != pytest.approx(6.261, abs=0.1)


def test_prompts_are_drawn_and_a_cut_one_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opener = with_text(tmp_path / "flux")
    folder = opened(monkeypatch, tmp_path / "flux", opener)
    words: list[Any] = ["--prompt", "a red cat a blue dog", "--prompt", "a cat", "--negative-prompt", "blue", "--true-cfg", "2"]
    done = run("generate", folder, "-o", tmp_path / "a.png", *words, "--height", "32", "--width", "64", "-q")
    assert done.code == 0, done.err
    assert "text_encoder sees the first 5 of 7 tokens" in done.err
    assert "2 pictures in" in done.out
    assert opener.calls("text_encoder") == [{"input_ids": (3, 5)}]
    missing = run("generate", folder, "-o", tmp_path / "b.png", "-q")
    assert (missing.code, "draws from prompts: give --prompt" in missing.err) == (2, True)
    classes = run("generate", folder, "-o", tmp_path / "b.png", "--prompt", "a", "--classes", "1", "-q")
    assert (classes.code, "--classes does not fit tiny" in classes.err) == (2, True)


def test_a_seed_gives_the_same_picture(run: Run, digits: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1)):
        assert run("generate", digits, "-o", tmp_path / f"{name}.png", "--seed", seed, "-q").code == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"]
    np.testing.assert_array_equal(*pictures)


def test_plans_along_the_model_s_own_schedule_take_any_number_of_steps(run: Run, digits: Path, tmp_path: Path) -> None:
    done = run("generate", digits, "-o", tmp_path / "a.png", "--plan", "speed", "--steps", "6", "-q")
    assert done.code == 0, done.err
    assert "plan speed, 6 steps at 16/64 tokens" in done.out
    refused = run("generate", digits, "-o", tmp_path / "b.png", "--plan", "mrflow", "-q")
    assert (refused.code, "--components transformer,vae,encoder" in refused.err.replace("\n", "")) == (2, True)


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The command on a bundle with an encoder, and a picture to draw over."""
    folder = opened(monkeypatch, tmp_path / "digits", Opener(manifest(SCHNELL, classes=5, encoder=ENCODER), to_zero))
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "in.png")
    return ["generate", folder, "--image", tmp_path / "in.png", "-q"]


def test_a_picture_is_drawn_over_and_the_metadata_do_not_hold_it(run: Run, over: list[Any], tmp_path: Path) -> None:
    Image.new("1", (96, 64), 1).save(tmp_path / "mask.png")
    done = run(*over, "-o", tmp_path / "a.png", "--strength", "0.5", "--steps", "6", "--mask", tmp_path / "mask.png", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["plan"], record["width"], len(record["steps"])) == ("full, 3 steps", 96, 3)
    (tmp_path / "again.json").write_text(done.out)
    assert run("generate", over[1], "-o", tmp_path / "b.png", "--request", tmp_path / "again.json", "-q").code == 0
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
        request = json.loads(first.info["elastic-export"])["request"]
    assert set(request["image"]) == set(request["mask_image"]) == {"sha256"}
    assert request["strength"] == 0.5


def test_what_is_drawn_over_takes_its_share_of_the_steps_whatever_chooses(run: Run, over: list[Any], tmp_path: Path) -> None:
    for goal, chooser in (([], "None"), (["--budget", "auto"], "Auto"), (["--max-memory", "999GB"], "FitMemory")):
        done = run(*over, "-o", tmp_path / "a.png", "--strength", "0.6", "--steps", "28", "--json", "--overwrite", *goal)
        assert done.code == 0, done.err
        record = json.loads(done.out)
        assert (record["plan"], record.get("policy", "None").partition("(")[0]) == ("full, 17 steps", chooser)
    record = json.loads(run(*over, "-o", tmp_path / "a.png", "--budget", "auto", "--json", "--overwrite").out)
    assert record["plan"] == "full, 12 steps"


def test_steps_may_be_given_where_the_plan_that_is_usual_takes_any(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = manifest(SCHNELL, classes=5)
    few = replace(whole, model=replace(whole.model, few_steps=4))
    for name, described, words in (("few", few, []), ("odd", whole, ["--height", "72"])):
        folder = opened(monkeypatch, tmp_path / name, Opener(described, to_zero))
        done = run("generate", folder, "-o", tmp_path / "a.png", "--steps", "3", "--json", "--overwrite", *words)
        assert (done.code, json.loads(done.out)["plan"]) == (0, "full, 3 steps"), done.err


def test_pictures_are_edited_after_and_the_metadata_do_not_hold_them(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = opened(monkeypatch, tmp_path / "klein", Opener(manifest(FLUX2, classes=5, encoder=ENCODER), to_zero))
    for name, size in (("a", (96, 64)), ("b", (64, 64))):
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    words = ["generate", folder, "--plan", "full", "--steps", "2", "--image", tmp_path / "a.png", "-q"]
    done = run(*words, "--image", tmp_path / "b.png", "-o", tmp_path / "c.png", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["references"], record["height"], record["width"]) == (16 * 24 + 16 * 16, 64, 96)
    with Image.open(tmp_path / "c.png") as drawn:
        kept = json.loads(drawn.info["elastic-export"])["request"]["image_reference"]
    assert [set(each) for each in kept] == [{"sha256"}, {"sha256"}]
    over = json.loads(run(*words, "--strength", "0.5", "-o", tmp_path / "d.png", "--json").out)
    assert (over["references"], len(over["steps"]), over["request"]["strength"]) == (0, 1, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0"], "strength is above 0"),
        (["--plan", "4x"], "a picture is drawn over along a plan of one stage"),
        (["--mask", "small.png"], "mask_image has the size of image, 96 x 64 px, got 8 x 8"),
        (["--image", "small.png"], "image is a picture, or several of one size, got 96 x 64, 8 x 8"),
        (["--mask", "nothing.png"], "cannot read --mask nothing.png: No such file or directory"),
        (["--mask", "text.png"], "cannot read --mask text.png: cannot identify image file"),
        (["--mask", "broken.png"], "cannot read --mask broken.png: broken PNG file"),
        (["--image", "cut.png"], "cannot read --image cut.png: "),
    ],
)
def test_a_picture_that_cannot_be_drawn_over_is_said(
    run: Run, over: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("small.png")
    Path("text.png").write_text("no picture")
    Image.effect_noise((300, 300), 64).save("noise.png")
    whole = Path("noise.png").read_bytes()
    before, after = whole.rsplit(b"IDAT", 1)
    Path("broken.png").write_bytes(before + b"I\0AT" + after)
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    done = run(*over, "-o", tmp_path / "a.png", *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "5x"], "there is no plan '5x'; there are 4x, 7x, full, speed, mrflow"),
        (["--plan", "3,4/0.2,1/0.3"], "a plan is 4x, 7x, full, speed, mrflow, or steps/end times/share"),
        (["--plan", "3,4,5/0.4,0.3,1/0.3"], "end times rise"),
        (["--plan", "3,4,5/0.3,0.4,0.9/0.3"], "the last end time is 1"),
        (["--plan", "3,0,5/0.3,0.4,1/0.3"], "at least 1 step, got 0"),
        (["--plan", "3,4,5/0.3,0.4,1/1"], "up_ratio lies between 0 and 1"),
        (["--steps", "5"], "--steps is for --plan full, speed, mrflow; plan 4x has steps of its own"),
        (["--plan", "4x", "--height", "50"], "height is a multiple of 16 px for this plan, got 50"),
        (["--plan", "4x", "--width", "0"], "width is a multiple of 16 px for this plan, got 0"),
        (["--cache", "1"], "got an interval of 1"),
        (["--latents", "4"], "--latents does not fit tiny, which draws along a plan"),
        (["--sampler", "heun"], "--sampler does not fit tiny"),
        (["--autoguidance"], "--autoguidance does not fit tiny"),
        (["--prompt", "a cat"], "--prompt does not fit tiny, which draws classes: give --classes"),
        (["--negative-prompt", "a cat"], "negative_prompt does not go with class_labels: leave it out"),
        (["--cache", "0"], "got an interval of 0"),
        (["--true-cfg", "2"], "true_cfg_scale is for models with distilled guidance"),
        (["--classes", "7"], "this model has classes 0 to 4, got 7"),
    ],
)
def test_wrong_options_end_in_one_line(run: Run, digits: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("generate", digits, "-o", tmp_path / "a.png", *arguments, "-q")
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err
    assert not (tmp_path / "a.png").exists()


def test_a_picture_has_the_size_that_was_asked_for(run: Run, digits: Path, tmp_path: Path) -> None:
    done = run("generate", digits, "-o", tmp_path / "a.png", "--plan", "full", "--steps", "1", "--height", "16", "--width", "32", "-q")
    assert done.code == 0, done.err
    assert "1 picture in" in done.out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (32, 16)


def test_a_place_that_cannot_be_written_is_told_before_drawing(run: Run, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    done = run("generate", digits, "-o", tmp_path / "a" / "b" / "x.png")
    assert (done.code, "is a file; choose another -o/--output" in " ".join(done.err.split())) == (2, True)


def test_a_manifest_that_was_edited_is_named_before_drawing(run: Run, digits: Path, tmp_path: Path) -> None:
    for change, message in (
        (lambda model: model["config"].update(scheduler={"shift": "x"}), "the scheduler's shift is a number, got 'x'"),
        (lambda model: model["patches"].update(size=0), "a patch has a `size` of 1 to 1024, got 0"),
        (lambda model: model["vae"].update(upscale=0), "`upscale` is 1 to 1024"),
        (lambda model: model.update(num_classes=12, null_label=12), "tells of 12 classes, and its denoiser takes 5"),
    ):
        whole = json.loads((digits / "elastic.json").read_text())
        change(whole["model"])
        edited = tmp_path / "edited"
        edited.mkdir(exist_ok=True)
        (edited / "elastic.json").write_text(json.dumps(whole))
        done = run("generate", edited, "-o", tmp_path / "a.png", "--plan", "full")
        assert (done.code, message in " ".join(done.err.split())) == (2, True), done.err
        assert not (tmp_path / "a.png").exists()


def test_a_plan_does_not_fit_a_model_of_budgets(run: Run, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "elit", channels=1).folder
    done = run("generate", folder, "-o", tmp_path / "a.png", "--plan", "4x")
    assert done.code == 2
    assert "--plan does not fit tiny, which draws at budgets" in " ".join(done.err.replace("│", " ").split())
