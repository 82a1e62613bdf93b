"""Small random language models and their tokenizer, written as transformers writes them. Import this where that is installed."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, processors
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.utils import logging

from elastic_export.families.prompts import REASONING
from vocabulary import tokenizer as learned

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
WORDS = ("system", "user", "assistant", "a red cat and a dog in the snow, photographed at night")
# As Qwen3's: a turn a message, and thoughts that are begun or left out.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As FLUX.2 dev's: messages in parts, the beginning's mark written out, and no answer begun.
PARTS = (
    "{{ bos_token }}{% for message in messages %}{% set name = {'system': 'SYSTEM_PROMPT', 'user': 'INST'}[message.role] %}[{{ name }}]"
    "{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ name }}]{% endfor %}"
)
MARKS = ("<s>", "<pad>", "[IMG]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
SIZES: dict[str, Any] = {
    "bos_token_id": None, "eos_token_id": None,
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def tokenizer(chat: str = CHAT, *more: str) -> Qwen2Tokenizer:
    """Qwen's own splitting, with words enough that what stands before a prompt is as many tokens as in Qwen's own vocabulary."""
    made = learned([*WORDS, *more], SPECIAL, size=600)
    made.chat_template = chat
    return made


def marked_tokenizer(side: str = "left", chat: str = PARTS) -> PreTrainedTokenizerFast:
    """One that begins each text with a mark, as Mistral's do, and pads on a side."""
    made = tokenizer(CHAT, REASONING)
    made.add_tokens([AddedToken(word, special=True) for word in MARKS])
    inner = made.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", padding_side=side, chat_template=chat, model_max_length=4096
    )


class Processor(ProcessorMixin):  # type: ignore[misc]
    """As much of a PixtralProcessor, which wants torchvision, as reads text."""

    def __init__(self, tokenizer: Any = None, chat_template: Any = None):
        super().__init__(tokenizer, chat_template=chat_template)


def processor(side: str = "left") -> Processor:
    made = marked_tokenizer(side)
    return Processor(made, chat_template=made.chat_template)


def vocabulary() -> int:
    return len(tokenizer())


def qwen25_vl(**changes: Any) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    text = SIZES | {"vocab_size": vocabulary(), "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text | changes, vision_config=vision)).eval()


def mistral(**changes: Any) -> Mistral3ForConditionalGeneration:
    torch.manual_seed(0)
    text = SIZES | {"vocab_size": len(marked_tokenizer()), "head_dim": 8, "model_type": "mistral", "sliding_window": None}
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text | changes, vision_config=vision)).eval()


def qwen3(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"vocab_size": vocabulary(), "head_dim": 8} | changes)).eval()


def qwen3_vl(**changes: Any) -> Qwen3VLModel:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = SIZES | {"vocab_size": vocabulary(), "head_dim": 8, "rope_parameters": rope}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text | changes, vision_config=vision)).eval()


def write(folder: Path, model: Any, chat: str = CHAT, reads: Any = None) -> Path:
    """The text encoder, where there is one, and the tokenizer of a diffusers folder."""
    logging.disable_progress_bar()
    if model is not None:
        model.save_pretrained(folder / "text_encoder")
    (reads or tokenizer(chat)).save_pretrained(folder / "tokenizer")
    return folder
