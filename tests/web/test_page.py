"""The page in a real browser: it draws, its slider and deadline act, what goes wrong is shown, and nothing is said on the console."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser

pytestmark = pytest.mark.browser
WRONG = "document.getElementById('status')?.classList.contains('wrong')"


def text(page: Browser, name: str) -> str:
    return str(page.value(f"document.getElementById('{name}').textContent"))


def put(page: Browser, name: str, value: object) -> None:
    page.value(f"(at => {{ at.value = {value!r}; at.dispatchEvent(new Event('input')); }})(document.getElementById('{name}'))")


def click(page: Browser, name: str) -> None:
    page.value(f"document.getElementById('{name}').click()")


def drawn(page: Browser, what: str = "Class 0") -> str:
    """Press Draw and wait for the picture; what is then said."""
    click(page, "draw")
    status = page.until(
        f"/^{what}: /.test(document.getElementById('status').textContent) && !document.getElementById('draw').disabled "
        "&& document.getElementById('status').textContent"
    )
    return str(status)


@pytest.fixture(scope="module")
def site(sited: Callable[..., Path], digits: Path) -> Path:
    return sited(digits)


def test_it_draws(visit: Any, site: Path) -> None:
    with visit(site) as page:
        assert text(page, "name") == page.value("document.title") == "elit-sit"
        assert re.fullmatch(r"fp32, (WebAssembly, \d+ threads?|WebGPU)", text(page, "where"))
        assert re.match(r"Compared with what the original answered at 4 budgets: the largest difference is \d", text(page, "proof"))
        page.value("document.querySelectorAll('#classes input')[7].click()")
        put(page, "seed", "5")
        put(page, "steps", "6")
        assert re.fullmatch(r"Class 7: \d+ ms, seed 5, latents 64", drawn(page, "Class 7"))
        assert page.value("document.getElementById('picture').naturalWidth") == 16
        assert page.value("document.getElementById('picture').alt") == "Class 7"
        assert page.value("document.getElementById('progress').value") == 1
        assert page.value("document.querySelectorAll('#steps-chart rect').length") == 6
        assert text(page, "steps-title").startswith("Budgets by step: latents 64; latents 64")
        first = page.value("document.getElementById('picture').src")
        put(page, "seed", "6")
        drawn(page, "Class 7")
        assert page.value("document.getElementById('picture').src") != first
        page.value("document.querySelectorAll('#history button')[1].click()")
        assert page.value("document.getElementById('picture').src") == first
        assert page.value("performance.getEntriesByType('resource').every(each => each.name.startsWith(location.origin))")


def test_the_slider_changes_the_budget_and_the_table_tells_of_each(visit: Any, site: Path) -> None:
    with visit(site) as page:
        rows = page.value("[...document.querySelectorAll('#table tr')].map(row => [...row.children].map(cell => cell.textContent))")
        assert [row[0] for row in rows] == [f"latents {latents}" for latents in (16, 32, 48, 64)]
        assert all(re.fullmatch(r"[\d.]+", row[1]) and re.fullmatch(r"[\d.]+", row[2]) and row[3] == "not graded" for row in rows)
        assert re.fullmatch(r"latents 64, about [\d.]+ ms", text(page, "budgetis"))
        put(page, "budget", "0")
        assert re.fullmatch(r"latents 16, about [\d.]+ ms", text(page, "budgetis"))
        assert page.value("document.querySelector('tr[aria-current]').firstChild.textContent") == "latents 16"
        put(page, "steps", "3")
        assert drawn(page).endswith("latents 16")
        assert page.value("elastic.last.records.map(record => record.budget.latents)") == [16, 16, 16]
        put(page, "weak", "least")
        put(page, "budget", "2")
        drawn(page)
        assert page.value("elastic.last.records[0].guidance_budget.latents") == 16
        put(page, "guidance", "1")  # where there is no weak branch, whatever is chosen for it
        drawn(page)
        assert page.value("elastic.last.records[0].guidance_budget") is None


def test_a_deadline_is_kept_or_refused_with_the_nearest(visit: Any, site: Path) -> None:
    with visit(site) as page:
        click(page, "keep")
        assert text(page, "budgetis") == "as the deadline allows"
        put(page, "deadline", "600000")
        put(page, "steps", "4")
        assert re.search(r"seed \d+, latents 64, in time$", drawn(page))
        assert page.value("elastic.last.records.every(record => /^\\d+ ms left for \\d steps at pace/.test(record.reason))")
        put(page, "deadline", "1")
        put(page, "steps", "500")
        click(page, "draw")
        page.until(WRONG)
        assert re.match(r"No picture is done in 1 ms here: the nearest that is reachable is \d+ ms", text(page, "status"))
        put(page, "steps", "2")
        put(page, "budget", "0")
        assert page.value("document.getElementById('keep').checked") is False
        assert drawn(page).endswith("latents 16"), "it goes on after an error"


def test_a_picture_is_cancelled(visit: Any, site: Path) -> None:
    with visit(site) as page:
        put(page, "steps", "1000")
        click(page, "draw")
        click(page, "cancel")
        page.until("document.getElementById('status').textContent === 'Cancelled.' && !document.getElementById('draw').disabled")
        put(page, "steps", "1")
        drawn(page)


WRONG_REQUESTS = [
    ("{class_labels: 10}", "class_labels must be 0 to 9, got 10."),
    ("{budget: {latents: 17}}", "latents is 16 to 64 in steps of 16, got 17."),
    ("{budget: {loops: 1}}", "The model has no axis loops; it has latents."),
    ("{sampler: 'ddpm'}", 'sampler must be euler, heun, ab2, ab3, got "ddpm".'),
    ("{guidance_scale: 0.5}", "guidance_scale must be 1 (off) or more, got 0.5."),
    ("{num_inference_steps: 0}", "num_inference_steps must be a whole number from 1 to 1000, got 0."),
    ("{noise: [1, 2]}", "noise must be 256 finite numbers, got [1,2]."),
    ("{seeds: -1}", "seeds must be a whole number from 0 to 2^63 - 1, as a text where it is above 2^53, got -1."),
    ("{seeds: 2 ** 60}", "seeds must be a whole number from 0 to 2^63 - 1, as a text where it is above 2^53, got 1152921504606847000."),
    ("{deadline_ms: 0}", "deadline_ms must be above 0, got 0."),
    ("{budget: {latents: 16}, deadline_ms: 60000}", "Give budget or deadline_ms, not both: a deadline chooses the budgets."),
    ("{guidance_budget: {latents: 16}}", "guidance_budget acts through guidance, which is off: give guidance_scale above 1."),
    (
        "{guidance_scale: 1, guidance_interval: [0.2, 1]}",
        "guidance_interval acts through guidance, which is off: give guidance_scale above 1.",
    ),
    ("{guidance_scale: 2, guidance_interval: [0, 0.5, 1]}", "guidance_interval must be two times that rise, within 0 to 1, got [0,0.5,1]."),
    ("{guidance_scale: 2, guidance_interval: 0.5}", "guidance_interval must be two times that rise, within 0 to 1, got 0.5."),
    ("{prompt: 'a cat'}", "There is no prompt in a request; there are class_labels,"),
]


def test_a_request_that_is_wrong_is_told_so(visit: Any, site: Path) -> None:
    with visit(site) as page:
        for asked, message in WRONG_REQUESTS:
            assert message in page.value(f"elastic.draw({asked}).then(() => 'drawn', error => error.message)"), asked


def reload(page: Browser) -> None:
    """Load the page anew and wait until that one, and not the one that is left, is ready."""
    page.value("window.left = true; setTimeout(() => location.reload())")
    page.until("!window.left && window.elastic && document.getElementById('status')?.textContent === 'Ready.'")


def test_times_are_kept_for_the_next_visit(visit: Any, site: Path) -> None:
    with visit(site) as page:
        page.value("""(store => {
            const names = Object.keys(JSON.parse(localStorage.getItem(store)));
            const times = names.map(name => [name, {'1 latents=64': 5, '1 latents=16': 1}]);
            localStorage.setItem(store, JSON.stringify(Object.fromEntries(times)));
        })('elastic-export-times')""")
        reload(page)
        put(page, "guidance", "1")
        put(page, "steps", "2")
        page.until("/^latents 64, about 10000 ms/.test(document.getElementById('budgetis').textContent)")
        click(page, "measure")
        page.until("document.getElementById('status').textContent === 'Measured.'")
        assert not text(page, "budgetis").startswith("latents 64, about 10000 ms")
        page.value("localStorage.setItem('elastic-export-times', 'no JSON')")
        reload(page)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("denoiser.onnx", "denoiser.onnx is not there (404): copy the whole site, or write it again."),
        ("reference.bin", "reference.bin is not there (404): copy the whole site, or write it again."),
        ("worker.js", "The worker did not start"),
        ("onnxruntime-web/ort.wasm.min.mjs", "ort.wasm.min.mjs"),
    ],
)
def test_a_file_that_is_missing_is_named(visit: Any, site: Path, tmp_path: Path, name: str, message: str) -> None:
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    next(copy.glob(f"*/{name}")).unlink()
    with visit(copy, until=WRONG, silent=False) as page:
        assert message in text(page, "status")
        assert page.value("document.getElementById('draw').disabled") is True
        assert page.value("document.getElementById('provider').disabled") is False
        assert all("404" in line or "No available" in line for line in page.console), "the browser itself notes what is not there"


def test_a_damaged_or_wrong_model_never_draws(visit: Any, site: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    model, numbers = next(copy.glob("*/denoiser.onnx")), next(copy.glob("*/reference.bin"))
    whole = model.read_bytes()
    for content in (whole[:-1], whole + b"x", bytes(len(whole))):
        model.write_bytes(content)
        with visit(copy, until=WRONG) as page:
            assert text(page, "status") == "denoiser.onnx is damaged: copy the whole site, or write it again."
    model.write_bytes(whole)
    numbers.write_bytes(bytes(len(numbers.read_bytes())))
    with visit(copy, until=WRONG) as page:
        assert re.match(r"the denoiser answers otherwise than the original, by [\d.e+-]+ where [\d.e+-]+ is allowed", text(page, "status"))


def test_it_fits_a_phone_and_the_dark(visit: Any, site: Path) -> None:
    with visit(site) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        assert page.value("document.documentElement.scrollWidth <= 360")
        light = page.value("getComputedStyle(document.documentElement).backgroundColor")
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert page.value("getComputedStyle(document.documentElement).backgroundColor") != light
        page.call("Emulation.setEmulatedMedia", features=[])
        page.call("Emulation.clearDeviceMetricsOverride")


def test_everything_has_a_name_for_a_screen_reader_and_a_place_for_the_keyboard(visit: Any, site: Path) -> None:
    roles = {"button", "slider", "spinbutton", "combobox", "checkbox", "radio", "progressbar", "image", "region"}
    with visit(site) as page:
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        shown = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]
        acting = [(role, name) for role, name in shown if role in roles]
        assert {role for role, _ in acting} == roles, {role for role, _ in shown}
        assert [role for role, name in acting if not name.strip()] == []
        page.value("document.getElementById('budget').focus()")
        before = page.value("document.getElementById('budget').value")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
        assert int(page.value("document.getElementById('budget').value")) == int(before) - 1
        assert page.value("document.getElementById('budget').getAttribute('aria-valuetext')").startswith("latents 48")
        page.call("Accessibility.disable")
