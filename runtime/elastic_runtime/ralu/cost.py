"""FLOPs of a step and of a plan, as pure functions of a diffusers config and of token counts (2 FLOPs a multiply-add).

Counted: every linear layer, QK^T and AV, modulation and embedders once a step. Not counted: norms, softmax, activations, biases,
text encoders and the VAE. One sample, one branch of guidance.
"""

from collections.abc import Callable, Mapping
from typing import Any

from elastic_runtime.contract.manifest import Model
from elastic_runtime.errors import BundleError, UsageError
from elastic_runtime.ralu.plan import Plan

TIME_FEATURES = 256


def flux_flops(config: Mapping[str, Any], image: int, text: int) -> int:
    """FLOPs of one pass of FLUX over `image` and `text` tokens, from its transformer's config."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    double, single, both = config["num_layers"], config["num_single_layers"], image + text
    conditions = 2 if config["guidance_embeds"] else 1
    macs = (double + single) * (12 * both * width**2 + 2 * both**2 * width)  # both kinds: 4 for attention, 8 for the MLP
    macs += (double * 12 + single * 3 + 2) * width**2
    macs += conditions * _mlp(TIME_FEATURES, width) + _mlp(config["pooled_projection_dim"], width)
    macs += image * (config["in_channels"] + (config["out_channels"] or config["in_channels"])) * width
    return 2 * (macs + text * config["joint_attention_dim"] * width)


def sd3_flops(config: Mapping[str, Any], image: int, text: int) -> int:
    """FLOPs of one pass of SD3 or SD3.5 over `image` and `text` tokens, from its transformer's config."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    layers, both, dual = config["num_layers"], image + text, len(config.get("dual_attention_layers") or ())
    area = config["patch_size"] ** 2
    macs = layers * (12 * both * width**2 + 2 * both**2 * width + 12 * width**2)
    macs -= (9 * text + 4) * width**2  # the last block's text side has no output, no MLP, and shift and scale alone
    macs += dual * (4 * image * width**2 + 2 * image**2 * width + 3 * width**2) + 2 * width**2
    macs += _mlp(TIME_FEATURES, width) + _mlp(config["pooled_projection_dim"], width)
    macs += image * area * (config["in_channels"] + (config["out_channels"] or config["in_channels"])) * width
    return 2 * (macs + text * config["joint_attention_dim"] * config["caption_projection_dim"])


STEP: dict[str, Callable[[Mapping[str, Any], int, int], int]] = {"flux": flux_flops, "sd3": sd3_flops}


def plan_flops(
    family: str, config: Mapping[str, Any], plan: Plan, rows: int, columns: int, text: int, skipped: frozenset[int] = frozenset()
) -> int:
    """FLOPs of all of a plan's steps for a picture of `rows` x `columns` full-resolution tokens; `skipped` steps cost nothing.

    Raises: UsageError for a family that has no such plans.
    """
    if family not in STEP:
        raise UsageError(f"there is no count of FLOPs for {family!r}; there are {', '.join(STEP)}")
    counts = plan.step_tokens(rows, columns)
    return sum(STEP[family](config, image, text) for index, image in enumerate(counts) if index not in skipped)


def picture_flops(model: Model, plan: Plan, size: tuple[int, int], skipped: frozenset[int] = frozenset()) -> int:
    """`plan_flops` of a bundle's model, for a picture of `size` (rows, columns) of full-resolution tokens and the longest text.

    Raises: BundleError for a config that lacks its sizes.
    """
    try:
        return plan_flops(model.family, model.config, plan, *size, model.text.length if model.text else 1, skipped)
    except (KeyError, TypeError) as error:
        raise BundleError(f"the config of {model.name} does not tell what a step costs ({error}): export the bundle again") from None


def _mlp(features: int, width: int) -> int:
    return features * width + width**2
