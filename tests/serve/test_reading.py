"""Prompts that are read beside the steps: in what order, what they cost a promise, and what becomes of those that cannot be read."""

import itertools
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from asking import COST, Asking
from fake_flux import Opener
from fake_prompts import WORDS, flux, pooling
from fakes import manifest as elit

from elastic_runtime import Budget, Bundle, ElasticPipeline, Request, UsageError
from elastic_serve.engine import ClosingError, Drawn, Failed
from elastic_serve.jobs import Job, Way
from elastic_serve.scheduler import AHEAD, RefusedError, Scheduler
from elastic_serve.served import Served
from elastic_serve.times import Kind

STEP, STEPS = 0.125, 8  # of the pictures on paper


class Reading:
    """A bundle that reads prompts; those with a dog in them only once they are `let`. It draws unless its steps are held."""

    def __init__(self, folder: Path, elastic: bool = False):
        self.opener = flux(folder)
        if elastic:
            _at_budgets(self.opener)
        self.stepping = threading.Event()
        self.stepping.set()
        if not elastic:
            self.opener.bundle = Bundle(folder, msgspec.structs.replace(self.opener.bundle.manifest, cost=COST))
        self.opener._functions["text_encoder"] = self._pooled
        denoise = self.opener._functions["denoiser"]
        self.opener._functions["denoiser"] = lambda feeds: denoise(feeds) if self.stepping.wait(30) else None
        self.let, self.asked = threading.Event(), threading.Event()
        self.served = Served("prompts", ElasticPipeline(self.opener.bundle, self.opener))
        self.opener.opened.clear()

    def _pooled(self, feeds: Any) -> dict[str, np.ndarray]:
        if (feeds["input_ids"] == WORDS.index("dog")).any():
            self.asked.set()
            assert self.let.wait(30)
        return pooling(feeds)

    @property
    def read(self) -> int:
        """Prompts that were read since the bundle was opened."""
        return len(self.opener.calls("text_encoder"))

    def of(self, prompt: str, seed: int = 0) -> tuple[Served, Request]:
        return self.served, Request(prompt=prompt, seeds=(seed,), plan="4x")


def _at_budgets(opener: Opener) -> None:
    """Make of it a bundle that reads the same prompts, and draws at budgets, not along plans."""
    old, whole = opener.bundle.manifest, elit(channels=3)
    sample, timestep, *_, latents = whole.graphs["denoiser"].inputs
    texts = [each for each in old.graphs["denoiser"].inputs if each.name in ("encoder_hidden_states", "pooled_projections")]
    denoiser = msgspec.structs.replace(
        whole.graphs["denoiser"],
        inputs=(sample, timestep, *texts, latents),
        dimensions=whole.graphs["denoiser"].dimensions | {"T": old.graphs["denoiser"].dimensions["T"]},
    )
    model = msgspec.structs.replace(whole.model, num_classes=0, null_label=0, text=old.model.text)
    graphs = {name: graph for name, graph in old.graphs.items() if name.startswith("text")} | {"denoiser": denoiser}
    opener.bundle = Bundle(opener.bundle.folder, msgspec.structs.replace(whole, model=model, graphs=graphs))
    opener._functions["denoiser"] = lambda feeds: {"prediction": feeds["sample"]}


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Reading]:
    opened = Reading(tmp_path)
    yield opened
    opened.let.set()
    opened.stepping.set()
    opened.served.close()


def test_pictures_are_drawn_while_a_prompt_is_read_and_are_what_the_pipeline_draws(reading: Reading) -> None:
    asked = [reading.of("a red cat", 1), reading.of("a blue dog", 2)]
    assert reading.served.prospect(asked[0][1]).options
    assert not reading.read, "nothing is to be drawn yet"
    with Asking(reading.served) as asking:
        asking.ask(*asked)
        assert reading.asked.wait(30)
        ended = asking.ends(1)
        assert list(ended) == [0]
        assert asking.engine.scheduler.turn(asking.engine.now()) is None, "the other one waits for its prompt"
        reading.let.set()
        ended |= asking.ends(1)
    for place, (model, request) in enumerate(asked):
        drawn = ended[place]
        assert isinstance(drawn, Drawn), drawn
        assert np.array_equal(np.asarray(drawn.result.images[0]), np.asarray(model.pipe.draw(request).images[0]))


