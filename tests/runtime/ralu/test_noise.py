import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime.ralu.noise import SLACK, renoising, siblings

ZS = st.floats(2, 100)


def covariance(z: float) -> np.ndarray:
    return np.eye(4) + (-1 / z**2 + SLACK) * np.ones((4, 4))


@given(ZS)
def test_its_covariance_is_exact(z: float) -> None:
    """The map is linear: its matrix times its transpose is the covariance."""
    matrix = siblings(np.eye(4)[:, :, None], z)[:, :, 0]  # row i is the image of the i-th unit block
    np.testing.assert_allclose(matrix @ matrix.T, covariance(z), atol=1e-12)


@pytest.mark.parametrize("z", [2.0, 6.317])
def test_its_samples_have_that_covariance(z: float) -> None:
    drawn = siblings(np.random.default_rng(0).standard_normal((50_000, 4, 1)), z)[:, :, 0]
    np.testing.assert_allclose(np.cov(drawn.T), covariance(z), atol=0.02)
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.02)


@given(st.integers(0, 5), st.integers(0, 5), st.booleans(), ZS)
def test_only_tokens_that_grew_are_correlated(rest: int, blocks: int, first: bool, z: float) -> None:
    white = np.random.default_rng(0).standard_normal((2, rest + 4 * blocks, 3))
    before = white.copy()
    grew = slice(0, 4 * blocks) if first else slice(rest, None)
    noise = renoising(white, grew, z)
    np.testing.assert_array_equal(white, before)
    other = slice(4 * blocks, None) if first else slice(0, rest)
    np.testing.assert_array_equal(noise[:, other], white[:, other])
    for block in range(blocks):
        place = slice(grew.start + 4 * block, grew.start + 4 * block + 4)
        np.testing.assert_allclose(noise[:, place], siblings(white[:, place], z))
