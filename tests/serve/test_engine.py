"""The engine without HTTP: bundles that are drawn along plans, several at once, and what goes wrong in the middle."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import Asking, served
from fake_flux import FLUX, SCHNELL, manifest, to_zero
from fakes import write_manifest
from msgspec.structs import replace

from elastic_runtime import Budget, InferenceError, Request, UsageError
from elastic_runtime.choosing.estimates import Option
from elastic_serve.body import BodyError
from elastic_serve.engine import ClosingError, Drawn, Event, Failed, Order, Stepped
from elastic_serve.paper import Paper
from elastic_serve.scheduler import RefusedError, Scheduler, Turn
from elastic_serve.served import Served, Steered


@pytest.fixture
def plans(tmp_path: Path) -> Iterator[Served]:
    opened = served(tmp_path / "plans")
    yield opened
    opened.close()


def test_along_a_plan_a_picture_is_what_the_pipeline_draws(plans: Served) -> None:
    requests = [Request(class_labels=label, seeds=(label,), plan="4x", guidance_scale=2.0) for label in range(3)]
    with Asking(plans) as asking:
        asking.ask(*((plans, request) for request in requests))
        ended = asking.ends(3)
    for place, request in enumerate(requests):
        drawn = ended[place]
        assert isinstance(drawn, Drawn), drawn
        alone = plans.pipe.draw(request)
        assert np.array_equal(np.asarray(drawn.result.images[0]), np.asarray(alone.images[0]))
        assert drawn.result.facts["plan"].startswith("4x")


@pytest.mark.parametrize("plan", ["4x", "speed", "full"])
def test_previews_along_a_plan_have_the_size_of_the_picture(plans: Served, plan: str) -> None:
    request = Request(class_labels=1, seeds=(0,), plan=plan, height=64, width=96)
    with Asking(plans) as asking:
        asking.ask((plans, request), previews=16)
        events = []
        while not isinstance(event := asking.events.get(timeout=30)[1], Drawn):
            assert isinstance(event, Stepped), event
            events.append(event)
    assert events[-1].preview is None, "the last step's is the picture"
    seen = [event.preview for event in events if event.preview is not None]
    assert len(seen) == min(16, len(events) - 1)
    assert {picture.size for picture in seen} == {(96, 64)} == {event.result.images[0].size}
    # the velocity leads to an empty picture from the first step on
    assert all(np.array_equal(np.asarray(picture), np.asarray(event.result.images[0])) for picture in seen)


def test_the_plan_is_chosen_before_the_first_step_and_kept(plans: Served) -> None:
    prospect = plans.prospect(Request(class_labels=1))
    assert len(prospect.options) > 1
    assert prospect.options[-1].name.startswith("4x"), "the usual plan is the best that nobody asked for"
    times = [sum(plans.prior(kind, 1) * steps for kind, steps in way.legs) + way.finish for way in prospect.ways]
    assert times == sorted(times)
    with Asking(plans) as asking:
        asking.ask((plans, Request(class_labels=1, seeds=(0,))), deadline=60.0)
        ended = asking.ends(1)[0]
    assert isinstance(ended, Drawn), ended
    assert ended.result.plan is not None
    assert len(ended.result.steps) == ended.result.plan.total


def test_a_plan_that_is_named_is_held(plans: Served) -> None:
    (option,) = plans.prospect(Request(class_labels=1, plan="7x")).options
    assert option.plan is not None
    assert option.plan.steps == option.steps
    assert option.name.startswith("7x")


def test_a_plan_of_more_steps_than_are_allowed_is_refused(plans: Served) -> None:
    request = Request(class_labels=1, plan="7x")
    steps = plans.prospect(request).steps
    with Asking(plans) as asking:
        with pytest.raises(BodyError, match=f"at most {steps - 1} here, and without other words they are {steps}"):
            asking.ask((plans, request), most=steps - 1)
        asking.ask((plans, request), most=steps)
        assert isinstance(asking.ends(1)[0], Drawn)


def test_a_bundle_that_makes_no_pictures_is_not_opened(tmp_path: Path) -> None:
    whole = manifest(SCHNELL, classes=5)
    write_manifest(tmp_path, replace(whole, graphs={name: graph for name, graph in whole.graphs.items() if name != "decoder"}))
    with pytest.raises(UsageError, match="cannot be served, since pictures alone are: this bundle holds no decoder.*export it again"):
        Served.open(tmp_path)


def test_a_bundle_that_cannot_read_prompts_is_not_opened(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest(FLUX))
    with pytest.raises(UsageError, match="cannot be served, since requests are prompts and it holds no text encoders.*vae,text"):
        Served.open(tmp_path)


def test_two_models_take_turns(tmp_path: Path) -> None:
    models = [served(tmp_path / name, name) for name in ("one", "two")]
    with Asking(*models) as asking:
        asking.ask(*((model, Request(class_labels=1, seeds=(0,), plan="7x")) for model in models))
        assert all(isinstance(ended, Drawn) for ended in asking.ends(2).values())
    for model in models:
        model.close()


def test_a_backend_that_fails_ends_one_picture_and_not_the_engine(tmp_path: Path) -> None:
    broken = threading.Event()

    def field(feeds: Any) -> np.ndarray:
        if broken.is_set():
            raise InferenceError("the device is gone")
        return to_zero(feeds)

    model = served(tmp_path / "plans", field=field)
    with Asking(model) as asking:
        broken.set()
        asking.ask((model, Request(class_labels=1, plan="4x")))
        ended = asking.ends(1)[0]
        assert isinstance(ended, Failed)
        assert str(ended.error) == "the device is gone"
        broken.clear()
        asking.ask((model, Request(class_labels=1, plan="4x")))
        assert isinstance(asking.ends(1)[0], Drawn)
    model.close()


def test_a_fault_of_the_scheduler_ends_the_pictures_in_flight_and_not_the_engine(plans: Served) -> None:
    class Faulty(Scheduler):
        faults = 1

        def turn(self, now: float) -> Turn | None:
            if self.faults:
                self.faults -= 1
                raise ZeroDivisionError("a fault of ours")
            return super().turn(now)

    with Asking(plans, scheduler=Faulty) as asking:
        asking.ask((plans, Request(class_labels=1, plan="4x")))
        ended = asking.ends(1)[0]
        assert isinstance(ended, Failed)
        assert isinstance(ended.error, ZeroDivisionError)
        asking.ask((plans, Request(class_labels=1, plan="4x")))
        assert isinstance(asking.ends(1)[0], Drawn)


@pytest.mark.parametrize("deadline", [1e-12, 1e-300])
def test_the_shortest_deadline_is_refused_and_leaves_nothing_behind(plans: Served, deadline: float) -> None:
    with Asking(plans) as asking:
        with pytest.raises(RefusedError, match="on an idle machine"):
            asking.ask((plans, Request(class_labels=1, plan="4x")), deadline=deadline)
        asking.ask((plans, Request(class_labels=1)))
        assert isinstance(asking.ends(1)[0], Drawn)


def test_while_a_refusal_is_worded_others_are_taken_in(plans: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wording, let = threading.Event(), threading.Event()

    def behind(*_: object) -> float:
        wording.set()
        assert let.wait(30)
        return 1.0

    monkeypatch.setattr(Paper, "behind", behind)
    with Asking(plans) as asking:
        refused: list[Exception] = []

        def ask() -> None:
            try:
                asking.ask((plans, Request(class_labels=1, plan="4x")), deadline=1e-9)
            except RefusedError as error:
                refused.append(error)

        asks = threading.Thread(target=ask)
        asks.start()
        assert wording.wait(30)
        asking.ask((plans, Request(class_labels=1)))
        assert isinstance(asking.ends(1)[0], Drawn)
        assert not refused
        let.set()
        asks.join(30)
    assert len(refused) == 1


def test_one_pictures_fault_ends_it_alone(plans: Served) -> None:
    with Asking(plans) as asking:
        asking.engine.times.together = lambda kind: 4  # type: ignore[method-assign]  # whatever this machine says of larger runs
        ended: queue.Queue[Event] = queue.Queue()

        def deaf(event: Event) -> None:
            ended.put(event)
            raise KeyError("somebody's own fault")

        requests = [Request(class_labels=label, seeds=(label,), plan="4x") for label in range(3)]
        tells = [lambda event: asking.events.put((0, event)), deaf, lambda event: asking.events.put((2, event))]
        asking.engine.submit([Order(plans, request, tell, asking.engine.now()) for request, tell in zip(requests, tells, strict=True)])
        others = asking.ends(2)
        assert isinstance(ended.get(timeout=30), Stepped)
        assert isinstance(ended.get(timeout=30), Failed)
    assert sorted(others) == [0, 2]
    assert all(isinstance(each, Drawn) for each in others.values())


def test_an_engine_that_has_ended_takes_nothing(plans: Served) -> None:
    asking = Asking(plans)
    asking.engine.close()
    with pytest.raises(ClosingError, match="the server is closing"):
        asking.ask((plans, Request(class_labels=1)))


def test_what_is_not_finite_fails_that_picture(tmp_path: Path) -> None:
    model = served(tmp_path / "plans", field=lambda feeds: np.full_like(feeds["hidden_states"], np.nan))
    with Asking(model) as asking:
        asking.ask((model, Request(class_labels=1, plan="4x")))
        ended = asking.ends(1)[0]
    assert isinstance(ended, Failed)
    assert "not finite" in str(ended.error)
    model.close()


def test_an_engine_ends_though_a_step_does_not(tmp_path: Path) -> None:
    stepping, let = threading.Event(), threading.Event()

    def field(feeds: Any) -> np.ndarray:
        stepping.set()
        assert let.wait(30)
        return to_zero(feeds)

    let.set()
    model = served(tmp_path / "plans", field=field)
    asking = Asking(model)
    stepping.clear()
    let.clear()
    asking.ask((model, Request(class_labels=1, plan="4x")))
    assert stepping.wait(30)
    assert not asking.engine.close(patience=0.1)
    assert isinstance(asking.ends(1)[0], Failed)
    let.set()
    assert asking.engine.close()
    model.close()


def test_a_picture_that_is_cancelled_as_it_is_decoded_is_no_other_that_was_drawn(plans: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, let, draw = threading.Event(), threading.Event(), plans.pipe.draw

    def slowly(*args: Any, **words: Any) -> Any:
        drawn = draw(*args, **words)
        decoding.set()
        assert let.wait(30)
        return drawn

    monkeypatch.setattr(plans.pipe, "draw", slowly)
    with Asking(plans) as asking:
        numbers = asking.ask((plans, Request(class_labels=1, plan="4x")), deadline=60.0)
        assert decoding.wait(30)
        asking.engine.cancel(numbers)
        let.set()
        asking.ask((plans, Request(class_labels=1, plan="4x")))
        assert isinstance(asking.ends(1)[0], Drawn)
        lines = asking.engine.metrics.text().decode().splitlines()
    assert 'elastic_pictures_total{model="plans",outcome="cancelled"} 1.0' in lines
    assert 'elastic_pictures_total{model="plans",outcome="drawn"} 1.0' in lines
    assert 'elastic_picture_seconds_count{model="plans"} 1.0' in lines
    assert not any(line.startswith("elastic_deadlines_kept_total{") for line in lines)


def test_an_engine_that_closes_tells_those_it_has_not_drawn(plans: Served) -> None:
    asking = Asking(plans)
    asking.ask(*[(plans, Request(class_labels=1, plan="4x", guidance_scale=3.0))] * 40)
    asking.engine.close(drain=0.0)
    ended = asking.ends(40)
    closed = [each for each in ended.values() if isinstance(each, Failed)]
    assert closed
    assert all("the server closed before" in str(each.error) for each in closed)
    assert not asking.engine.alive


def test_steps_that_enter_a_stage_are_told_from_the_others() -> None:
    budgets = (Budget(tokens=16), Budget(tokens=32), Budget(tokens=64))
    planned, plain = Option("4x", budgets, budgets, (3, 1, 2)), Option("latents=4", budgets[:1], budgets[:1], (6,))
    assert [Steered(planned).enters(taken) for taken in range(6)] == [False, False, False, True, True, False]
    assert not any(Steered(plain).enters(taken) for taken in range(6))
