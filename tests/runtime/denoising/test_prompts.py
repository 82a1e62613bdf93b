import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_flux import FLUX, SD3, Opener, encoder, encoder_graph, manifest, spec, to_zero
from fake_prompts import WORDS, flux, hidden, write_tokenizer

from elastic_runtime import Budget, Bundle, BundleError, ElasticPipeline, MissingError, Request, Session, Span, UsageError
from elastic_runtime.contract.artifacts import Graph
from elastic_runtime.contract.manifest import Template, Text
from elastic_runtime.denoising.prompts import encode
from elastic_runtime.denoising.tokens import Conditions


def both(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = feeds["input_ids"].astype(np.float32)
    return {"pooled": ids[:, :2], "penultimate_hidden_state": np.repeat(ids[:, :, None], 2, axis=2)}


def test_flux_takes_the_pooled_of_one_and_the_tokens_of_the_other(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    conditions = encode(opener.bundle, ["a red cat", "a dog"], opener)
    assert conditions.pooled.tolist() == [[2, 5, 3, 1, 1], [2, 4, 1, 1, 1]], "padded with its own mark"
    assert conditions.hidden[:, :, 0].tolist() == [[2, 5, 3, 1, 0, 0, 0, 0], [2, 4, 1, 0, 0, 0, 0, 0]]
    assert (conditions.hidden.dtype, conditions.hidden.shape) == (np.float32, (2, 8, 6))


def test_an_outlook_need_not_read_the_prompts(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    pipe = ElasticPipeline(opener.bundle, opener)
    assert [option.plan for option in pipe.outlook(Request(prompt="a cat", plan="4x"), reading=False).options()]
    assert all(not graph.startswith("text_encoder") for graph, _ in opener.opened)
    pipe.outlook(Request(prompt="a cat", plan="4x"))
    assert any(graph.startswith("text_encoder") for graph, _ in opener.opened)


def test_encoders_are_open_one_at_a_time_and_read_each_prompt_once(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    conditions = encode(opener.bundle, ["a cat", "a dog", "a cat"], opener)
    assert [name for name, _ in opener.opened] == ["text_encoder", "text_encoder_2"]
    assert opener.beside == [(), ()]
    assert all(session.closed for _, session in opener.opened)
    assert [call["input_ids"] for call in opener.calls("text_encoder")] == [(2, 5)]
    np.testing.assert_array_equal(conditions.hidden[0], conditions.hidden[2])
    encode(opener.bundle, [f"{a} {b}" for a in WORDS[2:] for b in WORDS[2:]], opener)
    assert {call["input_ids"][0] for call in opener.calls("text_encoder_2")[1:]} <= {3, 4}, "as many as a run takes"


def test_sd3_joins_features_then_tokens_and_fills_with_zeros(tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        write_tokenizer(tmp_path / name / "tokenizer.json")
    clip = ("pooled", "penultimate_hidden_state")
    encoders = tuple(
        encoder(f"text_encoder{number}", f"tokenizer{number}/tokenizer.json", length, 0, *gives)
        for number, length, gives in (("", 4, clip), ("_2", 4, clip), ("_3", 6, ("last_hidden_state",)))
    )
    shapes: dict[str, Any] = {"pooled": ("B", 2), "penultimate_hidden_state": ("B", 4, 2)}
    graphs = {"text_encoder": encoder_graph(4, **shapes), "text_encoder_2": encoder_graph(4, **shapes)}
    graphs |= {"text_encoder_3": encoder_graph(6, last_hidden_state=("B", 6, 6))}
    whole = manifest(SD3, text=Text(encoders=encoders, length=12, width=6, pooled=4), **graphs)
    opener = Opener(whole, to_zero, text_encoder=both, text_encoder_2=both, text_encoder_3=hidden(6))
    conditions = encode(Bundle(tmp_path, whole), ["a cat"], opener)
    assert conditions.pooled.tolist() == [[2, 3, 2, 3]]
    assert conditions.hidden.shape == (1, 12, 6)
    assert conditions.hidden[0, :4].tolist() == [[value] * 4 + [0, 0] for value in (2, 3, 1, 0)]
    assert conditions.hidden[0, 4:10, 5].tolist() == [2, 3, 1, 0, 0, 0]
    assert not conditions.hidden[0, 10:].any()


def test_a_prompt_that_one_encoder_cuts_is_a_warning_and_keeps_its_end_mark(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    with pytest.warns(UserWarning, match=r"text_encoder sees the first 5 of 7 tokens of the prompt 'a red.*; text_encoder_2 sees all"):
        conditions = encode(opener.bundle, ["a red cat a blue dog"], opener)
    assert conditions.pooled.tolist() == [[2, 5, 3, 2, 1]]
    assert conditions.hidden[0, :, 0].tolist() == [2, 5, 3, 2, 6, 4, 1, 0]


def test_a_prompt_that_no_encoder_takes_whole_is_an_error_before_any_is_opened(tmp_path: Path) -> None:
    opener = flux(tmp_path)
    with pytest.raises(UsageError, match=r"has 9 tokens and the model takes at most 8: shorten it"):
        encode(opener.bundle, ["a cat", "a a a a a a a a"], opener)
    assert not opener.opened
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode(opener.bundle, ["a a a a a a a"], opener)
    assert len(caught) == 1


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = flux(tmp_path)
    bare = Opener(manifest(FLUX), to_zero)
    with pytest.raises(UsageError, match="no text encoders in this bundle: give prompt_embeds and pooled_prompt_embeds"):
        encode(bare.bundle, ["a cat"], bare)
    (tmp_path / "tokenizer_2" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=re.escape("tokenizer.json is no tokenizer")):
        encode(opener.bundle, ["a cat"], opener)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingError, match=r"pip install 'elastic-export\[ralu\]'"):
        encode(opener.bundle, ["a cat"], opener)


def reading(tmp_path: Path, template: Template, tokens: int | str = "N", padded: bool = False, side: str = "right") -> Opener:
    """A model whose prompts a language model reads, which gives each token itself twice, and the mask where it has one."""
    write_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    made = encoder("text_encoder", "tokenizer/tokenizer.json", 6, 0, "hidden_states")
    made = msgspec.structs.replace(made, template=template, padded=padded, padding_side=side)
    inputs = tuple(spec(name, "B", tokens, dtype="int64") for name in ("input_ids", "attention_mask")[: 1 + padded])
    spans = {"B": Span(1, 4)} | ({"N": Span(1, made.longest)} if tokens == "N" else {})
    graph = Graph(inputs=inputs, outputs=(spec("hidden_states", "B", tokens, 2),), dimensions=spans, artifacts=())

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"hidden_states": np.stack([feeds["input_ids"], feeds.get("attention_mask", feeds["input_ids"])], -1).astype(np.float32)}

    whole = manifest(FLUX, text=Text(encoders=(made,), length=6, width=2, pooled=0), text_encoder=graph)
    opener = Opener(whole, to_zero, text_encoder=run)
    opener.bundle = Bundle(tmp_path, whole)
    return opener


def rows(conditions: Conditions) -> list[list[int]]:
    """The tokens of each row."""
    return [conditions.rows(slice(i, i + 1)).feeds["encoder_hidden_states"][0, :, 0].astype(int).tolist() for i in range(len(conditions))]


AROUND = Template(before="red blue ", after=" dog", drop=2)  # and the tokenizer's own end mark, 1


def test_a_template_stands_around_a_prompt_and_its_first_tokens_give_nothing(tmp_path: Path) -> None:
    opener = reading(tmp_path, AROUND)
    conditions = encode(opener.bundle, ["a cat", "", "cat a"], opener)
    assert rows(conditions) == [[2, 3, 4, 1], [4, 1], [3, 2, 4, 1]]
    assert conditions.pooled is None
    assert [call["input_ids"] for call in opener.calls("text_encoder")] == [(2, 6), (1, 4)], "no prompt is padded for another's sake"
    apart = reading(tmp_path, msgspec.structs.replace(AROUND, apart=True))
    assert rows(encode(apart.bundle, ["a cat"], apart)) == [[2, 3, 1, 4, 1]]


def test_a_padded_prompt_s_padding_gives_embeddings_and_the_graph_is_told(tmp_path: Path) -> None:
    opener = reading(tmp_path, msgspec.structs.replace(AROUND, drop=0), tokens=6, padded=True)
    conditions = encode(opener.bundle, ["a", ""], opener)
    assert conditions.hidden is not None
    assert conditions.hidden.tolist() == [
        [[5, 1], [6, 1], [2, 1], [4, 1], [1, 1], [0, 0]],
        [[5, 1], [6, 1], [4, 1], [1, 1], [0, 0], [0, 0]],
    ]


def test_padding_may_stand_before_a_prompt_and_words_are_taken_out_of_it(tmp_path: Path) -> None:
    opener = reading(tmp_path, msgspec.structs.replace(AROUND, drop=0, without=("cat",)), tokens=6, padded=True, side="left")
    conditions = encode(opener.bundle, ["a cat", "cat"], opener)
    assert conditions.hidden is not None
    assert conditions.hidden.tolist() == [
        [[0, 0], [5, 1], [6, 1], [2, 1], [4, 1], [1, 1]],
        [[0, 0], [0, 0], [5, 1], [6, 1], [4, 1], [1, 1]],
    ]


def test_a_graph_of_fixed_lengths_takes_the_least_that_holds_the_prompt(tmp_path: Path) -> None:
    whole = reading(tmp_path, AROUND, tokens=8)
    assert rows(encode(whole.bundle, ["a cat", ""], whole)) == [[2, 3, 4, 1], [4, 1]]
    assert [call["input_ids"] for call in whole.calls("text_encoder")] == [(2, 8)]
    opener = reading(tmp_path, AROUND)

    def compiled(graph: str) -> Session:
        session = opener(graph)
        session.budgets = (Budget(N=5), Budget(N=8))
        return session

    assert rows(encode(opener.bundle, ["a cat", ""], compiled)) == [[2, 3, 4, 1], [4, 1]]
    assert [call["input_ids"] for call in opener.calls("text_encoder")] == [(1, 8), (1, 5)]


def test_a_prompt_too_long_with_its_template_is_an_error(tmp_path: Path) -> None:
    opener = reading(tmp_path, AROUND)
    with pytest.raises(UsageError, match=r"has 7 tokens, 2 of them its template's, and the model takes at most 6: shorten it"):
        encode(opener.bundle, ["a a a a a"], opener)
    assert not opener.opened
