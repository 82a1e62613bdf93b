"""What a model saw in a step of a plan, as pictures."""

import msgspec
import numpy as np
from fake_flux import EMBEDS, SCHNELL, manifest, pipeline

from elastic_runtime import Budget, Plan, Request, Span

TINY = Plan((1, 1, 2), (0.3, 0.5, 1.0), (3.0, 2.0, 2.0), 4.0, 0.3)


def test_the_loop_itself_can_be_watched_and_stopped() -> None:
    pipe, opener = pipeline()
    steps = pipe.iterate(Request(**EMBEDS, plan=TINY, height=32, width=64), generator=np.random.default_rng(0))
    progress = next(steps)
    assert progress.record.budget == Budget(tokens=8)
    assert progress.step.denoised.shape == (1, 4, 4, 8)
    assert pipe.decode(progress.step.denoised).shape == (1, 3, 16, 32)
    assert [picture.size for picture in pipe.preview(progress.step.denoised, 32, 64)] == [(64, 32)]
    steps.close()
    assert len(opener.calls("denoiser")) == 1


def test_a_decoder_of_one_size_makes_previews_too() -> None:
    whole = manifest(SCHNELL, classes=2)
    one = msgspec.structs.replace(
        whole.graphs["decoder"], dimensions=whole.graphs["decoder"].dimensions | {"h": Span(16, 16), "w": Span(16, 16)}
    )
    pipe, opener = pipeline(msgspec.structs.replace(whole, graphs=whole.graphs | {"decoder": one}))
    seen = np.zeros((1, 4, 8, 8))
    seen[:, :, 3, 4] = 1.0  # is decoded to white
    (picture,) = pipe.preview(seen, 64, 64)
    assert opener.calls("decoder")[-1]["latent"] == (1, 4, 16, 16)
    assert np.argwhere(np.asarray(picture)[:, :, 0] == 255).tolist() == [[row, column] for row in range(24, 32) for column in range(32, 40)]
    for progress in pipe.iterate(Request(class_labels=1, plan="speed", seeds=0)):
        assert pipe.preview(progress.step.denoised, 64, 64)[0].size == (64, 64)