def test_pictures_of_one_prompt_have_it_read_once(reading: Reading) -> None:
    with Asking(reading.served) as asking:
        asking.ask(*(reading.of("a red cat", seed) for seed in range(4)))
        assert all(isinstance(ended, Drawn) for ended in asking.ends(4).values())
    assert reading.read == 1
    assert all(session.closed for graph, session in reading.opener.opened if graph.startswith("text"))


def test_those_after_as_many_as_wait_with_their_prompts_read_are_read_when_these_are_begun(reading: Reading) -> None:
    prompts = [" ".join(words) for words in itertools.product(("a", "red", "blue", "cat"), repeat=2)]
    assert len(prompts) > AHEAD
    reading.stepping.clear()
    with Asking(reading.served) as asking:
        asking.ask(*(reading.of(prompt) for prompt in prompts))
        until = time.monotonic() + 30
        while sum(job.prompt is None for job in asking.engine.scheduler.jobs) < AHEAD:
            assert time.monotonic() < until
            time.sleep(0.001)
        reading.stepping.set()
        assert all(isinstance(ended, Drawn) for ended in asking.ends(len(prompts)).values())


def test_a_budget_of_guidance_that_is_off_is_refused_as_a_pipeline_does(tmp_path: Path) -> None:
    """Left in, it would leave out the budgets below it."""
    reading = Reading(tmp_path, elastic=True)
    asked = Request(prompt="a red cat", seeds=(0,), guidance_scale=1.0, guidance_budget=Budget(latents=32), num_inference_steps=2)
    for ask in (reading.served.prospect, reading.served.pipe.draw):
        with pytest.raises(UsageError, match="guidance_budget acts through guidance, which is off"):
            ask(asked)
    reading.served.close()


def test_what_else_a_request_asks_for_has_no_part_in_how_its_prompt_is_read(tmp_path: Path) -> None:
    reading = Reading(tmp_path, elastic=True)
    asked = Request(prompt="a red cat", seeds=(0,), guidance_scale=2.0, guidance_budget=Budget(latents=32), num_inference_steps=2)
    with Asking(reading.served) as asking:
        asking.ask((reading.served, asked), (reading.served, msgspec.structs.replace(asked, guidance_budget=None)))
        assert [type(ended) for ended in asking.ends(2).values()] == [Drawn, Drawn]
    assert reading.read == 1
    reading.served.close()


def test_a_prompt_that_cannot_be_read_ends_its_own_pictures_alone(reading: Reading) -> None:
    with Asking(reading.served) as asking:
        asking.ask(reading.of("a cat"), reading.of("a " * 20), reading.of("a red cat"), reading.of("a " * 20, 1))
        ended = asking.ends(4)
    assert [type(ended[place]) for place in range(4)] == [Drawn, Failed, Drawn, Failed]
    failed = ended[1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UsageError)
    assert "shorten it" in str(failed.error)


def test_what_nobody_waits_for_any_more_is_not_read(reading: Reading) -> None:
    with Asking(reading.served) as asking:
        numbers = asking.ask(reading.of("a blue dog"), reading.of("a red cat"))
        assert reading.asked.wait(30)
        asking.engine.cancel(numbers)
        asking.ask(reading.of("a cat"))
        reading.let.set()
        assert isinstance(asking.ends(1)[0], Drawn)
    assert reading.read == 2, "the one under way, and the last"


def test_a_server_that_closes_tells_those_whose_prompts_are_not_read(reading: Reading) -> None:
    asking = Asking(reading.served)
    asking.ask(reading.of("a blue dog"), reading.of("a red cat"))
    assert reading.asked.wait(30)
    threading.Timer(0.05, reading.let.set).start()
    asking.engine.close()
    assert all(isinstance(each, Failed) and isinstance(each.error, ClosingError) for each in asking.ends(2).values())
    assert not asking.engine.alive


