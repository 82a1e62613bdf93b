from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elastic_runtime import UsageError
from elastic_runtime.ralu.canny import canny

PHOTOGRAPHS = [
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
]  # fmt: skip


def photograph(name: str) -> np.ndarray:
    skimage = pytest.importorskip("skimage", reason="takes scikit-image's photographs")
    with Image.open(Path(skimage.__file__).parent / "data" / name) as picture:
        return np.asarray(picture.convert("L"))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_it_equals_opencv_pixel_for_pixel_on_photographs(name: str) -> None:
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV")
    picture = photograph(name)
    wanted = cv2.Canny(picture, 100, 200) > 0
    assert wanted.any()
    np.testing.assert_array_equal(canny(picture), wanted)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 24), st.sampled_from([(100, 200), (0, 0), (300, 900), (50, 51)]),
    st.sampled_from(["noise", "flat", "binary", "steps"]),
)  # fmt: skip
@settings(max_examples=150)
def test_it_equals_opencv_on_ties_borders_and_other_thresholds(
    seed: int, height: int, width: int, levels: tuple[int, int], kind: str
) -> None:
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV")
    source = np.random.default_rng(seed)
    picture = {
        "noise": lambda: source.integers(0, 256, (height, width)),
        "flat": lambda: np.full((height, width), source.integers(0, 256)),
        "binary": lambda: 255 * source.integers(0, 2, (height, width)),
        "steps": lambda: np.cumsum(source.integers(0, 60, (height, width)), axis=seed % 2) % 256,
    }[kind]().astype(np.uint8)
    np.testing.assert_array_equal(canny(picture, *levels), cv2.Canny(picture, *levels) > 0)


def test_a_weak_edge_counts_where_it_leads_to_a_strong_one() -> None:
    """A vertical step that fades downwards: 60 is strong (240 with Sobel), 30 is weak (120), 20 (80) is nothing."""
    heights = np.repeat([60, 30, 20, 30], 6)
    picture = np.zeros((24, 8), np.uint8)
    picture[:, 4:] = heights[:, None]
    edges = canny(picture).any(axis=1)
    assert edges[:11].all(), "strong, and weak that is joined to it"
    assert not edges[13:].any(), "neither the too weak nor the weak beyond it"


@pytest.mark.parametrize("picture", [np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)])
def test_it_takes_grey_bytes(picture: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"canny takes uint8 \(H, W\)"):
        canny(picture)
