from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from fake_flux import FLUX, FLUX2, PADDED, QWEN, SCHNELL, SD3, Z_IMAGE, Patches, denoiser_graph, manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_runtime import Budget, FakeSession, Guidance, UsageError
from elastic_runtime.denoising.references import References
from elastic_runtime.denoising.tokens import Conditions, TokenDenoiser, place, samples, text_places
from elastic_runtime.ralu.patches import raster
from elastic_runtime.sessions.session import batches

TOKENS = np.random.default_rng(0).standard_normal((2, 6, 16))
STRONG = Conditions(np.ones((2, 3, 6), np.float32), np.full((2, 5), 2, np.float32))
WEAK = Conditions(np.zeros((2, 3, 6), np.float32), np.full((2, 5), 1, np.float32))


def denoiser(patches: Patches, embedded: float | None = None) -> tuple[TokenDenoiser, list[dict[str, np.ndarray]]]:
    fed: list[dict[str, np.ndarray]] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed.append(dict(feeds))
        return {"prediction": feeds["hidden_states"] * feeds["pooled_projections"][:, :1, None]}

    return TokenDenoiser(FakeSession(denoiser_graph(patches), run), patches, embedded), fed


def test_flux_is_fed_in_diffusers_words() -> None:
    model, fed = denoiser(FLUX, 3.5)
    got = model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.75, STRONG, None, Guidance())
    np.testing.assert_allclose(got, 2 * TOKENS, rtol=1e-6)
    assert got.dtype == np.float64
    (feeds,) = fed
    assert feeds["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert feeds["timestep"].tolist() == [0.75] * 2
    assert feeds["guidance"].tolist() == [3.5] * 2
    np.testing.assert_array_equal(feeds["txt_ids"], np.zeros((3, 3)))
    model, fed = denoiser(SCHNELL)
    model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.75, STRONG, None, Guidance())
    assert "guidance" not in fed[0]


def test_sd3_is_placed_in_the_middle_of_its_table_in_every_stage() -> None:
    model, fed = denoiser(SD3)
    model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.5, STRONG, None, Guidance())
    assert fed[0].keys() == {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "pos_ids"}
    assert fed[0]["pos_ids"][0].tolist() == [11, 10], "24 places, 2 rows and 3 columns"
    np.testing.assert_array_equal(place(np.array([[0.5, 1.5]]), (2, 3), 0, SD3), [[11.5, 11.5]])
    with pytest.raises(UsageError, match="24 x 24 places for patches, the picture has 8 x 26"):
        place(raster(1, 8, 26)[0], (8, 26), 0, SD3)


def test_sd3_s_places_are_those_that_diffusers_crops() -> None:
    torch = pytest.importorskip("torch", reason="compares with diffusers")
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="compares with diffusers")
    embed = embeddings.PatchEmbed(16, 16, 2, 4, 4, pos_embed_max_size=24)
    embed.pos_embed = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"), dim=-1).reshape(1, -1, 2)
    for rows, columns in ((8, 8), (5, 8), (24, 11)):
        wanted = embed.cropped_pos_embed(2 * rows, 2 * columns)[0].numpy()
        np.testing.assert_array_equal(place(raster(1, rows, columns)[0], (rows, columns), 0, SD3), wanted)


def test_guidance_leads_away_from_the_weak_branch_in_one_run() -> None:
    model, fed = denoiser(SCHNELL)
    got = model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.5, STRONG, WEAK, Guidance(3.0))
    np.testing.assert_allclose(got, (1 + 3 * (2 - 1)) * TOKENS, rtol=1e-6)
    assert [feeds["hidden_states"].shape[0] for feeds in fed] == [4]
    fed.clear()
    got = model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.9, STRONG, WEAK, Guidance(3.0, 0.2, 0.8))
    np.testing.assert_allclose(got, 2 * TOKENS, rtol=1e-6)
    assert [feeds["hidden_states"].shape[0] for feeds in fed] == [2]


def test_pictures_with_tokens_in_other_places_run_alone_with_both_branches() -> None:
    model, fed = denoiser(SCHNELL)
    positions = np.stack([raster(1, 2, 3)[0], raster(1, 2, 3)[0] + 0.5])
    got = model.guided(TOKENS, positions, (2, 3), 0.5, STRONG, WEAK, Guidance(3.0))
    np.testing.assert_allclose(got, 4 * TOKENS, rtol=1e-6)
    assert [feeds["hidden_states"].shape[0] for feeds in fed] == [2, 2]
    np.testing.assert_array_equal(fed[1]["img_ids"][0], [0, 0.5, 0.5])


