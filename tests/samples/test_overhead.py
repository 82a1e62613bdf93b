"""`samples/overhead.py` on a real bundle."""

from collections.abc import Callable

import pytest

import overhead
from elastic_runtime import Budget, Bundle, ElasticPipeline


def test_the_backends_time_is_taken_out_and_the_session_left_as_it_was(
    golden_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "PICTURES", 2)
    monkeypatch.setattr(overhead, "WARM", 1)
    with ElasticPipeline.from_pretrained(golden_bundle("c"), "ort") as pipe:
        run = pipe.session("denoiser")._run
        picture, left = overhead.outside(pipe, Budget())
        assert 0 < left < picture
        assert pipe.session("denoiser")._run == run


def test_a_cold_process_draws(golden_bundle: Callable[..., Bundle]) -> None:
    assert 0 < overhead.cold(golden_bundle("c").folder) < 120
