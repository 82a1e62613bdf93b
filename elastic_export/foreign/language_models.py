"""Language models as text encoders: the text half of transformers' Qwen2.5-VL, Qwen3, Qwen3-VL and Mistral 3, as far as the last state
that is kept.

Legend: B batch, N tokens, D width, A values of a head, L states that are kept.
"""

import re
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from elastic_export.families.layers import Constants
from elastic_export.families.prompts import PromptRule
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.reading import read_json, reason
from elastic_export.foreign.text_encoders import Tokenizer, config_of, kind, transformers_class, unfilled
from elastic_export.foreign.weights import Naming
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Template
from elastic_runtime.errors import MissingError, ModelError
from elastic_targets.capture import GraphCapture

GIVES: tuple[Literal["hidden_states"]] = ("hidden_states",)
# Classes of text encoders -> of the half of them that reads text
TEXT_MODELS = {
    "Mistral3ForConditionalGeneration": "MistralModel",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLTextModel",
    "Qwen3ForCausalLM": "Qwen3Model",
    "Qwen3Model": "Qwen3Model",
    "Qwen3VLForConditionalGeneration": "Qwen3VLTextModel",
    "Qwen3VLModel": "Qwen3VLTextModel",
}
MARK = "a red cat"  # a prompt that is found again in its template
# Prompts that a chat template might change or mistake for something else.
AWKWARD = (
    "", " a ", "\na\n\n", "{{ 1 }}", "{}", "<|im_end|>", "<think>a</think>b", "<tool_response>a</tool_response>", "a\r\tb\u200b",
    "a[/INST]",
)  # fmt: skip
PICTURE = "[IMG]"  # Pixtral's mark for a picture, which FLUX.2's pipeline takes out of prompts
LEGACY = "chat_template.json"  # a processor's


class Rotations(Constants):
    """Cosines and sines (1, N, A) of the places 0, 1, ..., in float32. Text has one place on each of the axes along which the models
    that see pictures turn, so for it they turn as plain ones do."""

    def __init__(self, rotary: Any):
        super().__init__()
        self.frequencies = rotary.inv_freq.detach().clone()
        self.scale = float(rotary.attention_scaling)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        angles = places[:, None].float() * self.frequencies  # (N, A/2)
        angles = torch.cat([angles, angles], dim=-1)[None]
        return angles.cos() * self.scale, angles.sin() * self.scale


class Sighted(nn.Module):
    """Attention whose rows give nothing where they see nothing, as torch's own has it and ONNX's operators do not.

    Padding before a prompt sees nothing: `sees` (B, 1, N, 1) tells of each row whether it does. `attention` ends in a projection without
    bias.
    """

    def __init__(self, attention: Any):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, sees: Tensor, **more: Any) -> tuple[Tensor, Any]:
        given, weights = self.attention(hidden_states=hidden_states, attention_mask=attention_mask | ~sees, **more)
        return given * sees[:, 0].to(given.dtype), weights


