"""Growing latents in their spectrum: what is kept, what is added, and by how much it is scaled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_runtime.ralu.plan import scale
from elastic_runtime.sampling.enlarging import cosines, spectral

SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def transform(latents: np.ndarray) -> np.ndarray:
    return cosines(latents.shape[2]) @ latents @ cosines(latents.shape[3]).T


@given(st.integers(1, 40))
def test_the_transform_is_orthonormal(size: int) -> None:
    np.testing.assert_allclose(cosines(size) @ cosines(size).T, np.eye(size), atol=1e-12)


@given(st.integers(1, 24), st.integers(0, 99))
def test_the_transform_is_scipy_s(size: int, seed: int) -> None:
    fft = pytest.importorskip("scipy.fft", reason="compared with scipy's transform")
    values = np.random.default_rng(seed).standard_normal(size)
    np.testing.assert_allclose(cosines(size) @ values, fft.dct(values, norm="ortho"), atol=1e-12)


@given(SHAPES, st.floats(0.01, 1.0), st.integers(0, 99))
@settings(max_examples=50)
def test_low_frequencies_are_those_that_there_were_and_the_others_noise(shape: tuple[int, ...], sigma: float, seed: int) -> None:
    source = np.random.default_rng(seed)
    latents, noise = source.standard_normal(shape), source.standard_normal((*shape[:2], 2 * shape[2], 2 * shape[3]))
    large = transform(spectral(latents, sigma, lambda size: noise.copy()))
    high, wide = shape[2:]
    np.testing.assert_allclose(large[..., :high, :wide], scale(sigma) * transform(latents), atol=1e-9)
    np.testing.assert_allclose(large[..., high:, :], scale(sigma) * sigma * noise[..., high:, :], atol=1e-9)
    np.testing.assert_allclose(large[..., :high, wide:], scale(sigma) * sigma * noise[..., :high, wide:], atol=1e-9)


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=25)
def test_without_noise_the_round_trip_gives_the_latents_back(shape: tuple[int, ...], seed: int) -> None:
    latents = np.random.default_rng(seed).standard_normal(shape)
    grown = spectral(latents, 0.0, np.zeros)
    back = cosines(shape[2]).T @ transform(grown)[..., : shape[2], : shape[3]] @ cosines(shape[3]) / scale(0.0)
    np.testing.assert_allclose(back, latents, atol=1e-9)
    np.testing.assert_allclose(grown.mean(axis=(2, 3)), latents.mean(axis=(2, 3)), atol=1e-9)  # a picture is as bright as before


@pytest.mark.parametrize("sigma", [0.2, 0.75, 1.0])
def test_pure_noise_stays_white_with_the_variance_of_its_new_sigma(sigma: float) -> None:
    source = np.random.default_rng(0)
    grown = spectral(sigma * source.standard_normal((8, 4, 16, 16)), sigma, source.standard_normal)
    assert grown.std() == pytest.approx(scale(sigma) * sigma, rel=0.02)
    correlation = (grown[..., :-1] * grown[..., 1:]).mean() / grown.var()
    assert abs(correlation) < 0.02
    assert scale(1.0) == 1.0  # pure noise stays pure noise