def test_a_promise_counts_what_its_prompt_takes(reading: Reading) -> None:
    assert reading.served.reading > 0
    reading.served.reading = 20.0  # as where the encoders are large
    with Asking(reading.served) as asking:
        assert asking.engine.forecast()["prompts"]["alone"] > 20
        with pytest.raises(RefusedError, match="on an idle machine") as refused:
            asking.ask(reading.of("a cat"), deadline=10.0)
        assert refused.value.nearest is not None
        assert refused.value.nearest > 20
        asking.ask(reading.of("a cat"), deadline=60.0)
        assert isinstance(asking.ends(1)[0], Drawn)
        asking.ask(reading.of("a cat"), deadline=10.0)  # what was seen counts, not what was foreseen
        assert isinstance(asking.ends(1)[0], Drawn)


class Exact:
    """A step takes the same, whatever it holds."""

    def seconds(self, kind: Kind, rows: int) -> float:
        return STEP

    def together(self, kind: Kind) -> int:
        return 1


def job(due: float, prompt: str | None = None, reading: float = 0.0) -> Job:
    return Job(0, "a", 0.0, due, True, 1, (Way(((Kind("m", Budget()), STEPS),)),), prompt=prompt, reading=reading)


def test_prompts_are_read_in_the_order_of_their_pictures_and_nothing_steps_before() -> None:
    scheduler = Scheduler(Exact())
    late, early = scheduler.admit([job(60.0, "late", 1.0)], 0.0) + scheduler.admit([job(30.0, "early", 1.0)], 0.0)
    assert scheduler.turn(0.0) is None
    assert scheduler.unread(0.0) == "early"
    assert scheduler.read("early") == (early,)
    turn = scheduler.turn(1.0)
    assert turn is not None
    assert turn.jobs == (early,)
    assert scheduler.unread(1.0) == "late"
    assert scheduler.read("late") == (late,)
    assert scheduler.unread(1.0) is None


def test_on_paper_readings_follow_one_another_beside_the_steps() -> None:
    scheduler = Scheduler(Exact())
    numbers = [scheduler.admit([each], 0.0)[0] for each in (job(40.0, "b", 0.5), job(50.0, "c", 4.0), job(60.0), job(70.0, "b", 0.5))]
    done = scheduler.finishes(scheduler.jobs, 0.0, 0.0)
    # the third fills the half second in which b is read, gives way to the first, and goes on; c is read at 4.5, b again not at all
    assert [done[number] for number in numbers] == [1.5, 5.5, 2.0, 3.0]
    assert scheduler.unread(0.0) == "b"
    assert scheduler.finishes(scheduler.jobs, 0.0, 0.25)[numbers[0]] == 1.5, "half of it is read by then"


def test_an_idle_machine_reads_no_other_prompt() -> None:
    scheduler = Scheduler(Exact(), margin=0.0)
    scheduler.admit([job(math.inf, "long", 20.0)], 0.0)
    assert scheduler.unread(0.0) == "long"
    short = replace(job(0.0, "short", 1.0), id=-1)
    assert scheduler.behind([short], 5.0, idle=True) == 1.0 + STEPS * STEP
    assert scheduler.behind([short], 5.0) == 15.0 + 1.0 + STEPS * STEP
    with pytest.raises(RefusedError, match="1 pictures are ahead") as refused:
        scheduler.admit([job(10.0, "short", 1.0)], 5.0)
    assert refused.value.wait is not None, "it may ask again"


def test_so_many_wait_with_their_prompts_read_and_an_urgent_one_is_read_all_the_same() -> None:
    scheduler = Scheduler(Exact())
    for number in range(AHEAD):
        scheduler.admit([job(100.0 + number, f"{number}", 0.1)], 0.0)
        assert scheduler.read(f"{number}")
    scheduler.admit([job(200.0, "after them", 0.1)], 0.0)
    assert scheduler.unread(0.0) is None
    scheduler.admit([job(50.0, "urgent", 0.1)], 0.0)
    assert scheduler.unread(0.0) == "urgent"
    scheduler.read("urgent")
    scheduler.stepped(0)  # begun, so that one less waits
    assert scheduler.unread(0.0) is None
    scheduler.stepped(AHEAD + 1)
    assert scheduler.unread(0.0) == "after them"
