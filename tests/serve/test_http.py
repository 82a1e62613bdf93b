"""The server as its clients see it: the official client of the OpenAI API, and plain HTTP."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import Running, Serving

from elastic_runtime import ElasticPipeline, Request

CREATE = "/v1/images/generations"


def image(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def metric(server: Running, name: str) -> float:
    with server.http() as http:
        text = http.get("/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{re.escape(name)}(\{{| )", line))


def events(lines: Any) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def test_the_official_client_draws_what_the_pipeline_draws(server: Running, digits: Path) -> None:
    drawn = server.client().images.generate(prompt="7", n=2, model="digits", size="16x16", extra_body={"seed": 5, "steps": 4})
    assert len(drawn.data) == 2
    with ElasticPipeline.from_pretrained(digits, "ort", lanes=1) as pipe:
        own = pipe.draw(Request(class_labels=(7, 7), seeds=(5, 6), num_inference_steps=4)).images
    for ours, theirs in zip(own, drawn.data, strict=True):
        apart = np.abs(np.asarray(ours, int) - np.asarray(image(theirs.b64_json), int))
        assert apart.max() <= 1, "pictures may differ by rounding alone"
    assert [each.elastic["seed"] for each in drawn.data] == [5, 6]
    assert drawn.size == "16x16"


def test_the_official_client_streams_previews(server: Running) -> None:
    stream = server.client().images.generate(prompt="3", stream=True, partial_images=2, extra_body={"steps": 6})
    events = list(stream)
    assert [each.type for each in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [each.partial_image_index for each in events[:-1]] == [0, 1]
    assert all(image(each.b64_json).size == (16, 16) for each in events)


def test_previews_give_way_to_promises(serving: Serving) -> None:
    with serving() as server, server.http() as http:
        body = {"class_labels": 1, "steps": 6, "stream": True, "partial_images": 2, "deadline_ms": 60_000}
        assert len(events(http.post(CREATE, json=body).text.splitlines())) == 3
        server.engine.scheduler.spare = lambda now: 0.0  # as where a promise has no time left
        (done,) = events(http.post(CREATE, json=body).text.splitlines())
    assert done["type"] == "image_generation.completed"


@given(st.integers(0, 16), st.integers(1, 300))
def test_previews_are_of_steps_of_their_own_and_never_the_last(count: int, steps: int) -> None:
    from elastic_serve.engine import _spread

    chosen = _spread(count, steps)
    assert len(chosen) == min(count, steps - 1)
    assert all(0 <= index < steps - 1 for index in chosen)


def test_class_labels_stand_for_the_prompt_in_every_form(server: Running) -> None:
    with server.http() as http:
        one = http.post(CREATE, json={"class_labels": 2, "seed": 1, "steps": 3}).json()
        many = http.post(CREATE, json={"class_labels": [2, 9], "prompt": "", "seed": 1, "steps": 3}).json()
    assert one["data"][0]["b64_json"]
    assert len(many["data"]) == 2
    assert many["data"][0]["elastic"]["seed"] == 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_format_is_what_was_asked_for(server: Running, kind: str) -> None:
    with server.http() as http:
        answer = http.post(CREATE, json={"class_labels": 1, "steps": 2, "output_format": kind}).json()
    assert (image(answer["data"][0]["b64_json"]).format or "").lower() == kind
    assert answer["output_format"] == kind


def test_budgets_and_quality_are_kept_to(server: Running) -> None:
    def budgets(**words: Any) -> list[Any]:
        with server.http() as http:
            return list(http.post(CREATE, json={"class_labels": 1, "steps": 3} | words).json()["data"][0]["elastic"]["budgets"])

    axes = server.client().models.retrieve("digits").elastic["axes"]
    low, high = axes["latents"].split("-")
    assert budgets(budget={"latents": int(low)}) == [{"budget": f"latents={low}", "steps": 3}]
    assert budgets(quality="hd") == [{"budget": f"latents={high}", "steps": 3}]
    assert budgets(deadline_ms=60_000) == [{"budget": f"latents={high}", "steps": 3}]
    (cheapest,) = budgets(quality="low")  # of those that are worth their time, which on a model so small is a matter of chance
    assert int(low) <= int(cheapest["budget"].partition("=")[2]) <= int(high)


WRONG = {
    "no JSON": (b"{", None, "not JSON"),
    "no object": (b"[]", None, "Expected `object`"),
    "an unknown field": ({"class_labels": 1, "nonsense": 1}, "nonsense", "there is no field 'nonsense'; there are model, prompt"),
    "a wrong type": ({"class_labels": 1, "n": "two"}, "n", "expected `int`, got `str`"),
    "too many pictures": ({"class_labels": 1, "n": 11}, "n", "at most 10"),
    "too many by classes": ({"class_labels": [1] * 6, "n": 2}, "n", "are 12 pictures"),
    "no pictures": ({"class_labels": 1, "n": 0}, "n", ">= 1"),
    "too many steps": ({"class_labels": 1, "steps": 251}, "steps", "at most 250"),
    "a prompt where classes are drawn": ({"prompt": "a red cat"}, "prompt", "draws classes: give class_labels, 0 to 9"),
    "a class that there is not": ({"class_labels": 10}, "class_labels", "0 to 9, got 10"),
    "both": ({"class_labels": 1, "prompt": "1"}, "prompt", "leave the prompt empty"),
    "neither": ({}, "prompt", "got no prompt"),
    "a size": ({"class_labels": 1, "size": "512x512"}, "size", "draws pictures of 16x16, got 512x512"),
    "no size": ({"class_labels": 1, "size": "huge"}, "size", "WIDTHxHEIGHT"),
    "a url": ({"class_labels": 1, "response_format": "url"}, "response_format", "invalid enum value 'url'"),
    "previews of no stream": ({"class_labels": 1, "partial_images": 2}, "partial_images", "give stream"),
    "a stream of two": ({"class_labels": 1, "n": 2, "stream": True}, "n", "one picture, got 2"),
    "a budget off the axis": ({"class_labels": 1, "budget": {"latents": 1}}, "budget", "latents"),
    "a budget on no axis": ({"class_labels": 1, "budget": {"loops": 2}}, "budget", "no axis 'loops'"),
    "a budget with a name of Python's": ({"class_labels": 1, "budget": {"self": 1}}, "budget", "no axis 'self'"),
    "a budget that is no number": ({"class_labels": 1, "budget": {"latents": "16"}}, "budget", "expected `int`"),
    "a weak budget on no axis": ({"class_labels": 1, "guidance_budget": {"loops": 2}}, "guidance_budget", "no axis 'loops'"),
    "a long name": ({"class_labels": 1, "x" * 5000: 1}, "x" * 80, f"there is no field '{'x' * 80}'; there"),
    "an unknown field of nothing": ({"class_labels": 1, "nonsense": None}, "nonsense", "there is no field"),
    "guidance beyond all bounds": ({"class_labels": 1, "guidance_scale": 1e308}, "guidance_scale", "<= 1000"),
    "temperature beyond all bounds": ({"class_labels": 1, "temperature": 1e308}, "temperature", "<= 1000"),
    "scale beyond all bounds": ({"class_labels": 1, "true_cfg_scale": -1}, "true_cfg_scale", ">= 0"),
    "two ways to say the same": ({"class_labels": 1, "quality": "low", "budget": {"latents": 16}}, "quality", "give one"),
    "guidance below one": ({"class_labels": 1, "guidance_scale": 0.5}, None, "guidance_scale must be 1"),
    "no sampler": ({"class_labels": 1, "sampler": "magic"}, None, "there is no sampler 'magic'"),
    "a plan": ({"class_labels": 1, "plan": "4x"}, None, "plan does not fit"),
    "no time": ({"class_labels": 1, "deadline_ms": 0}, "deadline_ms", ">= 1"),
    "hardly any time": ({"class_labels": 1, "deadline_ms": 1e-9}, "deadline_ms", ">= 1"),
    "a huge seed": ({"class_labels": 1, "seed": 2**63}, "seed", "seed"),
    "a seed that is none": ({"class_labels": 1, "seed": -1}, "seed", ">= 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(server: Running, name: str) -> None:
    body, param, words = WRONG[name]
    with server.http() as http:
        answer = http.post(CREATE, content=body if isinstance(body, bytes) else json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]
    assert len(server.engine.scheduler) == 0


def test_null_is_what_was_left_out(server: Running) -> None:
    from elastic_serve.body import Body

    with server.http() as http:
        answer = http.post(CREATE, json=dict.fromkeys(Body.__struct_fields__) | {"class_labels": 1, "steps": 2})
    assert answer.status_code == 200, answer.text
    words = dict.fromkeys(("n", "quality", "response_format", "partial_images", "output_format", "background", "moderation"))
    assert server.client().images.generate(prompt="1", extra_body={"steps": 2}, **words).data


def test_more_pictures_than_the_queue_holds_are_too_many(serving: Serving) -> None:
    with serving(queue=2) as server, server.http() as http:
        answer = http.post(CREATE, json={"class_labels": 1, "n": 3})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "too_many", "n")
        long = http.post(CREATE, json={"class_labels": 1, "model": "m" * 5000}).json()["error"]["message"]
    assert long == f"there is no model '{'m' * 80}'; there are digits"


def test_the_limit_of_steps_holds_where_a_request_names_none(serving: Serving) -> None:
    from elastic_serve.body import Limits

    with serving(limits=Limits(steps=4)) as server, server.http() as http:
        answer = http.post(CREATE, json={"class_labels": 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steps")
        assert "at most 4 here" in answer.json()["error"]["message"]
        assert http.post(CREATE, json={"class_labels": 1, "steps": 4}).status_code == 200


def test_the_official_client_raises_its_own_errors(server: Running) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="there is no field 'nonsense'"):
        server.client().images.generate(prompt="1", extra_body={"nonsense": 1})
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'; there are digits"):
        server.client().images.generate(prompt="1", model="dall-e-3")


def test_other_errors_have_the_same_form(server: Running) -> None:
    with server.http() as http:
        for method, path, status, code in (
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", CREATE, 405, "method_not_allowed"),
            ("GET", "/v1/models/other", 404, "model_not_found"),
            ("GET", "/v1/models/..%2f..%2fetc", 404, "not_found"),
        ):
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
        large = http.post(CREATE, content=b'{"prompt": "' + b"7" * (1 << 20) + b'"}')
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    assert metric(server, "elastic_requests_total") > 0


def test_models_tell_what_may_be_asked_of_them(server: Running) -> None:
    (model,) = server.client().models.list().data
    assert model.id == "digits"
    assert model.elastic["takes"] == "class_labels"
    assert model.elastic["num_classes"] == 10
    assert model.elastic["takes_turns"] is None
    assert all(each["step_ms"] > 0 for each in model.elastic["budgets"])


def test_a_deadline_that_nothing_keeps_is_refused_at_once(server: Running) -> None:
    with server.http() as http:
        answer = http.post(CREATE, json={"class_labels": 1, "deadline_ms": 1, "steps": 200})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "deadline_unreachable", "deadline_ms")
    assert "on an idle machine" in error["message"]
    assert error["nearest_deadline_ms"] > 1
    with server.http() as http:
        again = http.post(CREATE, json={"class_labels": 1, "deadline_ms": 20 * error["nearest_deadline_ms"], "steps": 200})
    assert again.status_code == 200


def test_a_full_queue_says_when_to_ask_again(serving: Serving) -> None:
    with serving(queue=3) as server:
        slow = {"class_labels": 1, "steps": 250, "n": 3}
        with server.http() as http:
            thread = threading.Thread(target=http.post, args=(CREATE,), kwargs={"json": slow})
            thread.start()
            until(lambda: len(server.engine.scheduler) == 3)
            with server.http() as second:
                refused = second.post(CREATE, json={"class_labels": 1})
            thread.join()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert "the queue is full: 3 pictures" in refused.json()["error"]["message"]
        assert metric(server, "elastic_refused_total") == 1


def test_one_client_leaves_room_in_the_queue_under_whatever_names(serving: Serving) -> None:
    with serving(queue=4) as server:
        slow = {"class_labels": 1, "steps": 250, "n": 3, "user": "one"}
        with server.http() as http:
            thread = threading.Thread(target=http.post, args=(CREATE,), kwargs={"json": slow})
            thread.start()
            until(lambda: len(server.engine.scheduler) == 3)
            with server.http() as second:
                refused = second.post(CREATE, json={"class_labels": 1, "user": "two"})
                other = second.post(CREATE, json={"class_labels": 1, "steps": 2}, headers={"x-forwarded-for": "192.0.2.1"})
            thread.join()
        assert (refused.status_code, refused.json()["error"]["code"], other.status_code) == (429, "queue_full", 200)
        assert "of this client" in refused.json()["error"]["message"]


def test_the_official_client_waits_as_long_as_it_is_told_and_asks_again(serving: Serving) -> None:
    with serving(queue=1) as server:
        thread = threading.Thread(target=server.client().images.generate, kwargs={"prompt": "1", "extra_body": {"steps": 250}})
        thread.start()
        until(lambda: len(server.engine.scheduler) == 1)
        drawn = server.client(max_retries=20).images.generate(prompt="2", extra_body={"steps": 2})
        thread.join()
        assert drawn.data[0].b64_json
        assert 1 <= metric(server, 'elastic_refused_total{model="digits",reason="full"}') <= 20


def test_pictures_of_several_clients_share_runs(serving: Serving) -> None:
    with serving() as server:
        server.engine.times.together = lambda kind: 4  # whatever this machine says of larger runs

        def ask(number: int) -> None:
            with server.http() as http:
                answers[number] = http.post(CREATE, json={"class_labels": number, "steps": 120 + number, "seed": number})

        answers: dict[int, Any] = {}
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers.values()} == {200}
        assert metric(server, "elastic_runs_total") < metric(server, "elastic_steps_total") == 120 * 4 + 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_picture(serving: Serving, stream: bool) -> None:
    import httpx2

    from elastic_serve.body import Limits

    with serving(limits=Limits(steps=100_000)) as server:
        with server.http() as http, pytest.raises(httpx2.TimeoutException):
            http.post(CREATE, json={"class_labels": 1, "steps": 100_000, "n": 1 if stream else 10, "stream": stream}, timeout=0.5)
        until(lambda: metric(server, 'elastic_pictures_total{model="digits",outcome="cancelled"}') == (1 if stream else 10))
        assert len(server.engine.scheduler) == 0
        with server.http() as http:
            assert http.post(CREATE, json={"class_labels": 1, "steps": 2}).status_code == 200


def test_a_key_is_asked_for_where_there_is_one(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    monkeypatch.setenv("ELASTIC_EXPORT_API_KEY", "secret")
    with serving() as server:
        with pytest.raises(openai.AuthenticationError, match="asks for its API key"):
            server.client().images.generate(prompt="1")
        assert server.client("secret").images.generate(prompt="1", extra_body={"steps": 2}).data
        with server.http() as http:
            assert [http.get(path).status_code for path in ("/health", "/v1/models", "/metrics")] == [200, 401, 401]
            assert http.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_key_is_compared_as_it_is_sent(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_EXPORT_API_KEY", "schlüssel-鍵")
    with serving() as server, server.http() as http:
        for given, status in (("schlüssel-鍵", 200), ("schlüssel", 401), ("schl\xff", 401)):
            assert http.get("/v1/models", headers={"Authorization": b"Bearer " + given.encode()}).status_code == status


def test_metrics_count_what_happened(serving: Serving) -> None:
    with serving() as server:
        with server.http() as http:
            http.post(CREATE, json={"class_labels": 1, "steps": 3, "deadline_ms": 60_000})
            http.post(CREATE, json={"class_labels": 1, "steps": 3, "n": 2})
        assert metric(server, "elastic_steps_total") == 9
        assert metric(server, "elastic_picture_seconds_count") == 3
        assert metric(server, "elastic_deadlines_kept_total") == 1
        assert metric(server, "elastic_deadline_misses_total") == 0
        assert metric(server, "process_resident_memory_bytes") > 0


def test_the_openapi_document_names_every_field_and_path(server: Running) -> None:
    from elastic_serve.body import Body

    with server.http() as http:
        document = http.get("/openapi.json").json()
    assert set(document["components"]["schemas"]["Body"]["properties"]) == set(Body.__struct_fields__)
    assert set(document["paths"]) == {CREATE, "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]


def test_a_server_that_ends_draws_what_it_has_begun(serving: Serving) -> None:
    answers: list[Any] = []
    with serving(drain=20.0) as server, server.http() as http:
        thread = threading.Thread(target=lambda: answers.append(http.post(CREATE, json={"class_labels": 1, "steps": 150})))
        thread.start()
        until(lambda: len(server.engine.scheduler) == 1)
        closing = threading.Thread(target=server.engine.close, args=(20.0,))
        closing.start()
        until(lambda: server.engine._closing)
        with server.http() as other:
            late = other.post(CREATE, json={"class_labels": 1})
        thread.join()
        closing.join()
    assert answers[0].status_code == 200
    assert (late.status_code, late.json()["error"]["code"]) == (503, "closing")
    assert "closing" in late.json()["error"]["message"]
