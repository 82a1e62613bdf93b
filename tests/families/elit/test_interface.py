"""The interface by itself: rectangles, conditions of another width, and tables that are there or not."""

import pytest

torch = pytest.importorskip("torch", reason="the interface needs torch")

from elastic_export.families.elit.interface import InterfaceParams, Read, Windows, Write, tail_drop  # noqa: E402

WINDOWS = Windows(rows=4, columns=6, side=2)


def sizes(latent_positions: int | None = 24, write_positions: bool = True) -> InterfaceParams:
    return InterfaceParams(WINDOWS, 16, 2, 8, latent_positions, write_positions)


@pytest.mark.parametrize(
    ("windows", "order"),
    [
        (Windows(4, 4, 2), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
        (WINDOWS, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]),
    ],
)
def test_windows_are_row_major_and_undone(windows: Windows, order: list[int]) -> None:
    raster = torch.arange(float(windows.tokens)).reshape(1, -1, 1)
    assert windows.from_raster(raster)[0, :, 0].tolist() == order
    assert torch.equal(windows.to_raster(windows.from_raster(raster)), raster)
    assert (windows.count, windows.places) == (len(order) // 4, 4)


def test_windows_that_do_not_divide_the_grid_are_named() -> None:
    with pytest.raises(ValueError, match="a grid of 4x6 tokens does not divide into groups of 4x4"):
        Windows(4, 6, 4)
    with pytest.raises(ValueError, match="latent_positions 8 is fewer than the 24 tokens"):
        sizes(latent_positions=8)


@pytest.mark.parametrize("kept", [1, 3, 4])
@pytest.mark.parametrize("tables", [True, False])
def test_tokens_go_in_and_come_out(kept: int, tables: bool) -> None:
    params = sizes(24 if tables else None, tables)
    read, write = Read(params), Write(params)
    names = [name for part in (read, write) for name in part.state_dict()]
    assert names.count("pos_embed") == 1 + tables
    assert ("latent_pos_embed" in names) == tables
    x, c = torch.randn(2, 24, 16), torch.randn(2, 8)
    spatial, latents = read(x, c)
    z = tail_drop(latents, kept)
    assert (spatial.shape, latents.shape, z.shape) == ((2, 6, 4, 16), (2, 6, 4, 16), (2, 6 * kept, 16))
    out = write(spatial, latents, z, kept)
    assert out.shape == x.shape
    assert torch.equal(out, write(spatial, latents, tail_drop(latents, 4), 4)), "a kept latent that did not change is as a dropped one"
    assert not torch.equal(out, write(spatial, latents, z + 1, kept))


def test_a_window_reads_its_own_tokens_alone() -> None:
    read = Read(sizes())
    x, c = torch.randn(1, 24, 16), torch.randn(1, 8)
    other = x.clone()
    other[:, 4:8] += 1  # the second window
    changed = (read(x, c)[1] != read(other, c)[1]).any(dim=3).any(dim=2)[0]
    assert changed.tolist() == [False, True, False, False, False, False]
