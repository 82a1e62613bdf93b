"""What token models' pipelines do with a prompt: which language model reads it, in which template, and which states are kept."""

from dataclasses import dataclass

# Before and after a prompt, as Qwen-Image and Krea 2 were trained with it.
DESCRIBING = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
DESCRIBING_TOKENS = 34  # of what stands before
# What FLUX.2 dev's text encoder is told first, as it was trained.
REASONING = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, object\n"
    "attribution and actions without speculation."
)


@dataclass(frozen=True)
class PromptRule:
    """How a pipeline makes embeddings of prompts with a language model.

    Args:
        models: classes of text encoders that it has.
        layers: the states that it takes, by the number of layers behind them: 0 is the embedding, -1 the last one, which is normed.
        template: what stands before and after a prompt; None for the chat template of the tokenizer, told whether there is `thinking`.
        system: what a processor, rather than a tokenizer, is told first: messages are then in parts, no answer is begun, marks for pictures
            are taken out of prompts, and marks at the ends are the template's alone where it begins with one.
        drop: tokens, all of the template's, whose states are left out. apart: whether what stands after is tokenized by itself.
        padded: whether every prompt is padded and the padding's states are kept; else those of the prompt's own tokens are.
        stacked: whether the states of a token stay a row each, (layers, D); else they lie side by side.
        usual, most: tokens with states that are kept, where nothing is asked for and at most.
    """

    models: tuple[str, ...]
    layers: tuple[int, ...]
    template: tuple[str, str] | None = None
    thinking: bool = False
    system: str = ""
    drop: int = 0
    apart: bool = False
    padded: bool = False
    stacked: bool = False
    usual: int = 512
    most: int = 512


QWEN_IMAGE = PromptRule(
    models=("Qwen2_5_VLForConditionalGeneration",), layers=(-1,), template=DESCRIBING, drop=DESCRIBING_TOKENS, most=1024
)
FLUX2_KLEIN = PromptRule(models=("Qwen3ForCausalLM",), layers=(9, 18, 27), padded=True)
FLUX2_DEV = PromptRule(models=("Mistral3ForConditionalGeneration",), layers=(10, 20, 30), system=REASONING, padded=True)
Z_IMAGE = PromptRule(models=("Qwen3Model", "Qwen3ForCausalLM"), layers=(-2,), thinking=True)
# Its pipeline pads between the prompt and what stands after it, and counts positions without the padding: as if it were cut.
KREA2 = PromptRule(
    models=("Qwen3VLModel", "Qwen3VLForConditionalGeneration"), layers=tuple(range(2, 36, 3)), template=DESCRIBING,
    drop=DESCRIBING_TOKENS, apart=True, stacked=True,
)  # fmt: skip
