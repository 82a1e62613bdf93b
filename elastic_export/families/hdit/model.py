"""HDiT: an hourglass of transformer levels, local attention outside and global inside (arXiv 2401.11605, ICML 2024; k-diffusion's
`image_transformer_v2`).

Legend: B batch, C channels, n tokens of a level's grid h x w in raster order, W its width, M condition width. Lists are by level, the
outermost first, the innermost last. It has no elastic axis.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor, nn

from elastic_export.families.bricks import attention
from elastic_export.families.family import Family, demand, priced, sample_feeds, sample_inputs, sample_outputs
from elastic_export.families.hdit.cells import Cells, gathered, spread
from elastic_export.families.hdit.layers import AxialRope, Condition, Fourier, Layer, Linear, Merge, Norm, Split
from elastic_export.families.layers import initialize
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.schedule import Edm
from elastic_runtime.errors import ModelError

# type of attention -> what it must be told besides the width of its heads
ATTENTIONS = {"global": (), "neighborhood": ("kernel_size",), "shifted-window": ("window_size",), "none": ()}
LISTS = ("input_size", "patch_size", "depths", "widths", "d_ffs", "self_attns")


@dataclass(frozen=True)
class HditParams:
    """Sizes of one HDiT under the names of its public configs; lists are by level, the outermost first.

    `num_classes` has no null label, which the table has beside; 0: no table. sigma_data, sigma_min and sigma_max are those of its training.
    """

    input_channels: int
    input_size: tuple[int, int]
    patch_size: tuple[int, int]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    d_ffs: tuple[int, ...]
    self_attns: tuple[Mapping[str, Any], ...]
    mapping_depth: int
    mapping_width: int
    mapping_d_ff: int
    num_classes: int = 0
    sigma_data: float = 1.0
    sigma_min: float = 0.01
    sigma_max: float = 160.0

    def __post_init__(self) -> None:
        for name in LISTS:
            value = getattr(self, name)
            whole = isinstance(value, list | tuple) and all(type(each) is (dict if name == "self_attns" else int) for each in value)
            if not whole or len(value) != (2 if name in LISTS[:2] else len(self.depths)):
                what = (
                    "two whole numbers" if name in LISTS[:2] else f"{'objects' if name == 'self_attns' else 'whole numbers'}, one a level"
                )
                raise ValueError(f"{name} must be a list of {what}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("input_channels", *LISTS[:-1], "mapping_width", "mapping_d_ff"):
            if min(np.atleast_1d(getattr(self, name)), default=0) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mapping_depth < 0 or self.num_classes < 0 or self.mapping_width % 2:
            raise ValueError("mapping_depth and num_classes must be 0 or more, and mapping_width even")
        unit = [size * 2 ** (len(self.depths) - 1) for size in self.patch_size]
        if any(side % each for side, each in zip(self.input_size, unit, strict=True)):
            raise ValueError(f"input_size {list(self.input_size)} must be multiples of {unit}: patches, halved at each of the inner levels")
        for level, settings in enumerate(self.self_attns):
            self._check(level, settings)
        _ = self.schedule  # which checks itself

    def _check(self, level: int, each: Mapping[str, Any]) -> None:
        kind, (h, w), width = each.get("type"), self.grid(level), self.widths[level]
        if kind not in ATTENTIONS:
            raise ValueError(f"self_attns[{level}] has type {kind!r}; it is one of {', '.join(ATTENTIONS)}")
        wanted = () if kind == "none" else ("d_head", *ATTENTIONS[kind])
        if set(each) != {"type", *wanted} or not all(type(each[name]) is int and each[name] > 0 for name in wanted):
            raise ValueError(f"self_attns[{level}] of type {kind} takes {' and '.join(wanted) or 'nothing else'}, whole, got {dict(each)}")
        if wanted and (width % each["d_head"] or each["d_head"] % 8):
            raise ValueError(f"d_head {each['d_head']} of level {level} must divide its width {width}, and be a multiple of 8")
        if kind == "neighborhood" and each["kernel_size"] > min(h, w):
            raise ValueError(f"kernel_size {each['kernel_size']} is larger than the {h}x{w} grid of level {level}")
        if kind == "shifted-window" and (h % each["window_size"] or w % each["window_size"] or each["window_size"] % 2):
            raise ValueError(f"window_size {each['window_size']} must be even and divide the {h}x{w} grid of level {level}")

    def grid(self, level: int) -> tuple[int, int]:
        """Rows and columns of a level's tokens."""
        h, w = (side // size // 2**level for side, size in zip(self.input_size, self.patch_size, strict=True))
        return h, w

    def tokens(self, level: int) -> int:
        return math.prod(self.grid(level))

    def size(self, level: int) -> int:
        """Side of a neighbourhood or a window, 0 where there is none."""
        settings = self.self_attns[level]
        return next((settings[name] for name in ATTENTIONS[settings["type"]]), 0)

    def keys(self, level: int) -> int:
        """Tokens that one attends to."""
        return {"global": self.tokens(level), "none": 0}.get(self.self_attns[level]["type"], self.size(level) ** 2)

    def heads(self, level: int) -> int:
        return self.widths[level] // self.self_attns[level].get("d_head", self.widths[level])

    @property
    def innermost(self) -> int:
        """The number of the last level."""
        return len(self.depths) - 1

    @property
    def patch_values(self) -> int:
        return math.prod(self.patch_size) * self.input_channels

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.input_channels, *self.input_size

    @property
    def schedule(self) -> Edm:
        return Edm(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data)


def cells(params: HditParams, level: int) -> nn.ModuleList:
    """Which tokens of a level see each other, in its even layers and in its odd ones."""
    settings, grid = params.self_attns[level], params.grid(level)
    size, heads = params.size(level), params.heads(level)
    if settings["type"] != "shifted-window":
        return nn.ModuleList([Cells(grid, settings["type"], size)] * 2)
    return nn.ModuleList(Cells(grid, settings["type"], size, heads, shifted) for shifted in (False, True))


class Hdit(nn.Module):
    """HDiT denoiser: `(sample, timestep, class_labels) -> F` of EDM's preconditioning, or without `class_labels`; `timestep` is sigma.

    Names are those of the public code.
    """

    def __init__(self, params: HditParams):
        super().__init__()
        self.params = params
        condition, widths = params.mapping_width, params.widths
        outer = range(params.innermost)
        self.patch_in = Linear(params.patch_values, widths[0])
        self.time_emb = Fourier(condition)
        self.time_in_proj = nn.Linear(condition, condition, bias=False)
        self.aug_in_proj = nn.Linear(condition, condition, bias=False)
        self.class_emb = nn.Embedding(params.num_classes + 1, condition) if params.num_classes else None
        self.mapping = Condition(condition, params.mapping_d_ff, params.mapping_depth)
        self.down_levels = nn.ModuleList(self.layers(level) for level in outer)
        self.mid_level = self.layers(params.innermost)
        self.up_levels = nn.ModuleList(self.layers(level) for level in outer)
        self.merges = nn.ModuleList(Merge(widths[level], widths[level + 1]) for level in outer)
        self.splits = nn.ModuleList(Split(widths[level], widths[level + 1]) for level in outer)
        self.out_norm = Norm(widths[0])
        self.patch_out = Linear(widths[0], params.patch_values)
        self.cells = nn.ModuleList(cells(params, level) for level in range(params.innermost + 1))
        # What makes angles stays in float32 where the rest is held in fewer bits.
        self.exact = tuple(name for name, part in self.named_modules() if isinstance(part, Fourier | AxialRope))
        initialize(self, zero=())

    def layers(self, level: int) -> nn.ModuleList:
        params = self.params
        head = params.self_attns[level].get("d_head")
        sizes = (params.widths[level], params.d_ffs[level], params.mapping_width, head)
        return nn.ModuleList(Layer(*sizes) for _ in range(params.depths[level]))

    def condition(self, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """What every layer is told (B, M): sigma, that no augmentation was done, and the class."""
        cond = self.time_in_proj(self.time_emb(timestep.float().log() / 4).to(self.time_in_proj.weight.dtype))
        # The public code embeds nine zeros, of which the cosines are 1 and the sines 0 whatever its weights are.
        cond = cond + self.aug_in_proj.weight[:, : self.params.mapping_width // 2].sum(dim=1)
        if self.class_emb is not None:
            cond = cond + self.class_emb(class_labels)
        return self.mapping(cond)

    def run(self, layers: Any, x: Tensor, cond: Tensor, cells: Any, first: int = 0) -> Tensor:
        """Some layers of a level in order; `cells` are its tables, and `first` numbers the first layer: odd ones have shifted windows."""
        for number, layer in enumerate(layers, start=first):
            x = layer(x, cond, cells[number % 2])
        return x  # (B, n, W)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict F, of which the picture is `c_skip x + c_out F`.

        Shapes: sample (B, C, H, W), EDM's c_in times x; timestep (B,), sigma; class_labels (B,) int64, `num_classes` for no label, and none
        where the model has no table.
        """
        cond = self.condition(timestep, class_labels)  # (B, M)
        x, kept = self.down(sample, cond)
        x = self.run(self.mid_level, x, cond, self.cells[self.params.innermost])
        return self.up(x, kept, cond)

    def down(self, sample: Tensor, cond: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All before the innermost level: its tokens (B, n, W), and those that each outer level keeps for `up`."""
        params, kept = self.params, []
        _, height, width = params.sample_shape
        pixels = sample.to(cond.dtype).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        x = self.patch_in(gathered(pixels, (height, width), params.patch_size))  # (B, n, W)
        for level in range(params.innermost):
            x = self.run(self.down_levels[level], x, cond, self.cells[level])
            kept.append(x)
            x = self.merges[level](x, params.grid(level))
        return x, kept

    def up(self, x: Tensor, kept: list[Tensor], cond: Tensor) -> Tensor:
        """All after the innermost level: F, of its tokens and what `down` kept."""
        params = self.params
        _, height, width = params.sample_shape
        for level in reversed(range(params.innermost)):
            x = self.splits[level](x, kept[level], params.grid(level))
            x = self.run(self.up_levels[level], x, cond, self.cells[level], first=params.depths[level])
        pixels = spread(self.patch_out(self.out_norm(x)), (height, width), params.patch_size)  # (B, H*W, C)
        return pixels.unflatten(1, (height, width)).permute(0, 3, 1, 2).float()  # (B, C, H, W)


def _flowers(kind: Mapping[str, Any]) -> HditParams:
    return HditParams(
        input_channels=3, input_size=(256, 256), patch_size=(4, 4), depths=(2, 2, 4), widths=(128, 256, 512), d_ffs=(384, 768, 1536),
        self_attns=({"d_head": 64, **kind}, {"d_head": 64, **kind}, {"type": "global", "d_head": 64}), mapping_depth=2, mapping_width=256,
        mapping_d_ff=768, sigma_data=0.5,
    )  # fmt: skip


PRESETS = {
    "hdit-oxford-flowers": _flowers({"type": "neighborhood", "kernel_size": 7}),
    "hdit-oxford-flowers-shifted-window": _flowers({"type": "shifted-window", "window_size": 8}),
}


def rename_key(key: str) -> str | None:
    """The module has the names of the public checkpoints, which are bare state dicts; the weights of the augmentation's Fourier features
    say nothing where nothing was augmented."""
    return None if key == "aug_emb.weight" else key


def sources(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of HditParams that a public checkpoint tells: widths and depths by its shapes, and all of them by the config beside, if there
    is one.

    Raises: ModelError for a checkpoint that is no HDiT, or one of a kind that this file does not implement.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    needed = ("patch_in.proj.weight", "time_in_proj.weight", "mid_level.0.ff.up_proj.weight", "patch_out.proj.weight")
    demand("an HDiT", shapes, dict.fromkeys(needed, 2))
    if "mapping_cond_in_proj.weight" in shapes:
        raise ModelError("this HDiT is conditioned on more than classes (mapping_cond_in_proj), which hdit is not: it cannot be exported")
    if any(name.startswith("input_token_editor.") for name in shapes):
        raise ModelError("this HDiT has an elastic interface (input_token_editor), and hdit has none: export it as elit-hdit-levels")
    levels = [*(f"down_levels.{level}" for level in range(_count(shapes, r"down_levels\.(\d+)\."))), "mid_level"]
    ups = [shapes.get(f"{level}.0.ff.up_proj.weight", ()) for level in levels]
    if any(len(up) != 2 for up in ups):
        raise ModelError("this is not an HDiT checkpoint: a level of it has no ff.up_proj.weight of two dimensions")
    sizes = {
        "depths": tuple(_count(shapes, rf"{level}\.(\d+)\.") for level in levels),
        "widths": tuple(up[1] for up in ups),
        "d_ffs": tuple(up[0] // 2 for up in ups),
        "mapping_depth": _count(shapes, r"mapping\.blocks\.(\d+)\."),
        "mapping_width": shapes["time_in_proj.weight"][0],
        "num_classes": max(shapes.get("class_emb.weight", (1,))[0] - 1, 0),
    }
    if block := shapes.get("mapping.blocks.0.down_proj.weight"):
        sizes["mapping_d_ff"] = block[-1]
    model, names = args.get("model"), {field.name for field in fields(HditParams)}
    words = {name: value for name, value in model.items() if name in names and value is not None} if isinstance(model, Mapping) else {}
    return {"the checkpoint's shapes": sizes, "the checkpoint's config": words}


def _count(names: Iterable[str], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def feeds(params: HditParams, budget: Budget, batch: int) -> dict[str, np.ndarray]:
    """Noise, sigmas between the ends on a logarithmic scale, and labels where there are classes."""
    arrays = sample_feeds(params.sample_shape, params.num_classes, batch)
    low, high = math.log(params.sigma_min), math.log(params.sigma_max)
    return arrays | {"timestep": np.exp(low + (high - low) * arrays["timestep"]).astype(np.float32)}


def layer_flops(params: HditParams, level: int, tokens: int, keys: int) -> int:
    """FLOPs of a layer of a level on so many tokens, each of which attends to `keys`."""
    width, condition = params.widths[level], params.mapping_width
    feed_forward = condition * width + 3 * tokens * width * params.d_ffs[level]
    if params.self_attns[level]["type"] == "none":
        return 2 * feed_forward
    return 2 * (feed_forward + condition * width + 4 * tokens * width**2) + attention(tokens, keys, width)


def end_flops(params: HditParams) -> int:
    """FLOPs of all but the innermost level: patches, the condition, the outer levels, merges and splits."""
    condition = 2 * params.mapping_width**2 + params.mapping_depth * 3 * params.mapping_width * params.mapping_d_ff
    total = 2 * (2 * params.tokens(0) * params.patch_values * params.widths[0] + condition)
    for level in range(params.innermost):
        layer = layer_flops(params, level, params.tokens(level), params.keys(level))
        between = 2 * 2 * params.tokens(level + 1) * 4 * params.widths[level] * params.widths[level + 1]
        total += 2 * params.depths[level] * layer + between
    return total


def flops(params: HditParams) -> int:
    """FLOPs of one forward pass at batch 1 as k-diffusion counts them, local attention by the tokens that are seen. Where a mask stands for
    a neighbourhood more is multiplied: all tokens with each other."""
    level = params.innermost
    return end_flops(params) + params.depths[level] * layer_flops(params, level, params.tokens(level), params.keys(level))


def level_values(params: HditParams, level: int, tokens: int) -> int:
    """Most values alive at once in a layer of a level: the tokens, their normalised copy, and the larger of the feed-forward's hidden layer
    and attention's q, k, v, output and scores, dense where a mask stands for a neighbourhood."""
    width, kind = params.widths[level], params.self_attns[level]["type"]
    scores = 0 if kind == "none" else params.heads(level) * tokens * (params.keys(level) if kind == "shifted-window" else tokens)
    return 2 * tokens * width + max(3 * tokens * params.d_ffs[level], 4 * tokens * width + scores)


def waiting_values(params: HditParams, level: int) -> int:
    """Values that wait outside while a level runs."""
    return sum(params.tokens(outer) * params.widths[outer] for outer in range(level))


def activation_values(params: HditParams) -> int:
    """Most values alive at once in a forward pass at batch 1."""
    levels = range(params.innermost + 1)
    return max(level_values(params, level, params.tokens(level)) + waiting_values(params, level) for level in levels)


def cost(params: HditParams, budget: Budget, weights: int) -> Cost:
    """Cost of one sample's forward pass; `weights` is the number of parameters."""
    return priced(budget, flops(params), weights, activation_values(params))


def facts(params: HditParams) -> dict[str, Any]:
    return {
        "prediction": "edm",
        "schedule": params.schedule,
        "sample_shape": params.sample_shape,
        "num_classes": params.num_classes,
        "null_label": params.num_classes,
    }


FAMILY = Family(
    name="hdit", params=HditParams, build=Hdit, presets=PRESETS, rename_key=rename_key, sources=sources, assumed=lambda known: {},
    axes=lambda params: (), inputs=lambda params: sample_inputs(params.sample_shape, bool(params.num_classes)),
    outputs=lambda params: sample_outputs(params.sample_shape), feeds=feeds, cost=cost, facts=facts, yields=("num_classes",),
)  # fmt: skip
