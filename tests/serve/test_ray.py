"""`elastic-export serve --ray` on a real cluster of this machine: replicas share the work, and one that is killed costs no picture."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not part of the extra dev: pip install 'elastic-export[ray]', or make ray-check")
httpx2 = pytest.importorskip("httpx2", reason="what talks to the server")

CREATE = "/v1/images/generations"
PROGRAM = "from elastic_export.cli import main; main()"


# Of Ray's own classes and pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def free_port() -> int:
    """A port that nobody has, and that Ray and the system give to nobody by themselves."""
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("all ports are taken")


@dataclass
class Cluster:
    """A server on Ray with two replicas."""

    process: "subprocess.Popen[str]"
    url: str
    lines: list[str] = field(default_factory=list)

    def replicas(self) -> list[int]:
        """Processes of the replicas, the oldest first."""
        return [int(match[1]) for line in self.lines if '"opened"' in line and (match := re.search(r"pid=(\d+)", line))]

    def http(self) -> Any:
        return httpx2.Client(base_url=self.url, timeout=120.0)


@pytest.fixture(scope="module")
def cluster(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, "serve", str(digits), "--backend", "ort", "--port", str(port)]
    command += ["--ray", "--replicas", "2-2", "--drain-seconds", "5"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path_factory.mktemp("home"))}  # where Ray keeps a token
    # A machine that is busy with other tests is slow to start, which is not what these are about.
    environment |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    running = Cluster(process, f"http://127.0.0.1:{port}")
    reading = threading.Thread(target=lambda: running.lines.extend(process.stderr or ()))
    reading.start()
    try:
        assert any("serving" in line for line in process.stdout), "".join(running.lines)  # Ray, too, prints
        yield running
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.terminate()  # else Ray's own processes stay
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()
        process.wait()
        reading.join()
        process.stdout.close()
        if process.stderr:
            process.stderr.close()


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_request_goes_to_who_is_done_first(cluster: Cluster) -> None:
    body = {"class_labels": 1, "steps": 250, "n": 10, "budget": {"latents": 64}}
    by, answers = Counter[str](), list[Any]()
    with cluster.http() as http, cluster.http() as other:
        occupying = threading.Thread(target=lambda: answers.append(other.post(CREATE, json=body)))
        occupying.start()
        time.sleep(1.0)  # what is foreseen is told a few times a second
        while occupying.is_alive() and sum(by.values()) < 20:
            answer = http.post(CREATE, json={"class_labels": 2, "steps": 2})
            assert answer.status_code == 200
            by[answer.headers["x-elastic-replica"]] += occupying.is_alive()
        occupying.join()
    assert answers[0].status_code == 200
    (busy,) = {answers[0].headers["x-elastic-replica"]}
    assert by[busy] <= sum(by.values()) / 4, "the idle one drew them"


def test_a_replica_that_is_killed_costs_nobody_a_picture(cluster: Cluster) -> None:
    answers, lock, killed = list[tuple[int, Any]](), threading.Lock(), threading.Event()

    def ask(number: int) -> None:
        with cluster.http() as http:
            asks = 0
            while asks < 3 or not killed.is_set():
                asks += 1
                seed = (number + asks) % 5
                body: dict[str, Any] = {"class_labels": 3, "steps": 80, "seed": seed, "budget": {"latents": 64}}
                body |= ({"stream": True, "partial_images": 3}, {"deadline_ms": 60_000}, {})[number % 3]
                answer = http.post(CREATE, json=body)
                with lock:
                    answers.append((seed, answer))

    known = cluster.replicas()
    assert len(known) == 2
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len({each.headers.get("x-elastic-replica") for _, each in answers}) == 2)  # both draw
    os.kill(known[0], signal.SIGKILL)
    time.sleep(1.0)
    killed.set()
    for thread in threads:
        thread.join()
    assert Counter(each.status_code for _, each in answers) == {200: len(answers)}
    pictures: dict[int, set[str]] = {}
    for seed, each in answers:
        if each.headers["content-type"].startswith("text/event-stream"):
            assert re.findall(r"^event: image_generation\.(\w+)", each.text, re.MULTILINE) == ["partial_image"] * 3 + ["completed"]
        else:
            pictures.setdefault(seed, set()).add(each.json()["data"][0]["b64_json"])
    assert all(len(same) == 1 for same in pictures.values()), "a seed draws one picture, wherever it is drawn"
    until(lambda: len(cluster.replicas()) == 3)  # and another takes its place


@pytest.mark.parametrize(("options", "words"), [(["--replicas", "500-500"], "ask for fewer"), (["--port", "0"], "name a port")])
def test_what_a_machine_cannot_do_is_one_line(digits: Path, tmp_path: Path, options: list[str], words: str) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(digits), "--port", "8091", "--ray", *options]
    done = subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


DEPLOY = Path(__file__).parents[2] / "samples" / "deploy" / "kuberay.yaml"


def test_the_manifest_is_what_ray_takes() -> None:
    yaml = pytest.importorskip("yaml", reason="the manifest is YAML")
    from ray.serve.schema import ServeDeploySchema

    from elastic_serve.cluster import from_config

    if not DEPLOY.exists():
        pytest.skip("the samples are not part of an installed wheel")
    manifest = yaml.safe_load(DEPLOY.read_text())
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "elastic_serve.cluster:from_config"
    assert from_config(application.args) is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "args name the bundles"),
        ({"bundles": []}, "args name the bundles"),
        ({"bundles": ["/b"], "nonsense": 1}, "args are bundles, replicas, gpus"),
        ({"bundles": ["/b"], "replicas": "0-4"}, "a span from 1"),
        ({"bundles": ["/b"], "replicas": "4-1"}, "reversed"),
        ({"bundles": ["/a/b", "/c/b"]}, "two bundles are called 'b'"),
        ({"bundles": ["/b"], "drain": -1}, "--drain-seconds"),
    ],
)
def test_args_that_are_wrong_are_a_sentence(arguments: dict[str, Any], words: str) -> None:
    from elastic_runtime import UsageError
    from elastic_serve.cluster import from_config

    with pytest.raises(UsageError, match=words):
        from_config(arguments)