def test_a_batch_larger_than_the_graph_s_takes_several_runs() -> None:
    model, fed = denoiser(FLUX, 1.0)
    rows = [np.concatenate([array] * 3) for array in (TOKENS, STRONG.hidden, STRONG.pooled)]
    got = model.guided(rows[0], raster(6, 2, 3), (2, 3), 0.5, Conditions(rows[1], rows[2]), None, Guidance())
    assert [len(feeds["guidance"]) for feeds in fed] == [3, 3]
    np.testing.assert_allclose(got, 2 * rows[0], rtol=1e-6)


def test_places_of_image_and_text_by_layout() -> None:
    """A patch at (0.5, 1.5) of 4 rows and 7 columns, beside a text of two tokens."""
    wanted: dict[Patches, tuple[list[float], list[list[float]]]] = {
        FLUX: ([0, 0.5, 1.5], [[0, 0, 0], [0, 0, 0]]),
        QWEN: ([0, -1.5, -2.5], [[3, 3, 3], [4, 4, 4]]),
        FLUX2: ([0, 0.5, 1.5, 0], [[0, 0, 0, 0], [0, 0, 0, 1]]),
        Z_IMAGE: ([3, 0.5, 1.5], [[1, 0, 0], [2, 0, 0]]),
    }
    for patches, (image, text) in wanted.items():
        ids = place(np.array([[0.5, 1.5]]), (4, 7), 2, patches), text_places(2, (4, 7), patches)
        assert [each.tolist() for each in ids] == [[image], text], patches
        assert {each.dtype for each in ids} == {np.dtype(np.float32)}
        assert {each.shape[1] for each in ids} == {patches.columns}


@pytest.mark.parametrize(("rows", "columns", "text"), [(2, 3, 32), (7, 1, 64)])
def test_places_are_those_of_diffusers(rows: int, columns: int, text: int) -> None:
    torch = pytest.importorskip("torch", reason="compares with diffusers")
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    klein, z_image = diffusers.Flux2KleinPipeline, diffusers.ZImageTransformer2DModel
    grid = raster(1, rows, columns)[0]
    theirs = {
        FLUX2: (klein._prepare_latent_ids(torch.zeros(1, 1, rows, columns))[0], klein._prepare_text_ids(torch.zeros(1, text, 1))[0]),
        Z_IMAGE: (
            z_image.create_coordinate_grid((1, rows, columns), (text + 1, 0, 0)).flatten(0, 2),
            z_image.create_coordinate_grid((text, 1, 1), (1, 0, 0)).flatten(0, 2),
        ),
    }
    for patches, (image, words) in theirs.items():
        np.testing.assert_array_equal(place(grid, (rows, columns), text, patches), image.numpy())
        np.testing.assert_array_equal(text_places(text, (rows, columns), patches), words.numpy())


def test_texts_of_other_lengths_run_apart_each_at_its_places() -> None:
    fed: list[dict[str, np.ndarray]] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed.append(dict(feeds))
        return {"prediction": feeds["hidden_states"] * feeds["encoder_hidden_states"].sum((1, 2))[:, None, None]}

    model = TokenDenoiser(FakeSession(denoiser_graph(QWEN, pooled=0), run), QWEN)
    strong, weak = Conditions(np.ones((2, 3, 6), np.float32)), Conditions(np.ones((2, 1, 6), np.float32))
    got = model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.5, strong, weak, Guidance(2.0))
    np.testing.assert_allclose(got, (6 + 2 * (18 - 6)) * TOKENS, rtol=1e-6)
    assert [(len(feeds["hidden_states"]), feeds["txt_ids"].tolist()) for feeds in fed] == [
        (2, [[1, 1, 1], [2, 2, 2], [3, 3, 3]]), (2, [[1, 1, 1]]),
    ]  # fmt: skip
    assert "pooled_projections" not in fed[0]
    fed.clear()
    model.guided(TOKENS, raster(2, 2, 3), (2, 3), 0.5, strong, strong, Guidance(2.0))
    assert [len(feeds["hidden_states"]) for feeds in fed] == [4], "texts of one length share a run"
    model.evaluate(Budget(tokens=4), 1, 0.5, np.random.default_rng(0))
    assert fed[-1]["encoder_hidden_states"].shape == (1, 64, 6)


