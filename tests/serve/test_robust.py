"""What a server on a network meets: half requests, floods, slow clients, many connections; and it goes on drawing."""

import contextlib
import socket
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Running, Serving

from elastic_runtime import BundleError, UsageError

CREATE = "/v1/images/generations"


def connected(server: Running) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=20)


def draws(server: Running) -> None:
    with server.http() as http:
        assert http.post(CREATE, json={"class_labels": 1, "steps": 2}).status_code == 200
        assert http.get("/health").json()["status"] == "ok"
    assert len(server.engine.scheduler) == 0


def answered(server: Running, *parts: bytes) -> bytes:
    """The first bytes that come back; nothing where the server hangs up."""
    with connected(server) as line:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                line.sendall(part)
        try:
            return line.recv(64)
        except ConnectionError:
            return b""


def test_what_is_no_http_is_refused(server: Running) -> None:
    assert answered(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n")[:12] in (b"", b"HTTP/1.1 400")
    draws(server)


def test_a_flood_of_headers_is_refused(server: Running) -> None:
    flood = (b"x-header-%d: " % number + b"a" * 1000 + b"\r\n" for number in range(2000))
    assert answered(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n", *flood)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    draws(server)


def test_a_body_that_says_it_is_small_and_is_not_is_cut_off(server: Running) -> None:
    chunk = b"10000\r\n" + b"7" * 0x10000 + b"\r\n"
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    assert answered(server, head, *[chunk] * 64).startswith(b"HTTP/1.1 413")
    draws(server)


def test_a_client_that_stops_in_the_middle_holds_nobody_up(server: Running) -> None:
    with connected(server) as line:
        line.sendall(b'POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"class_labels"')
        draws(server)
    draws(server)


def test_a_body_that_never_comes_is_not_waited_for(serving: Serving) -> None:
    from elastic_serve.body import Limits

    with serving(limits=Limits(reading=0.3)) as server:
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"
        with connected(server) as line:
            line.sendall(head)
            answer = b""
            while part := line.recv(4096):  # until it hangs up
                answer += part
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"too_slow"' in answer
        draws(server)


def test_a_thousand_idle_connections_hold_nobody_up(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(server))
        draws(server)


def test_a_client_that_reads_nothing_of_its_stream_holds_nobody_up(server: Running) -> None:
    body = b'{"class_labels": 1, "steps": 200, "stream": true, "partial_images": 16}'
    with connected(server) as line:
        line.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        with server.http() as http:
            assert http.post(CREATE, json={"class_labels": 1, "steps": 2}).status_code == 200


HOSTS = dict.fromkeys(("localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:80"), 200)
HOSTS |= dict.fromkeys(("evil.example", "127.0.0.1.evil.example:80", "evil.example:99999", "localhost:99999"), 403)
HOSTS |= dict.fromkeys(("evil.example@localhost", "[::1", ""), 403)


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_a_name_from_elsewhere_is_not_answered_to(server: Running, host: str, status: int) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"host": host}).status_code == status


ORIGINS = {"http://evil.example": 403, "null": 403, "": 403, "http://[": 403, "http://localhost:1": 403, None: 200}


@pytest.mark.parametrize(("origin", "status"), ORIGINS.items())
def test_a_page_from_elsewhere_draws_nothing(server: Running, origin: str | None, status: int) -> None:
    headers = {"content-type": "text/plain"} | ({} if origin is None else {"origin": origin})
    with server.http() as http:
        answer = http.post(CREATE, content=b'{"class_labels": 1, "steps": 2}', headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "wrong_origin"


def test_the_servers_own_page_draws(server: Running) -> None:
    with server.http() as http:
        assert http.post(CREATE, json={"class_labels": 1, "steps": 2}, headers={"origin": server.url}).status_code == 200


def test_paths_lead_nowhere(server: Running) -> None:
    for path in (b"/../../etc/passwd", b"/v1/models/../../../etc/passwd", b"//etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"/v1/models/%00"):
        assert answered(server, b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 404"
        ), path


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Bodies of known fields with any values, most of them wrong."""
    from elastic_serve.body import Body

    names = draw(st.lists(st.sampled_from(Body.__struct_fields__), max_size=5, unique=True))
    return {name: draw(json) for name in names}


@given(body=bodies())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_answered_in_the_form_of_the_api(server: Running, body: dict[str, Any]) -> None:
    """Read, and turned into requests of the bundle: what goes wrong is an error that names something, never a crash."""
    from elastic_serve import answers
    from elastic_serve.body import Limits, read, requests

    served = server.engine.models["digits"]
    try:
        for request in requests(read(msgspec.json.encode(body), Limits()), served, Limits()):
            served.prospect(request)
    except UsageError as error:
        status, content, _ = answers.error_of(error)
        assert status in (400, 404)
        assert content["error"]["message"]


@given(text=st.binary(max_size=60))
def test_any_bytes_are_a_body_or_an_error(text: bytes) -> None:
    from elastic_serve.body import BodyError, Limits, read

    with contextlib.suppress(BodyError):
        read(text, Limits())


HUGE = ("drop_fraction", "guidance_drop_fraction", "guidance_scale", "true_cfg_scale", "temperature", "deadline_ms")


@pytest.mark.parametrize("value", [1e308, -1e308, 1e-308])
@pytest.mark.parametrize("name", HUGE)
def test_no_number_is_the_servers_fault(server: Running, name: str, value: float) -> None:
    with server.http() as http:
        assert http.post(CREATE, json={"class_labels": 1, "steps": 2, name: value}).status_code in (200, 400)
        pair = {"guidance_scale": 2, "guidance_interval": [0, value]}
        assert http.post(CREATE, json={"class_labels": 1, "steps": 2} | pair).status_code in (200, 400)


def test_a_bundle_that_cannot_be_read_is_no_fault_of_who_asks() -> None:
    from elastic_serve import answers

    status, content, _ = answers.error_of(BundleError("ONNX Runtime cannot open /srv/secret/text_encoder.onnx: std::bad_alloc"))
    assert (status, content["error"]["type"], content["error"]["code"]) == (500, "server_error", "bundle_unreadable")
    assert "srv" not in content["error"]["message"]
