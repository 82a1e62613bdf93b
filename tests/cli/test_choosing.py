"""doctor, devices, and generate where it chooses the budget."""

import getpass
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from conftest import Outcome
from fakes import write_bundle
from PIL import Image
from recordings import MACHINES

from elastic_runtime import Bundle
from elastic_runtime.device import catalogue, probe
from elastic_runtime.sessions.session import Arrays

Run = Callable[..., Outcome]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be on a recorded machine."""

    def machine(name: str) -> None:
        monkeypatch.setattr("elastic_runtime.device.probe", lambda: probe(MACHINES[name]))

    return machine


def test_doctor_tells_what_is_here(run: Run, on: Callable[[str], None]) -> None:
    on("orin-nano-super")
    done = run("doctor")
    assert done.code == 0, done.err
    for phrase in ("Jetson Orin Nano", "power mode: MAXN_SUPER", "tensorrt 10.3.0", "102 GB/s (the catalogue)"):
        assert phrase in done.out
    document = json.loads(run("doctor", "--json").out)
    assert (document["schema"], document["listed"], document["device"]["cpu"]["cores"]) == (
        "elastic-export/doctor/1",
        "jetson-orin-nano-8-super",
        6,
    )
    assert any("elastic-export[torch]" in line for line in document["advice"])


def test_doctor_tells_what_an_old_runtime_opens(run: Run, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MACHINES, "old", msgspec.structs.replace(MACHINES["xeon"], packages={"onnxruntime-gpu": "1.20.1"}))
    on("old")
    assert "note: onnxruntime 1.20.1 opens opsets up to 21" in run("doctor").err
    assert json.loads(run("doctor", "--json").out)["advice"][0].startswith("onnxruntime 1.20.1 opens opsets up to 21, and exports have 23")
    on("xeon")
    assert "opens opsets" not in run("doctor").err


def test_doctor_fails_where_nothing_can_run_a_bundle(run: Run, on: Callable[[str], None]) -> None:
    on("laptop")
    done = run("doctor")
    assert done.code == 3
    assert "pip install 'elastic-export[ort]'" in done.err


def test_devices_marks_this_machine_and_forecasts_a_bundle(run: Run, on: Callable[[str], None], tmp_path: Path) -> None:
    on("rtx-4090")
    assert "rtx-4090 <- this machine" in run("devices").out
    bundle = write_bundle(tmp_path / "bundle").folder
    document = json.loads(run("devices", bundle, "--json").out)
    assert document["here"] == "rtx-4090"
    assert document["forecasts"].keys() == {entry.id for entry in catalogue()}
    assert document["devices"][0]["bandwidth"] == {"value": 68, "source": "datasheet", "confidence": "high"}
    assert "K*" in run("devices", bundle).out
    on("zen5")
    assert "not listed" in run("devices").out


@pytest.mark.parametrize(
    ("options", "policy", "reason"),
    [
        ((), "Auto(", "is the default"),
        (("--budget", "auto"), "Auto(", "is the default"),
        (("--target-ms", 60000), "Deadline(seconds=60.0", "ms left for 2 steps"),
        (("--max-memory", "200GB"), "FitMemory(limit=200000000000.0", "of the 200000 MB allowed"),
        (("--latents", 16), "Fixed(", "as asked"),
    ],
)
def test_the_picture_says_what_was_chosen_and_why(
    run: Run, digits: Path, tmp_path: Path, options: tuple[object, ...], policy: str, reason: str
) -> None:
    out = tmp_path / "one.png"
    done = run("generate", digits, "-o", out, "--steps", 2, "--json", *options)
    assert done.code == 0, done.err
    with Image.open(out) as picture:
        facts = json.loads(picture.text["elastic-export"])
    for record in (json.loads(done.out), facts):
        assert record["policy"].startswith(policy)
        assert reason in record["steps"][0]["reason"]
        assert record["total_seconds"] > 0
    assert Bundle.open(digits).manifest.axis("latents").max >= facts["steps"][0]["budget"]["latents"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--target-ms", 0.0001), 1, "the nearest that is reachable is"),
        (("--max-memory", "1MB"), 1, "no budget stays within 1 MB"),
        (("--target-ms", -5), 2, "above zero"),
        (("--max-memory", "lots"), 2, "memory is written 2GB"),
        (("--quality", 0.9), 2, "no quality table"),
        (("--quality", 7), 2, "above 0 and at most 1"),
        (("--budget", "huge"), 2, "--budget takes auto"),
        (("--budget", "auto", "--latents", 16), 2, "choose budgets twice"),
        (("--target-ms", 100, "--quality", 0.9), 2, "choose budgets twice"),
    ],
)
def test_goals_that_cannot_be_kept_draw_nothing(
    run: Run, digits: Path, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    done = run("generate", digits, "-o", tmp_path / "none.png", "--steps", 2, *options)
    assert done.code == code
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "none.png").exists()


def test_a_report_holds_what_ran_and_nothing_private(run: Run, digits: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run("doctor", digits, "--report", report)
    assert done.code == 0, done.err
    text = report.read_text()
    document = json.loads(text)
    assert document["schema"] == "elastic-export/doctor-report/1"
    ran = [row for row in document["trials"] if not row.get("reason")]
    assert {row["way"] for row in ran} >= {"onnxruntime"}
    assert all(row["passed"] and row["milliseconds"] > 0 and row["max_abs"] <= row["tolerance"] for row in ran)
    assert "what ran here" in done.out
    for private in (str(digits), str(tmp_path), str(Path.home()), platform.node(), getpass.getuser()):
        assert private not in text or len(private) < 5, private
    assert "add --report" in run("doctor", digits).err
    assert "exists: choose another name" in run("doctor", digits, "--report", report).err


@pytest.mark.parametrize("spelling", [".", "../digits"])
def test_a_report_says_bundle_for_its_folder_and_nothing_else(
    run: Run, digits: Path, tmp_path: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "digits"))
    monkeypatch.chdir(copy)
    denoiser = copy / "onnx" / "denoiser.onnx"
    opened = Bundle.open

    def damaged(folder: Path) -> Bundle:
        bundle = opened(folder)
        denoiser.unlink(missing_ok=True)
        return bundle

    monkeypatch.setattr(Bundle, "open", staticmethod(damaged))
    assert run("doctor", spelling, "--report", tmp_path / "report.json").code in (0, 3)
    reasons = {row["reason"] for row in json.loads((tmp_path / "report.json").read_text())["trials"] if row["way"] == "onnxruntime"}
    assert reasons == {"BUNDLE/onnx/denoiser.onnx is missing: the bundle is incomplete. Copy it again, or export it again."}


def test_a_report_of_an_artifact_that_misses_its_original(run: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastic_runtime.sessions import ort

    right = ort.OrtSession._several

    def wrong(self: ort.OrtSession, runs: Sequence[Arrays]) -> list[Arrays]:
        return [{name: 1.01 * array for name, array in answer.items()} for answer in right(self, runs)]

    monkeypatch.setattr(ort.OrtSession, "_several", wrong)
    done = run("doctor", digits, "--report", tmp_path / "report.json")
    assert done.code == 1
    assert "FAILS" in done.out