class LanguageModel(nn.Module):
    """`input_ids (B, N), attention_mask (B, N) -> hidden_states`, float32, (B, N, L*D) or `stacked` (B, N, L, D).

    A token sees those before it and itself, as far as the mask is 1; without a mask all of them. It takes `model` over, whose layers end
    with the last state of `layers`. padded_left: whether the mask may begin with 0, so that some see nothing.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], stacked: bool, padded_left: bool = False):
        super().__init__()
        for layer in model.layers if padded_left else ():
            layer.self_attn = Sighted(layer.self_attn)
        self.model = model
        self.rotations = Rotations(model.rotary_emb)
        model.rotary_emb = nn.Identity()
        self.kept = layers
        self.stacked = stacked
        self.padded_left = padded_left

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.model.embed_tokens(input_ids)  # (B, N, D)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen = (places[:, None] >= places)[None, None]  # (1, 1, N, N)
        if attention_mask is not None:
            seen = seen & (attention_mask[:, None, None] != 0)  # (B, 1, N, N)
        cos, sin = (each.to(hidden.dtype) for each in self.rotations(places))
        states = [hidden]
        more = {"sees": seen.any(dim=-1, keepdim=True)} if self.padded_left else {}  # (B, 1, N, 1)
        for layer in self.model.layers:
            states.append(layer(states[-1], attention_mask=seen, position_embeddings=(cos, sin), **more))
        states[-1] = self.model.norm(states[-1])
        kept = [states[index].float() for index in self.kept]
        return torch.stack(kept, dim=2) if self.stacked else torch.cat(kept, dim=-1)


def rule_of(folder: Folder, component: str, rules: tuple[PromptRule, ...]) -> PromptRule:
    """The rule of the pipeline that has this text encoder; raises ModelError for one that none of them has."""
    name = kind(folder, component, [model for rule in rules for model in rule.models])
    return next(rule for rule in rules if name in rule.models)


def language_model(
    folder: Folder, component: str, rule: PromptRule, length: int, batch: Span, padding_side: Literal["left", "right"] = "right"
) -> GraphCapture:
    """Capture a language model for up to `length` tokens, its template's among them; weights stay on disk until they are used.

    Raises: MissingError without transformers; ModelError for a model or weights that do not fit.
    """
    module = _loaded(folder, component, rule, length, padding_side)
    width, vocabulary = module.model.config.hidden_size, module.model.config.vocab_size
    tokens: int | str = length if rule.padded else "N"
    values = (len(module.kept), width) if rule.stacked else (len(module.kept) * width,)
    names = ("input_ids", "attention_mask")[: 1 + rule.padded]

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        count = length if rule.padded else budget.get("N", length)
        ids = np.random.default_rng(0).integers(0, vocabulary, (size, length), dtype=np.int64)[:, :count]
        ends = np.linspace(length, 1, size).round().astype(np.int64)  # every row is padded further, the last one as far as can be
        real = (np.arange(count) < ends[:, None]).astype(np.int64)
        return dict(zip(names, (ids, real[:, ::-1].copy() if padding_side == "left" else real), strict=False))

    return GraphCapture(
        name=component,
        module=module,
        inputs=tuple(TensorSpec(name=name, dtype="int64", shape=("B", tokens)) for name in names),
        outputs=(TensorSpec(name=GIVES[0], dtype="float32", shape=("B", tokens, *values)),),
        axes=(),
        batch=batch,
        feeds=feeds,
        open_dimensions={} if rule.padded else {"N": Span(1, length)},
        stages=() if rule.padded else tuple(Budget(N=count) for count in sorted({min(128, length), length})),
    )


def width_of(folder: Folder, component: str, rule: PromptRule) -> int:
    """Values in a row of what a language model gives."""
    config = _text_config(folder, component, rule)
    states = len(_layers(folder, component, rule, config))
    return int(config.hidden_size) * (1 if rule.stacked else states)


def layers_of(folder: Folder, component: str, rule: PromptRule) -> int:
    """How many of its states are kept for a token."""
    return len(_layers(folder, component, rule, _text_config(folder, component, rule)))


def _text_config(folder: Folder, component: str, rule: PromptRule) -> Any:
    return config_of(folder, component, rule.models).get_text_config()


def _layers(folder: Folder, component: str, rule: PromptRule, config: Any) -> tuple[int, ...]:
    """The layers behind each state that is kept, counted from 0; raises ModelError for those that there are not."""
    most, wanted = config.num_hidden_layers, folder.layers or rule.layers
    if strange := [index for index in wanted if not isinstance(index, int) or not -most - 1 <= index <= most]:
        raise ModelError(f"{folder.path / component} has {most} layers, and its pipeline takes the state after layer {strange[0]!r}")
    return tuple(index % (most + 1) for index in wanted)


def built(folder: Folder, component: str, rule: PromptRule) -> Any:
    """A language model without its weights, down to the last of its states that is kept."""
    config, files = _text_config(folder, component, rule), folder.component(component)
    last, every = max(_layers(folder, component, rule, config)), config.num_hidden_layers
    config._attn_implementation = "sdpa"  # not what is fastest where it is exported
    name = TEXT_MODELS[kind(folder, component, rule.models)]
    if not isinstance(config, wanted := transformers_class(name).config_class):
        raise ModelError(
            f"{files.path / 'config.json'}: its text half is a {config.model_type}, and {rule.models[0]} is read with a "
            f"{wanted.model_type}: leave it out with --components transformer,vae, and give embeddings in place of prompts"
        )

    def make() -> Any:
        model = unfilled(lambda: transformers_class(name)(config))
        model.layers = model.layers[:last]
        if last < every:
            model.norm = nn.Identity()  # of the state after all layers alone
        return model

    return files.described(make, name)


def _loaded(folder: Folder, component: str, rule: PromptRule, length: int, padding_side: str) -> LanguageModel:
    files, model = folder.component(component), built(folder, component, rule)
    config, name = model.config, type(model).__name__
    layers = _layers(folder, component, rule, config)
    last, every = max(layers), config.num_hidden_layers
    sliding = ["sliding_attention"] * last if getattr(config, "sliding_window", None) else ()  # Mistral's, which tells no types
    for index, kept in enumerate(getattr(config, "layer_types", None) or sliding):
        if index < last and kept != "full_attention" and not (config.sliding_window or 0) >= length:
            raise ModelError(
                f"{files.path / 'config.json'}: layer {index} has {kept} over {config.sliding_window} tokens, fewer than the {length} that "
                "a prompt may have, which is not supported: give embeddings (--components transformer,vae)"
            )
    if (turning := getattr(model.rotary_emb, "rope_type", "default")) in ("dynamic", "longrope"):
        raise ModelError(
            f"{files.path / 'config.json'}: rope_type {turning!r} turns by a prompt's length, which is not supported: give embeddings "
            "(--components transformer,vae)"
        )
    beyond = "|".join(map(str, range(last, every)))
    unused = "" if last == every else rf"|layers\.(?:{beyond})\.|norm\."
    naming = Naming(
        lambda name: re.sub(r"^(?:model\.|language_model\.)+", "", name),
        re.compile(rf"visual\.|vision_tower\.|multi_modal_projector\.|lm_head\.{unused}"),
    )
    module = LanguageModel(files.fill(model, naming, name), layers, rule.stacked, rule.padded and padding_side == "left")
    return module.eval().requires_grad_(False)


def template(folder: Folder, component: str, tokenizer: Tokenizer, rule: PromptRule) -> Template:
    """What stands around a prompt.

    Raises: ModelError for a chat template that there is not, or that does more than to stand around a prompt, and for a tokenizer that
        cuts the template into another number of tokens than its pipeline leaves out, or that pads on the left.
    """
    path = tokenizer.path
    if rule.template is None:
        before, after = _chat(tokenizer, rule)
    else:
        before, after = rule.template
    if rule.drop and (count := len(tokenizer.fast(before).input_ids)) != rule.drop:
        raise ModelError(
            f"{path} makes {count} tokens of what stands before a prompt, and the pipeline leaves out {rule.drop}: is it another model's?"
        )
    if getattr(tokenizer.fast, "split_special_tokens", False):
        raise ModelError(f"{path} splits special tokens (split_special_tokens), of which templates are made: take that out of its config")
    if rule.padded and not rule.system and tokenizer.padding_side != "right":
        raise ModelError(
            f"{path} pads on the left (padding_side), and the pipeline of {folder.path.name} takes the padding's states, which is known of "
            "padding on the right alone: is it another model's?"
        )
    return Template(before=before, after=after, drop=rule.drop, apart=rule.apart, without=(PICTURE,) if rule.system else ())


def _chat(tokenizer: Tokenizer, rule: PromptRule) -> tuple[str, str]:
    """What the tokenizer's own chat template puts before and after what a user says."""

    legacy = tokenizer.path / LEGACY
    own = {"chat_template": read_json(legacy).get("chat_template")} if rule.system and legacy.is_file() else {}

    def rendered(prompt: str) -> str:
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        asked: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": rule.thinking}
        if rule.system:
            parts = {"system": rule.system, "user": prompt}
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts.items()]
            asked = {"add_generation_prompt": False} | own
        try:
            text: str = tokenizer.fast.apply_chat_template(messages, tokenize=False, **asked)
        except ImportError as error:
            raise MissingError(f"chat templates need jinja2 ({error}): pip install 'elastic-export[torch,flux]'") from error
        except Exception as error:  # whatever a template raises
            raise ModelError(f"{tokenizer.path} has no chat template that can be used: {reason(error)}") from None
        return text

    before, mark, after = rendered(MARK).partition(MARK)
    for prompt in AWKWARD:
        if not mark or (made := rendered(prompt)) != before + prompt + after:
            raise ModelError(
                f"{tokenizer.path}: its chat template does not only stand around a prompt: of {prompt!r} it makes "
                f"{(made if mark else before)[-80:]!r}, and a bundle holds what comes before and after. Give embeddings "
                "(--components transformer,vae)"
            )
    return before, after