def test_tokens_are_filled_up_to_multiples_and_texts_that_then_are_as_long_share_a_run() -> None:
    fed: list[dict[str, np.ndarray]] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed.append(dict(feeds))
        return {"prediction": feeds["hidden_states"] + feeds["encoder_hidden_states"].sum((1, 2))[:, None, None]}

    model = TokenDenoiser(FakeSession(denoiser_graph(PADDED, pooled=0), run), PADDED)
    x = np.random.default_rng(1).standard_normal((3, 6, 16)).astype(np.float32)
    texts = Conditions.of([np.ones((length, 6), np.float32) for length in (3, 9, 8)])
    got = model.guided(x, raster(3, 2, 3), (2, 3), 0.5, texts, None, Guidance())
    np.testing.assert_allclose(got, x + 6 * np.array([3, 9, 8])[:, None, None], rtol=1e-6)
    first, second = fed
    assert (first["hidden_states"].shape, first["encoder_hidden_states"].shape) == ((2, 8, 16), (2, 8, 6))
    np.testing.assert_array_equal(first["img_pad"], [[0] * 6 + [1] * 2] * 2)
    np.testing.assert_array_equal(first["txt_pad"], [[0] * 3 + [1] * 5, [0] * 8])
    np.testing.assert_array_equal(first["img_ids"][[0, 5, 6, 7]], [[9, 0, 0], [9, 1, 2], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(first["txt_ids"], [[1 + k, 0, 0] for k in range(8)])
    assert second["encoder_hidden_states"].shape == (1, 16, 6)
    assert second["txt_pad"].sum() == 7
    assert second["img_ids"][0, 0] == 17, "beside 16 text tokens, pads among them"
    fed.clear()
    model.guided(x, raster(3, 2, 3), (2, 3), 0.5, texts.rows(slice(0, 1)).repeated(3), texts, Guidance(2.0))
    assert [len(feeds["hidden_states"]) for feeds in fed] == [2, 3, 1], "five texts of eight take two runs of four at most"


def test_runs_have_texts_of_one_length() -> None:
    lengths = ((8, 16, 8), (8, 8, 16))
    assert samples(lengths, guided=False, alone=False) == [2, 1]
    assert samples(lengths, guided=True, alone=False) == [4, 2]
    assert samples(lengths, guided=True, alone=True) == [2, 1, 1, 1, 1]
    assert samples(((4,) * 3,) * 2, guided=True, alone=False) == [6]


def test_a_capped_prediction_is_no_longer_than_so_many_times_the_strong_one() -> None:
    strong, weak = np.random.default_rng(1).standard_normal((2, 2, 5, 16))
    plain, length = Guidance(4.0).lead(strong, weak), lambda each: np.sqrt(np.square(each).sum((1, 2)))
    capped = Guidance(4.0, cap=0.5).lead(strong, weak)
    np.testing.assert_allclose(length(capped), 0.5 * length(strong))
    np.testing.assert_allclose(capped * (length(plain) / length(capped))[:, None, None], plain)
    np.testing.assert_array_equal(Guidance(4.0, cap=100.0).lead(strong, weak), plain)


def test_a_rescaled_prediction_has_the_strong_one_s_length_in_each_token() -> None:
    strong, weak = np.random.default_rng(1).standard_normal((2, 2, 5, 16))
    plain, rescaled = Guidance(4.0).lead(strong, weak), Guidance(4.0, rescale="norm").lead(strong, weak)
    np.testing.assert_allclose(plain, weak + 4 * (strong - weak))
    np.testing.assert_allclose(np.linalg.norm(rescaled, axis=-1), np.linalg.norm(strong, axis=-1))
    np.testing.assert_allclose(
        rescaled * np.linalg.norm(plain, axis=-1, keepdims=True), plain * np.linalg.norm(strong, axis=-1, keepdims=True)
    )
    none = np.zeros((1, 2, 16))
    np.testing.assert_array_equal(Guidance(4.0, rescale="norm").lead(none, none), none)


def test_references_stand_after_the_picture_and_are_cut_from_the_answer() -> None:
    fed: list[dict[str, np.ndarray]] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed.append(dict(feeds))
        return {"prediction": feeds["hidden_states"] + feeds["img_ids"][:, :1]}

    whole = manifest(FLUX2)
    first, second = np.arange(16, dtype=np.float32).reshape(4, 2, 2), np.ones((4, 1, 3), np.float32)
    beside = References.of([first, second], whole.model)
    model = TokenDenoiser(FakeSession(denoiser_graph(FLUX2, pooled=0), run), FLUX2, references=beside)
    x = np.random.default_rng(0).standard_normal((2, 6, 4))
    texts = Conditions(np.ones((2, 3, 6), np.float32))
    got = model.guided(x, raster(2, 2, 3), (2, 3), 0.5, texts, None, Guidance())
    np.testing.assert_allclose(got, x, rtol=1e-6)
    assert fed[0]["hidden_states"].shape == (2, 6 + 4 + 3, 4)
    np.testing.assert_array_equal(fed[0]["hidden_states"][1, 6:10], first.reshape(4, 4).T)
    assert fed[0]["img_ids"][6:].tolist() == [
        [10, 0, 0, 0], [10, 0, 1, 0], [10, 1, 0, 0], [10, 1, 1, 0], [20, 0, 0, 0], [20, 0, 1, 0], [20, 0, 2, 0],
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    weak=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    guided=st.booleans(),
)
def test_a_picture_is_the_same_among_texts_of_other_lengths(lengths: list[int], weak: list[int], guided: bool) -> None:
    """No text is ever padded for another's sake, and rows come back in order."""
    fed: list[dict[str, np.ndarray]] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed.append(dict(feeds))
        assert feeds["encoder_hidden_states"].all(), "what follows a text is no text"
        assert feeds["txt_ids"].shape == (feeds["encoder_hidden_states"].shape[1], 3)
        return {"prediction": feeds["hidden_states"] * feeds["encoder_hidden_states"].sum((1, 2))[:, None, None]}

    session = FakeSession(denoiser_graph(QWEN, pooled=0), run)
    model = TokenDenoiser(session, QWEN)
    x = np.random.default_rng(0).standard_normal((len(lengths), 6, 16))
    strong, other = (Conditions.of([np.full((n, 6), i + 1.0, np.float32) for i, n in enumerate(of)]) for of in (lengths, weak[: len(x)]))
    guidance = Guidance(2.0 if guided else 1.0)
    got = model.guided(x, raster(len(x), 2, 3), (2, 3), 0.5, strong, other, guidance)
    values = [6 * (i + 1) * (n + guided * (n - m)) for i, (n, m) in enumerate(zip(lengths, weak, strict=False))]
    np.testing.assert_allclose(got, np.array(values)[:, None, None] * x, rtol=1e-5)
    shared = Counter(lengths + weak[: len(x)] * guided).values()
    assert sorted(samples([strong.counts.tolist(), other.counts.tolist()], guided, alone=False)) == sorted(shared)
    rows = [part.stop - part.start for size in shared for part in batches(session, size)]
    assert sorted(len(feeds["hidden_states"]) for feeds in fed) == sorted(rows)


def test_conditions_of_several_lengths_are_cut_to_the_longest_that_are_left() -> None:
    texts = Conditions.of([np.full((n, 2), n, np.float32) for n in (3, 1, 3)], np.arange(3.0)[:, None])
    assert (texts.length, len(texts)) == (3, 3)
    np.testing.assert_array_equal(texts.lengths, [3, 1, 3])
    assert [rows.tolist() for rows in texts.alike()] == [[0, 2], [1]]
    same = texts.rows(np.array([0, 2]))
    assert (same.lengths, same.beside(same), texts.beside(texts)) == (None, True, False)
    short = texts.rows(slice(1, 2))
    assert (short.length, short.lengths, short.feeds["encoder_hidden_states"].tolist()) == (1, None, [[[1, 1]]])
    np.testing.assert_array_equal(texts.repeated(2).lengths, [3, 3, 1, 1, 3, 3])
    both = short.joined(texts)
    np.testing.assert_array_equal(both.lengths, [1, 3, 1, 3])
    np.testing.assert_array_equal(both.pooled, [[1], [0], [1], [2]])
    assert both.rows(slice(0, 1)).feeds["encoder_hidden_states"].tolist() == [[[1, 1]]]
