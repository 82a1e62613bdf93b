import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime.ralu.patches import best, edge_scores, grow, mixed, order, others, pack, raster, take, unpack


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_packing_is_undone_and_a_token_is_channels_rows_columns(batch: int, channels: int, rows: int, columns: int, size: int) -> None:
    latents = np.random.default_rng(0).standard_normal((batch, channels, rows * size, columns * size))
    tokens = pack(latents, size)
    assert tokens.shape == (batch, rows * columns, channels * size**2)
    np.testing.assert_array_equal(unpack(tokens, rows, columns, size), latents)
    last = latents[0, :, (rows - 1) * size :, (columns - 1) * size :]
    np.testing.assert_array_equal(tokens[0, -1], last.ravel())


@given(st.lists(st.lists(st.integers(0, 5), min_size=9, max_size=9), min_size=1, max_size=3), st.integers(1, 9))
def test_the_best_are_the_highest_and_of_equal_ones_the_first(scores: list[list[int]], count: int) -> None:
    picks = best(np.array(scores), count)
    for row, indices in zip(scores, picks, strict=True):
        assert indices.tolist() == sorted(sorted(range(9), key=lambda i: (-row[i], i))[:count])
    rest = others(picks, 9)
    assert [sorted((*a, *b)) for a, b in zip(picks.tolist(), rest.tolist(), strict=True)] == [list(range(9))] * len(scores)
    assert (np.diff(rest, axis=1) > 0).all()


def test_a_grown_token_lies_at_its_own_and_three_half_steps() -> None:
    tokens, positions = grow(np.array([[[7.0], [8.0]]]), np.array([[[1.0, 2.0], [3.0, 0.0]]]))
    assert tokens[0, :, 0].tolist() == [7, 7, 7, 7, 8, 8, 8, 8]
    assert positions[0, :4].tolist() == [[1, 2], [1, 2.5], [1.5, 2], [1.5, 2.5]]
    assert positions[0, 4].tolist() == [3, 0]


@given(st.integers(1, 4), st.integers(1, 4))
def test_all_grown_tokens_doubled_and_ordered_are_the_raster(rows: int, columns: int) -> None:
    _, positions = grow(np.zeros((2, rows * columns, 1)), raster(2, rows, columns))
    shuffled = np.stack([np.random.default_rng(i).permutation(one) for i, one in enumerate(positions)])
    np.testing.assert_array_equal(take(2 * shuffled, order(2 * shuffled)), raster(2, 2 * rows, 2 * columns))


def test_edges_are_counted_where_they_are_in_the_bright_half_only() -> None:
    picture = np.full((2, 3, 32, 48), -0.9, np.float32)
    picture[0, :, 4:12, 20:28] = 0.9  # a square in the cell of row 0, column 1
    picture[1, :, 20:28, 4:12] = -0.2  # darker than mid-grey: clipped, as the authors' code does
    scores = edge_scores(picture, 16)
    assert scores.shape == (2, 6)
    assert np.flatnonzero(scores[0]).tolist() == [1]
    assert scores[0, 1] > 16
    assert not scores[1].any()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 2), st.data())
def test_tokens_of_two_sizes_are_a_picture_whose_small_latents_are_four(
    batch: int, rows: int, columns: int, size: int, data: st.DataObject
) -> None:
    low = np.random.default_rng(0).standard_normal((batch, 3, rows * size, columns * size))
    whole = low.repeat(2, axis=2).repeat(2, axis=3)
    count = data.draw(st.integers(1, rows * columns - 1))
    chosen = np.stack([np.sort(np.random.default_rng(i).permutation(rows * columns)[:count]) for i in range(batch)])
    rest, positions = others(chosen, rows * columns), raster(batch, rows, columns)
    places = grow(take(positions, chosen), take(positions, chosen))[1]
    numbers = (2 * places @ (2 * columns, 1)).astype(int)  # of fine tokens, in raster order
    tokens = np.concatenate([take(pack(low, size), rest), take(pack(whole, size), numbers)], axis=1)
    picture = mixed(tokens, np.concatenate([take(positions, rest), places], axis=1), rest.shape[1], 2 * rows, 2 * columns, size)
    np.testing.assert_array_equal(picture, whole)
