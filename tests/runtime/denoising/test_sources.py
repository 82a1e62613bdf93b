"""Pictures that are given, as the models take them."""

import numpy as np
import pytest
from PIL import Image

from elastic_runtime import UsageError
from elastic_runtime.denoising.sources import pixels


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_grey_of_sixteen_bits_keeps_its_range(mode: str, wanted: str) -> None:
    grey = np.array([[0, 257, 32768, 65535]], dtype=">u2" if mode.endswith("B") else "<u2")
    picture = Image.frombytes(mode, (4, 1), grey.tobytes())
    made = pixels("mask_image", picture, wanted)
    assert made.reshape(4, -1)[:, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_range_that_nothing_tells_is_refused(mode: str) -> None:
    with pytest.raises(UsageError, match=rf"image has pixels of mode {mode}, of which nothing tells what is white"):
        pixels("image", Image.new(mode, (2, 2)), "RGB")
