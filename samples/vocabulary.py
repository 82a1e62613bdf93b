"""A small vocabulary in Qwen's form, for models that read a few prompts."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from elastic_export.families.prompts import DESCRIBING

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer(words: Iterable[str], special: Sequence[str] = SPECIAL, size: int = 700) -> Qwen2Tokenizer:
    """Qwen's own splitting, learned from what stands before each prompt and from `words`: every word there is one token, as in Qwen's own
    vocabulary, of whose tokens the pipeline leaves out as many. `special` are tokens besides, `size` is the most that are learned."""
    learning = Tokenizer(models.BPE())
    learning.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learning.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    text = DESCRIBING[0]
    for word in special:
        text = text.replace(word, " ")
    learning.train_from_iterator([text, *words], trainer)
    merges = [tuple(pair) for pair in json.loads(learning.to_str())["model"]["merges"]]
    made = Qwen2Tokenizer(vocab=learning.get_vocab(), merges=merges)  # type: ignore[arg-type]
    made.add_tokens([AddedToken(word, special=word.startswith("<|")) for word in special])
    return made
