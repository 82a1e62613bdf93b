"""The decoding loop of masked token models (MaskGIT, arXiv 2202.04200), as a generator like those of `sampler`.

The state is int64 (B, 1, H, W): token ids, and the vocabulary's size where a token is still masked.
"""

import numpy as np

from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.sampling.flow import Loop, Predict, Step, after

TEMPERATURE = 4.5  # MaskGIT's for 8 to 12 steps


def maskgit(
    predict: Predict,
    start: np.ndarray,
    steps: int,
    source: np.random.Generator,
    schedule: CosineMask,
    temperature: float = TEMPERATURE,
    begin: float = 1.0,
) -> Loop:
    """Draw every masked token, keep the surest, mask the others again; fewer stay masked after each step, none after the last.

    `predict` gives logits (B, T, V). A token's sureness is its log probability plus Gumbel noise, scaled by `temperature` and
    fading over the steps: with none, the surest are kept and pictures are alike. The step's time is the share of steps to come; what is
    left of a run `begin`s at a later one.
    """
    state = start.astype(np.int64)
    counts = schedule.masked(state[0].size, steps, begin, int((state[0] == schedule.vocabulary).sum()))
    for i, count in enumerate(counts):
        time, next_time = begin * (1 - i / steps), begin * (1 - (i + 1) / steps)
        logits = predict(state, time, i)  # (B, T, V)
        drawn = (logits + source.gumbel(size=logits.shape)).argmax(-1)  # (B, T)
        log_probability = np.take_along_axis(_log_softmax(logits), drawn[..., None], -1)[..., 0]
        masked = state.reshape(drawn.shape) == schedule.vocabulary
        sureness = log_probability + temperature * next_time * source.gumbel(size=drawn.shape)
        order = np.where(masked, sureness, np.inf).argsort(-1)  # the least sure first, known ones last
        again = np.zeros_like(masked)
        np.put_along_axis(again, order[:, :count], True, -1)
        tokens = np.where(masked, np.where(again, schedule.vocabulary, drawn), state.reshape(drawn.shape))
        step = Step(i, steps, time, next_time, tokens.reshape(state.shape))
        state = after(step, (yield step))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
