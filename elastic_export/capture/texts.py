"""How a folder's prompts become embeddings: its text encoders as graphs, its tokenizers as files, and what a manifest says of them."""

import hashlib

from elastic_export.families import tokens
from elastic_export.families.prompts import PromptRule
from elastic_export.families.tokens import TokenFamily
from elastic_export.foreign import language_models
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.text_encoders import GIVES, kind, read_tokenizer, sizes, text_encoder
from elastic_runtime.contract import manifest
from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.contract.axis import Span
from elastic_runtime.errors import BudgetError, ModelError
from elastic_targets.capture import GraphCapture

MOST_TEXT = 512  # tokens that diffusers' pipelines with T5 take at most
Described = tuple[manifest.Text, dict[str, bytes]]


def described(folder: Folder, family: TokenFamily, config: tokens.Config, encoders: list[str], asked: int | None) -> Described:
    """How prompts become embeddings, of as many tokens as `asked` for, and the tokenizers' files; without encoders, what the transformer
    takes.

    Raises: BudgetError for more tokens than its pipeline takes; ModelError for encoders or tokenizers that do not fit the transformer.
    """
    most = max((rule.most for rule in family.prompts), default=MOST_TEXT)
    if asked is not None and not 1 <= asked <= most:
        raise BudgetError(f"--max-sequence-length is 1 to {most} tokens, got {asked}")
    longest = asked or family.text_length(config)
    if family.prompts and encoders:
        rule = language_models.rule_of(folder, encoders[0], family.prompts)
        return read_by_language_model(folder, rule, encoders, longest, family.text_width(config), family.layers(config))
    return _read_by_clip_and_t5(folder, family, config, encoders, longest)


def graph(folder: Folder, family: TokenFamily, encoder: manifest.TextEncoder, batch: Span) -> GraphCapture:
    """An encoder that a manifest tells of."""
    if family.prompts:
        rule = language_models.rule_of(folder, encoder.graph, family.prompts)
        return language_models.language_model(folder, encoder.graph, rule, encoder.longest, batch, encoder.padding_side)
    return text_encoder(folder, encoder.graph, encoder.max_length, batch)


def read_by_language_model(
    folder: Folder, rule: PromptRule, encoders: list[str], longest: int, width: int, layers: int | None = None
) -> Described:
    """As `rule` says, for a transformer that takes `width` values in a row, and so many `layers` of them a token where they are stacked;
    raises as `described`."""
    if len(encoders) > 1:
        raise ModelError(
            f"{folder.path} has {', '.join(encoders)}, and its pipeline has one text encoder, a {rule.models[0]}: leave them out with "
            "--components transformer,vae, and give embeddings in place of prompts"
        )
    (component,) = encoders
    if (has := language_models.width_of(folder, component, rule)) != width:
        raise ModelError(
            f"{folder.path / component} gives {has} values a token where the transformer takes {width}: is it another model's?"
        )
    if layers not in (None, has := language_models.layers_of(folder, component, rule)):
        raise ModelError(
            f"{folder.path / component} gives {has} states of a token where the transformer takes {layers}: name those that it takes as "
            "text_encoder_select_layers in model_index.json, or is it another model's?"
        )
    tokenizer = read_tokenizer(folder, component)
    around = language_models.template(folder, component, tokenizer, rule)
    marked = not (rule.system and tokenizer.begins(around.before))
    if (least := len(tokenizer.fast(around.before + around.after, add_special_tokens=marked).input_ids) - rule.drop) >= longest:
        raise BudgetError(
            f"--max-sequence-length {longest} leaves no room for a prompt: {tokenizer.path} makes {least} tokens of its template alone"
        )
    path = f"tokenizer/{component}/tokenizer.json"
    run = tokenizer.run(marked)
    entry = FileEntry(path=path, bytes=len(run), sha256=hashlib.sha256(run).hexdigest())
    encoder = manifest.TextEncoder(
        graph=component, tokenizer=entry, max_length=longest, pad_token_id=tokenizer.pad_token_id, gives=language_models.GIVES,
        template=around, padded=rule.padded, padding_side=tokenizer.padding_side if rule.padded else "right",
    )  # fmt: skip
    return manifest.Text(encoders=(encoder,), length=longest, width=width, pooled=0, layers=layers), {path: run}


def _read_by_clip_and_t5(folder: Folder, family: TokenFamily, config: tokens.Config, encoders: list[str], longest: int) -> Described:
    texts, files = [], {}
    beside, after, pooled, kinds = 0, 0, 0, set()
    for component in encoders:
        tokenizer, gives = read_tokenizer(folder, component), GIVES[kind(folder, component)]
        kinds |= set(gives)
        widths = dict(zip(("pooled", "hidden"), sizes(folder, component), strict=True))
        if "last_hidden_state" in gives:
            most = min(longest, tokenizer.max_length)
            after += most
            if widths["hidden"] != family.text_width(config):
                raise ModelError(
                    f"{folder.path / component} gives {widths['hidden']} values a token where the transformer takes "
                    f"{family.text_width(config)}: is it another model's?"
                )
        else:
            most = min(int(folder.component(component).config.get("max_position_embeddings", 77)), tokenizer.max_length)
            beside = max(beside, most if "penultimate_hidden_state" in gives else 0)
            pooled += widths["pooled"]
        path = f"tokenizer/{component}/tokenizer.json"
        files[path] = tokenizer.content
        entry = FileEntry(path=path, bytes=len(tokenizer.content), sha256=hashlib.sha256(tokenizer.content).hexdigest())
        texts.append(
            manifest.TextEncoder(graph=component, tokenizer=entry, max_length=most, pad_token_id=tokenizer.pad_token_id, gives=gives)  # type: ignore[arg-type]
        )
    if encoders and (pooled != tokens.pooled(config) or not kinds & {"penultimate_hidden_state", "last_hidden_state"}):
        raise ModelError(
            f"{folder.path} has {', '.join(encoders)}, which pool to {pooled} values where the transformer takes "
            f"{tokens.pooled(config)}, with {'no ' if len(kinds) < 2 else ''}sequence beside them: one is missing or another "
            "model's. Download the folder again, or leave them out with --components transformer,vae"
        )
    # Without its T5, SD3's pipeline has as many tokens of zeros in its place as it would take from it.
    length = (beside if encoders else family.beside) + (after or longest)
    facts = {"length": length, "width": family.text_width(config), "pooled": tokens.pooled(config), "layers": family.layers(config)}
    return manifest.Text(encoders=tuple(texts), **facts), files  # type: ignore[arg-type]
