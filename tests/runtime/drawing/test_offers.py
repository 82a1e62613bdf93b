"""Which plans suit a model by its scheduler's shift and its number of steps, and that no policy chooses another."""

from typing import Any

import msgspec
import pytest
from fake_flux import EMBEDS, Opener, manifest, to_zero

from elastic_runtime import Auto, Deadline, ElasticPipeline, Plan, Request, UsageError
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.ralu.offers import offers

OWN = Plan((2, 2, 4), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)


def pipeline(shift: float = 3.0, few_steps: int | None = None) -> ElasticPipeline:
    rows = tuple(Cost(budget={"tokens": n}, flops=1000 * n, weight_bytes=4000, activation_bytes=100 * n) for n in (16, 34, 64))
    whole = msgspec.structs.replace(manifest(), cost=rows)
    model = msgspec.structs.replace(whole.model, config={"scheduler": {"shift": shift}}, few_steps=few_steps)
    opener = Opener(msgspec.structs.replace(whole, model=model), to_zero)
    return ElasticPipeline(opener.bundle, opener)


def named(pipe: ElasticPipeline, **asked: Any) -> set[str]:
    outlook = pipe.outlook(Request(**EMBEDS, policy=Auto(), **asked))
    return {option.name.partition(",")[0] for option in outlook.options()}


@pytest.mark.parametrize(
    ("shift", "plans"),
    [(3.0, {"4x", "7x", "speed", "full"}), (4.5, {"4x", "speed", "full"}), (7.6, {"speed", "full"}), (25.0, {"speed", "full"})],
)
def test_what_a_policy_may_choose_suits_the_shift(shift: float, plans: set[str]) -> None:
    assert named(pipeline(shift)) == plans


@pytest.mark.parametrize(
    ("few_steps", "plans"), [(18, {"4x", "7x", "speed", "full"}), (12, {"7x", "speed", "full"}), (4, {"speed", "full"})]
)
def test_what_a_policy_may_choose_suits_the_steps_of_a_distilled_model(few_steps: int, plans: set[str]) -> None:
    assert named(pipeline(few_steps=few_steps)) == plans


@pytest.mark.parametrize("policy", [Auto(), None])
def test_where_no_preset_suits_a_picture_is_drawn_along_full(policy: Any) -> None:
    result = pipeline(9.0)(**EMBEDS, policy=policy, output_type="latent", seeds=1)
    assert result.plan == Plan.full(20, 9.0)


@pytest.mark.parametrize("policy", [Auto(), None])
def test_a_size_that_no_preset_takes_is_drawn_along_full(policy: Any) -> None:
    result = pipeline()(**EMBEDS, policy=policy, height=72, output_type="latent", seeds=1)
    assert (result.plan, result.facts["size"]) == (Plan.full(20, 3.0), (9, 8))
    assert pipeline()(**EMBEDS, policy=policy, height=72, num_inference_steps=3, output_type="latent").plan == Plan.full(3, 3.0)
    with pytest.raises(UsageError, match="height is a multiple of 16 px for this plan, got 72"):
        pipeline()(**EMBEDS, policy=policy, height=72, plan="4x")


def test_one_that_is_asked_for_by_name_is_refused_with_what_to_take() -> None:
    with pytest.raises(
        UsageError, match=r"plan '4x' does not suit .* at 64 image tokens: .* above 5.5, .* is 9 there; take plan 'speed' or 'full'"
    ):
        pipeline(9.0)(**EMBEDS, plan="4x")
    with pytest.raises(UsageError, match="plan '7x' does not suit .* distilled to draw in 8 steps, fewer than the 10 of the plan"):
        pipeline(few_steps=8)(**EMBEDS, plan="7x", policy=Deadline(9.0))


def test_steps_are_those_of_full_where_that_is_what_is_drawn() -> None:
    result = pipeline(9.0)(**EMBEDS, num_inference_steps=3, output_type="latent")
    assert result.plan == Plan.full(3, 9.0)


def test_a_plan_of_one_s_own_is_one_s_own_business() -> None:
    assert pipeline(9.0, 4)(**EMBEDS, plan=OWN, output_type="latent").plan == OWN


def test_a_schedule_that_ends_above_where_speed_grows_leaves_it_out_and_nothing_else() -> None:
    odd = offers(9, 64, {"shift": 2.0, "shift_terminal": 0.7})
    assert set(odd) == {"4x", "7x", "full", "mrflow"}
    assert set(offers(1, 64, {})) == {"4x", "7x", "full"}
