"""The OpenAPI document is about this server: what it allows is drawn, what it forbids is refused, and answers are as it says."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Running, Serving

CREATE = "/v1/images/generations"

# JSON Schema has no words for some rules: the two ends of an interval that must rise, a deadline that not even an idle server keeps, seeds
# that are counted up. Requests that break those are allowed by the document and answered with 400, which it lists.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 429]
"""
PROGRAM = "from schemathesis.cli import schemathesis; schemathesis()"


def test_schemathesis_finds_nothing(serving: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="what reads the document")
    monkeypatch.setenv("ELASTIC_EXPORT_API_KEY", "secret")
    (tmp_path / "config.toml").write_text(CONFIG)
    command = [sys.executable, "-c", PROGRAM, "--config-file", "config.toml", "--no-color", "run", "--seed", "1", "--continue-on-failure"]
    command += ["--header", "Authorization: Bearer secret"]
    with serving() as server:
        command += ["--max-examples", "30", f"{server.url}/openapi.json"]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"NO_PROXY": "*"}, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        metrics = server.engine.metrics.text().decode()
        assert len(server.engine.scheduler) == 0
    cases, passed = re.findall(r"(\d+) generated, (\d+) passed", done.stdout)[0]
    assert cases == passed
    assert int(cases) > 200, "it tried"
    drawn = float(re.findall(r'elastic_requests_total{model="digits",status="200"} (\S+)', metrics)[0])
    assert drawn >= 20, "what the document allows is drawn"


@pytest.fixture(scope="module")
def allowed(server: Running) -> Callable[[Any], bool]:
    """Whether the document of the server allows a body."""
    validator = pytest.importorskip("jsonschema", reason="what reads a schema").Draft202012Validator
    with server.http() as http:
        schema = http.get("/openapi.json").json()["components"]["schemas"]["Body"]
    validator.check_schema(schema)
    return validator(schema).is_valid  # type: ignore[no-any-return]


BODIES: list[tuple[dict[str, Any], bool]] = [
    ({"class_labels": 9}, True),
    ({"class_labels": 10}, False),
    ({"class_labels": [0, 9], "n": 5}, True),
    ({"class_labels": [0, 9], "n": 6}, False),
    ({"class_labels": [1, 2], "stream": True}, False),
    ({"prompt": " 07\n"}, True),
    ({"prompt": "10"}, False),
    ({"prompt": "a cat"}, False),
    ({"prompt": "7", "class_labels": 7}, False),
    ({"prompt": "", "class_labels": 7}, True),
    ({}, False),
    ({"class_labels": 1, "size": "16x16"}, True),
    ({"class_labels": 1, "size": "32x32"}, False),
    ({"class_labels": 1, "sampler": "heun", "quality": "low"}, True),
    ({"class_labels": 1, "sampler": "maskgit"}, False),
    ({"class_labels": 1, "quality": "low", "budget": {"latents": 16}}, False),
    ({"class_labels": 1, "budget": {"latents": 17}}, False),
    ({"class_labels": 1, "budget": {"tokens": 16}}, False),
    ({"class_labels": 1, "budget": {"latents": 16}, "guidance_budget": {"latents": 16}, "guidance_scale": 2}, True),
    ({"class_labels": 1, "plan": "4x"}, False),
    ({"class_labels": 1, "partial_images": 1}, False),
    ({"class_labels": 1, "temperature": 1.0}, False),
    ({"class_labels": 1, "model": "digits", "steps": 250}, True),
    ({"class_labels": 1, "model": "others"}, False),
    ({"class_labels": 1, "steps": 251}, False),
]


@pytest.mark.parametrize(("body", "fits"), BODIES)
def test_the_document_allows_what_the_server_takes(
    server: Running, allowed: Callable[[Any], bool], body: dict[str, Any], fits: bool
) -> None:
    assert allowed(body) == fits
    with server.http() as http:
        assert (http.post(CREATE, json={"steps": 2} | body).status_code == 200) == fits


@given(most=st.integers(0, 30_000), number=st.integers(0, 100_000), zeros=st.integers(0, 3))
def test_a_number_fits_its_pattern_up_to_the_most(most: int, number: int, zeros: int) -> None:
    from elastic_serve.fields import _number

    assert bool(re.search(_number(most)["pattern"], f" {'0' * zeros}{number} ")) == (number <= most)


def test_the_document_tells_of_the_server_to_those_who_may_know(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_EXPORT_API_KEY", "secret")
    with serving() as server, server.http() as http:
        assert http.get("/openapi.json").status_code == 401
        document = http.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        assert document["security"] == [{"key": []}]
        assert http.get("/openapi.json", headers={"host": "evil.example", "Authorization": "Bearer secret"}).status_code == 403


def test_a_server_of_several_models_allows_what_one_of_them_takes(digits: Path, tmp_path: Path) -> None:
    validator = pytest.importorskip("jsonschema", reason="what reads a schema").Draft202012Validator
    from fake_flux import SCHNELL, Opener, manifest, to_zero
    from fakes import write_manifest

    from elastic_runtime import Bundle, ElasticPipeline
    from elastic_serve.body import Limits
    from elastic_serve.fields import request
    from elastic_serve.served import Served

    opener = Opener(manifest(SCHNELL, classes=5), to_zero)
    write_manifest(tmp_path, opener.bundle.manifest)
    opener.bundle = Bundle.open(tmp_path)
    models = [
        Served("digits", ElasticPipeline.from_pretrained(digits, "ort", lanes=1)),
        Served("plans", ElasticPipeline(opener.bundle, opener)),
    ]
    try:
        schema = request(models, Limits())
        validator.check_schema(schema)
        allows = validator(schema).is_valid
    finally:
        for each in models:
            each.close()
    assert allows({"class_labels": 9})
    assert not allows({"class_labels": 9, "plan": "4x"}), "the first is meant, and draws along none"
    assert allows({"class_labels": 4, "plan": "4x", "model": "plans"})
    assert not allows({"class_labels": 5, "model": "plans"})
    assert not allows({"class_labels": 4, "plan": "4x", "budget": {"tokens": 4}, "model": "plans"})
    assert not allows({"class_labels": 4, "model": "neither"})
