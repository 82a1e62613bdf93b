"""The page at `/`: it loads nothing from elsewhere, and a real browser draws with it."""

import base64
import hashlib
import re
from collections.abc import Iterator

import pytest
from chromium import CHROMIUM, Browser, browser
from serving import Running, Serving

from elastic_runtime.files.site import STYLE

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium-headless-shell")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(chromium: Browser, server: Running) -> Browser:
    chromium.console.clear()
    chromium.open(server.url + "/")
    chromium.until("document.querySelector('#classes input') !== null")
    return chromium


def test_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    with server.http() as http:
        answer = http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[^\"'\s<)]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|<script [^>]*src|<link [^>]*stylesheet| style=| on\w+=", answer.text)


def test_its_policy_allows_its_own_script_and_the_style_that_it_shares(server: Running) -> None:
    with server.http() as http:
        answer = http.get("/")
    for kind in ("script", "style"):
        (body,) = re.findall(rf"<{kind}>(.*?)</{kind}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert STYLE.read_text() in body
    assert ".classes input[type=radio]" in body, "a number among many classes is to be seen"


def test_everything_that_is_filled_in_has_a_label(server: Running) -> None:
    with server.http() as http:
        text = http.get("/").text.partition("<script>")[0]
    labelled = set(re.findall(r'<label for="(\w+)"', text))
    assert set(re.findall(r'<(?:input|select|textarea)[^>]* id="(\w+)"|<select id="(\w+)"', text)) != set()
    fields = {match for pair in re.findall(r'<(?:input|textarea)[^>]* id="(\w+)"|<select id="(\w+)"', text) for match in pair if match}
    assert fields <= labelled


@needs_browser
@pytest.mark.browser
def test_a_browser_draws(chromium: Browser, server: Running) -> None:
    page = opened(chromium, server)
    page.value("document.querySelectorAll('#classes input')[7].click(); at('seed').value = 5; at('draw').click()")
    status = page.until("/^Class 7: /.test(at('status').textContent) && at('status').textContent")
    assert re.search(r"Class 7: \d+ ms, seed 5, latents \d+", page.value("at('status').textContent")), status
    assert page.value("at('picture').naturalWidth") == 16
    assert page.value("at('progress').value") == 1
    assert page.value("at('history').children.length") >= 1
    assert page.console == []


@needs_browser
@pytest.mark.browser
def test_the_slider_changes_the_budget(chromium: Browser, server: Running) -> None:
    page = opened(chromium, server)
    assert page.value("at('budgetis').textContent") == "as the load allows"
    page.value("at('budget').value = 0; at('budget').dispatchEvent(new Event('input'))")
    assert page.value("at('auto').checked") is False
    words = page.value("at('budgetis').textContent")
    cheapest = re.match(r"(latents \d+), about \d+ ms", words)
    assert cheapest, words
    page.value("at('draw').click()")
    page.until("/^Class 0: /.test(at('status').textContent)")
    assert page.value("at('status').textContent").endswith(cheapest[1])
    assert page.console == []


@needs_browser
@pytest.mark.browser
def test_a_picture_is_cancelled(chromium: Browser, server: Running) -> None:
    page = opened(chromium, server)
    page.value("at('steps').value = 250; at('draw').click(); at('cancel').click()")
    page.until("at('status').textContent === 'Cancelled.'")
    assert page.value("at('draw').disabled") is False
    assert page.console == []


@needs_browser
@pytest.mark.browser
def test_an_error_is_shown(chromium: Browser, server: Running) -> None:
    page = opened(chromium, server)
    page.value("at('deadline').value = 1; at('steps').value = 200; at('draw').click()")
    page.until("at('status').classList.contains('wrong')")
    assert "1 ms cannot be kept" in page.value("at('status').textContent")
    assert page.value("at('draw').disabled") is False
    assert all("400" in line for line in page.console), "the browser itself notes the status, and nothing else"


@needs_browser
@pytest.mark.browser
def test_a_key_is_asked_for(chromium: Browser, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_EXPORT_API_KEY", "secret")
    with serving() as server:
        chromium.open(server.url + "/")
        chromium.until("document.readyState === 'complete' && at('keyed').open")
        assert "API key" in chromium.value("at('status').textContent")
        chromium.value("at('key').value = 'secret'; at('key').dispatchEvent(new Event('change'))")
        chromium.until("document.querySelector('#classes input') !== null")
        chromium.value("at('draw').click()")
        chromium.until("/^Class 0: /.test(at('status').textContent)")
