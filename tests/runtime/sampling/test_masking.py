"""The masked decoding loop, with models whose answers are known."""

import itertools

import numpy as np
import pytest

from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.errors import UsageError
from elastic_runtime.sampling.masking import maskgit

SCHEDULE = CosineMask(vocabulary=5)
MASKS = np.full((3, 1, 4, 4), 5, dtype=np.int64)


def certain(wanted: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) that leave no doubt."""
    return np.where(np.arange(5) == wanted.reshape(len(wanted), -1)[..., None], 0.0, -1e9)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_fewer_masks_after_each_step_and_none_at_the_end(steps: int) -> None:
    wanted = np.random.default_rng(0).integers(0, 5, MASKS.shape)
    counts = SCHEDULE.masked(16, steps)
    for step, count in zip(maskgit(lambda x, t, i: certain(wanted), MASKS, steps, np.random.default_rng(1), SCHEDULE), counts, strict=True):
        assert ((step.sample == 5).reshape(3, -1).sum(1) == count).all()
        known = step.sample != 5
        assert (step.sample[known] == wanted[known]).all()
    assert step.next_time == 0.0


def test_known_tokens_stay() -> None:
    """A model that changes its mind at each step cannot change what was kept."""
    loop = maskgit(lambda x, t, i: certain(np.full(MASKS.shape, i % 5)), MASKS, 6, np.random.default_rng(1), SCHEDULE)
    before = None
    for step in loop:
        if before is not None:
            kept = before != 5
            assert (step.sample[kept] == before[kept]).all()
        before = step.sample


def test_without_temperature_the_surest_are_kept() -> None:
    logits = np.zeros((1, 4, 2))
    logits[0, :, 1] = [9, 1, 0, 0.5]  # the first token is the surest by far
    step = next(maskgit(lambda x, t, i: logits, np.full((1, 1, 2, 2), 2), 3, np.random.default_rng(0), CosineMask(vocabulary=2), 0.0))
    assert step.sample[0, 0, 0, 0] == 1


def test_a_replaced_state_is_filled_in() -> None:
    loop = maskgit(lambda x, t, i: certain(np.zeros(MASKS.shape)), MASKS, 2, np.random.default_rng(0), SCHEDULE)
    next(loop)
    given = np.full(MASKS.shape, 3)
    given[:, 0, 0, 0] = 5
    last = loop.send(given).sample
    assert (last[:, 0, 0, 0] == 0).all()
    assert (last.reshape(3, -1)[:, 1:] == 3).all()


@pytest.mark.parametrize("steps", [0, 17])
def test_steps_that_the_tokens_do_not_allow(steps: int) -> None:
    with pytest.raises(UsageError, match="(at least 1 step|at most 16 steps)"):
        SCHEDULE.masked(16, steps)


def test_the_schedule_always_falls() -> None:
    for steps in range(1, 17):
        counts = [16, *SCHEDULE.masked(16, steps)]
        assert counts[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(counts))
