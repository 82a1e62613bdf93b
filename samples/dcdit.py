"""What only training needs of a DC-DiT: how it starts, from nothing or from a plain DiT, and the pass that its router learns from."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from elastic_export.families.dc_dit.chunk import count, float32, natural
from elastic_export.families.dc_dit.model import DcDit, DcDitParams, rename_key
from elastic_runtime.errors import ModelError


def untrained(params: DcDitParams) -> DcDit:
    """A DC-DiT to train: what `DcDit` starts with, and a router that says 0.25 of every token, the share that the paper aims for."""
    model = DcDit(params)
    last = model.router.residual_scorer[-1]
    nn.init.constant_(last.bias, -1.1)  # type: ignore[arg-type]
    return model


def upcycle(params: DcDitParams, dit: Mapping[str, Tensor]) -> tuple[DcDit, tuple[str, ...]]:
    """An untrained DC-DiT whose core is a plain DiT's, and the names of the weights that came from there (arXiv 2603.06351, section 4.4).

    `dit` is a checkpoint in DiT's public format, of this width, with blocks and embedders as they are there; those of time and label
    are taken too. The convolutions around the core, the router and the final layer, whose widths are others, start afresh.

    Raises: ModelError where the DiT has other blocks or another width.
    """
    model = untrained(params)
    core = {name: value for name, value in model.state_dict().items() if name.startswith(("blocks.", "t_embedder.", "y_embedder."))}
    given = {rename_key(key): value for key, value in dit.items()}
    if missing := [name for name in core if name not in given]:
        raise ModelError(f"the DiT to upcycle lacks {missing[0]} and {len(missing) - 1} more: it needs at least {params.depth} blocks")
    if (blocks := _blocks(given)) != params.depth:
        raise ModelError(f"the DiT to upcycle has {blocks} blocks, the DC-DiT's core {params.depth}")
    for name, value in core.items():
        if given[name].shape != value.shape:
            raise ModelError(f"the DiT to upcycle has {name} of shape {tuple(given[name].shape)}, the DC-DiT {tuple(value.shape)}")
    model.load_state_dict({name: given[name].float() for name in core}, strict=False)
    return model, tuple(core)


def learn(model: DcDit, sample: Tensor, timestep: Tensor, class_labels: Tensor, drop_fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The prediction with no cap, the router's probabilities (B, T) and what it keeps by itself (B, T).

    A factor of 1 on the de-chunked tokens passes their gradient to the probability of the decision taken (straight-through).
    """
    x, c, p = model.encode(sample, timestep, class_labels)
    kept = count(p, drop_fraction)
    slots = torch.arange(int(kept.max()))
    tokens, positions = model.through_core(x, c, p, kept, slots)
    taken = torch.zeros_like(p).scatter(1, positions, (slots < kept[:, None]).to(p.dtype)).bool()
    decision = torch.where(taken, p, 1 - p)
    tokens = tokens * (1 + decision - decision.detach())[:, :, None]
    return model.decode(tokens + float32(model.residual_proj, x), c), p, natural(p)


def _blocks(names: Iterable[str | None]) -> int:
    return len({match[1] for name in names if name and (match := re.match(r"blocks\.(\d+)\.", name))})
