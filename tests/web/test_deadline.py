"""The page keeps a deadline by budgets: on paper, with a clock that the test holds, in a real browser's JavaScript."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser

pytestmark = pytest.mark.browser

# A model on paper: a step takes `cost` of its latents, times what the machine does at that step; `draw` is the page's own.
PAPER = """(async () => {
  const base = document.querySelector('script[src]').src;
  const {draw} = await import(new URL('drawing.js', base)), {Denoiser} = await import(new URL('denoiser.js', base));
  const {Times} = await import(new URL('times.js', base));
  const {request, slow, kept} = PARAMETERS;
  const facts = {...elastic.site, batch: 2};
  let now = 0, runs = 0;
  const times = new Times(facts.budgets, kept);
  const denoiser = new Denoiser(async (feeds, budget, rows) => {
    const cost = rows * budget.latents / 1000;
    now += cost * (slow[runs++] ?? slow.at(-1));
    return new Float32Array(rows * denoiser.size);
  }, facts);
  const records = [];
  try {
    for await (const {record} of draw({facts, denoiser, times}, request, () => now)) records.push(record);
  } catch (error) { return JSON.stringify({error: error.message}); }
  const latents = records.map(record => record.budget.latents), reasons = records.map(record => record.reason);
  return JSON.stringify({seconds: now, latents, reasons});
})()"""
MEASURED = {f"{rows} latents={latents}": rows * latents / 1000 for rows in (1, 2) for latents in (16, 64)}


@pytest.fixture(scope="module")
def page(visit: Any, sited: Callable[..., Path], digits: Path) -> Any:
    with visit(sited(digits)) as opened:
        yield opened


def paper(page: Browser, request: dict[str, Any], slow: list[float]) -> dict[str, Any]:
    """What a picture on paper took: seconds, latents of each step, reasons; or the error."""
    parameters = json.dumps({"request": {"seeds": 1, "num_inference_steps": 10} | request, "slow": slow, "kept": MEASURED})
    return dict(json.loads(page.value(PAPER.replace("PARAMETERS", parameters))))


def test_time_enough_draws_at_the_best(page: Browser) -> None:
    done = paper(page, {"deadline_ms": 1000}, [1.0])
    assert done["latents"] == [64] * 10
    assert done["seconds"] == pytest.approx(0.64)
    assert done["reasons"][0] == "920 ms left for 10 steps at pace 1.00"


def test_little_time_is_spent_to_the_full(page: Browser) -> None:
    done = paper(page, {"deadline_ms": 400}, [1.0])
    assert done["seconds"] <= 0.4
    assert done["seconds"] > 0.3, "what is saved goes to later steps"
    assert done["latents"] == sorted(done["latents"])
    assert min(done["latents"]) < 64


def test_a_machine_that_slows_down_is_believed_at_once(page: Browser) -> None:
    done = paper(page, {"deadline_ms": 1000}, [1, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    assert done["latents"][:4] == [64] * 4
    assert min(done["latents"][4:]) < 64
    assert done["seconds"] <= 1.0


def test_the_first_run_of_a_size_tells_nothing_of_the_machine(page: Browser) -> None:
    done = paper(page, {"deadline_ms": 1500}, [8, 1])
    assert done["latents"] == [64] * 10
    assert done["reasons"][1] == "868 ms left for 9 steps at pace 1.00"


def test_where_nothing_keeps_it_the_rest_goes_as_fast_as_it_can(page: Browser) -> None:
    done = paper(page, {"deadline_ms": 300}, [1, 1, 8])
    assert set(done["latents"][4:]) == {16}
    assert done["reasons"][-1].endswith("as fast as it goes")


def test_what_cannot_be_kept_is_refused_with_the_nearest(page: Browser) -> None:
    done = paper(page, {"deadline_ms": 100}, [1.0])
    assert done["error"] == (
        "No picture is done in 100 ms here: the nearest that is reachable is 160 ms, 10 steps at the cheapest budget. "
        "Allow that, or take fewer steps."
    )


def test_guidance_counts_and_the_weak_branch_has_its_own(page: Browser) -> None:
    guided = {"guidance_scale": 2, "deadline_ms": 600}
    both, least = paper(page, guided, [1.0]), paper(page, guided | {"guidance_budget": {"latents": 16}}, [1.0])
    assert both["seconds"] <= 0.6
    assert least["seconds"] <= 0.6
    assert sum(least["latents"]) > sum(both["latents"]), "a cheap weak branch leaves more for the picture"


def test_between_measured_budgets_time_is_a_straight_line(page: Browser) -> None:
    expression = """import(new URL('times.js', document.querySelector('script[src]').src)).then(({Times}) => {
      const rows = [1, 2, 3, 4].map(flops => ({budget: {latents: flops}, flops}));
      const times = new Times(rows, {'1 latents=1': 1, '1 latents=3': 5});
      times.observe({latents: 3}, 1, 7);
      return [1, 2, 3, 4].map(latents => times.seconds({latents}, 1)).concat(times.seconds({latents: 1}, 2));
    })"""
    assert page.value(expression) == pytest.approx([1, 3.3, 5.6, 5.6, 2])
