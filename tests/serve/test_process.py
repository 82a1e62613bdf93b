"""`elastic-export serve` as a process: it says where it listens, logs without prompts, and ends cleanly."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="serving needs uvicorn")
httpx2 = pytest.importorskip("httpx2", reason="what talks to the server")

PROGRAM = "from elastic_export.cli import main; main()"


@contextlib.contextmanager
def process(
    folder: Path, *options: str, program: str = PROGRAM, **environment: str
) -> Iterator[tuple["subprocess.Popen[str]", str, list[str]]]:
    """The command over a bundle, on a free port: the process, its address, and its lines on stderr."""
    command = [sys.executable, "-c", program, "serve", str(folder), "--backend", "ort", "--port", "0", *options]
    running = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(running.stderr or ()))
    reading.start()
    try:
        first = running.stdout.readline()
        address = re.search(r"http://\S+", first)
        assert address, "\n".join([first, *lines])
        yield running, address[0], lines
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()
        reading.join()
        running.stdout.close()
        running.stderr.close()


def test_it_draws_logs_no_prompts_and_ends_when_told(digits: Path) -> None:
    with process(digits) as (running, address, lines):
        drawn = httpx2.post(f"{address}/v1/images/generations", json={"prompt": "  7", "steps": 2, "user": "someone"}, timeout=60)
        refused = httpx2.post(f"{address}/v1/images/generations", json={"prompt": "something private"}, timeout=60)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
    assert (drawn.status_code, refused.status_code) == (200, 400)
    records = [json.loads(line) for line in lines]
    asked = [line for line in records if line["what"] == "request"]
    assert [line["status"] for line in asked] == [200, 400]
    assert asked[0]["pictures"][0]["seconds"] > 0
    assert records[-1]["what"] == "closed"
    text = "".join(lines) + refused.text
    assert "private" not in text
    assert "someone" not in text


def until_it_draws(address: str) -> None:
    end = time.monotonic() + 20
    with httpx2.Client() as http:
        while "elastic_pictures_drawing 0.0" in http.get(f"{address}/metrics").text:
            assert time.monotonic() < end, "nothing is drawn"


def test_what_is_in_flight_when_it_ends_is_drawn(digits: Path) -> None:
    with process(digits, "--drain-seconds", "60") as (running, address, _):
        answers: list[Any] = []

        def ask() -> None:
            answers.append(httpx2.post(f"{address}/v1/images/generations", json={"class_labels": 1, "steps": 250, "n": 10}, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        until_it_draws(address)
        running.send_signal(signal.SIGTERM)
        assert running.wait(70) == 0
        asking.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["data"]) == 10


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_drawn_when_the_time_is_over_is_told_so(digits: Path, stream: bool) -> None:
    with process(digits, "--drain-seconds", "0.5", "--max-steps", "100000") as (running, address, lines):
        answers: list[Any] = []
        body = {"class_labels": 1, "steps": 100_000, "stream": stream}
        asking = threading.Thread(target=lambda: answers.append(httpx2.post(f"{address}/v1/images/generations", json=body, timeout=60)))
        asking.start()
        until_it_draws(address)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        asking.join()
    assert answers[0].status_code == (200 if stream else 503)
    assert '"code":"closing"' in answers[0].text
    assert "Traceback" not in "".join(lines)


STUCK = (
    "import threading; from elastic_serve import engine, server; engine.step = lambda *_: threading.Event().wait(); server.ANSWERING = 1\n"
)


@pytest.mark.parametrize(("drain", "signals"), [("60", 2), ("0.2", 1)])
def test_it_ends_though_a_step_does_not(digits: Path, drain: str, signals: int) -> None:
    with process(digits, "--drain-seconds", drain, program=STUCK + PROGRAM) as (running, address, lines):
        answers: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(httpx2.HTTPError):
                answers.append(httpx2.post(f"{address}/v1/images/generations", json={"class_labels": 1}, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        with httpx2.Client() as http:
            while "elastic_pictures_waiting 1.0" not in http.get(f"{address}/metrics").text:
                time.sleep(0.01)
        for _ in range(signals):
            running.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert running.wait(20) == 0
        asking.join()
    assert json.loads(lines[-1])["what"] == "closed"
    assert "Traceback" not in "".join(lines)
    assert [answer.status_code for answer in answers] == [503] * (signals == 1) or signals == 2


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "3601"])
def test_a_time_to_drain_that_is_none_is_refused(digits: Path, seconds: str) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(digits), "--drain-seconds", seconds]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--drain-seconds" in done.stderr
    assert "Traceback" not in done.stderr


def test_listening_to_others_without_a_key_is_warned_of(digits: Path) -> None:
    with process(digits, "--host", "0.0.0.0") as (running, _, lines):
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
    assert any("without an API key" in line for line in lines)
    with process(digits, "--host", "0.0.0.0", ELASTIC_EXPORT_API_KEY="secret") as (running, _, lines):
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
    assert not any("without an API key" in line for line in lines)


def test_a_port_that_is_taken_is_one_line(digits: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", PROGRAM, "serve", str(digits), "--backend", "ort", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use: take another --port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "x" * 300])
def test_a_host_that_is_not_here_is_one_line_before_anything_is_opened(tmp_path: Path, host: str) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(tmp_path), "--host", host]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"cannot listen on {host}:8000: " in done.stderr.replace("\n", "")
    assert "take another --host" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_no_header_carries_is_refused(digits: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(digits)]
    environment = os.environ | {"ELASTIC_EXPORT_API_KEY": "secret\n"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "ELASTIC_EXPORT_API_KEY begins or ends with white space" in done.stderr
    assert "secret" not in done.stderr


def test_two_bundles_of_one_name_are_refused(digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(digits), str(tmp_path / digits.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"two bundles are called '{digits.name}'" in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "greenlet", "prometheus_client"])
def test_a_package_that_is_missing_is_advice(package: str, digits: Path) -> None:
    program = f"import sys; sys.modules[{package!r}] = None\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program, "serve", str(digits)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert "pip install 'elastic-export[serve]'" in done.stderr


def test_pictures_take_turns_where_the_command_says_so(digits: Path) -> None:
    with process(digits, "--batch", "1") as (_, address, _):
        drawn = httpx2.post(f"{address}/v1/images/generations", json={"class_labels": 7, "n": 3, "steps": 3}, timeout=60)
        (model,) = httpx2.get(f"{address}/v1/models").json()["data"]
        metrics = httpx2.get(f"{address}/metrics").text
    assert drawn.status_code == 200
    assert (model["elastic"]["rows"], model["elastic"]["takes_turns"]) == (1, "the server was told so, by --batch 1")
    assert f'elastic_run_rows_bucket{{le="1.0",model="{model["id"]}"}} 9.0' in metrics
    assert f'elastic_run_rows_count{{model="{model["id"]}"}} 9.0' in metrics


def test_a_cluster_without_ray_is_advice(digits: Path) -> None:
    program = f"import sys; sys.modules['ray'] = None\n{PROGRAM}"
    command = [sys.executable, "-c", program, "serve", str(digits), "--ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert "pip install 'elastic-export[ray]'" in done.stderr


def test_options_of_a_cluster_without_one_are_refused(digits: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(digits), "--replicas", "2-4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "give --ray, too" in done.stderr
