"""The loop under every training recipe here: AdamW, EMA, bf16 where it pays, a resumable checkpoint, a log of one JSON line per entry.

A run ends with two files: the EMA weights, and beside them the JSON record that `evaluate.py` completes.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from digits import Digits, load_digits
from record import machine, versions, write

# loss(model, images (B, 1, 32, 32), labels (B,), progress in [0, 1)) -> scalar; `model` may be compiled
Loss = Callable[[Callable[..., Tensor], Tensor, Tensor, float], Tensor]


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The options that all recipes share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--run", type=Path, required=True, help="folder of checkpoint and log; an interrupted run goes on from it")
    options.add_argument("--steps", type=int, default=steps)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--lr", type=float, default=1e-3, help="peak rate; 2 percent warm-up, linear decay over the last quarter")
    options.add_argument("--ema", type=float, default=0.999)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    options.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=has_bf16(), help="bfloat16 autocast: ten times slower where it is emulated"
    )
    options.add_argument("--compile", action="store_true", help="torch.compile the model: about a fifth faster, a minute to start")
    options.add_argument("--output", type=Path, help="write the EMA weights here as float16 safetensors when done")
    return options


def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return any(bool(there) for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up, plateau, decay. The plateau lets a resumed run change its length."""
    return min(1.0, (step + 1) / max(1, steps // 50), (steps - step) / max(1, steps // 4))


def drop_labels(labels: Tensor, null_label: int, probability: float = 0.1) -> Tensor:
    """Replace labels by the null label, so that one model learns both branches of classifier-free guidance."""
    return torch.where(torch.rand(labels.shape) < probability, null_label, labels)


def save_atomically(state: object, path: Path) -> None:
    """Write beside `path`, then take its place: a kill leaves the old checkpoint whole."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(
    build: Callable[[], nn.Module], loss: Loss, options: argparse.Namespace, about: dict[str, Any], data: Digits | None = None
) -> nn.Module:
    """Train what `build` makes, resuming from `options.run`; return its EMA copy.

    The EMA goes to `options.output` if given; the record beside it then holds `about` (family and config) and what the
    training took, and no longer the figures of older weights.

    Raises: SystemExit for a checkpoint of another model, and where the loss is no longer finite; the checkpoint stays.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # before the weights are drawn
    model = build()
    digits = data or load_digits()[0]
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, fused=True)
    options.run.mkdir(parents=True, exist_ok=True)
    checkpoint, log = options.run / "checkpoint.pt", options.run / "log.jsonl"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise SystemExit(f"{checkpoint} is of another model ({str(error).splitlines()[0]}): give another --run folder") from None
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first, seconds = state["step"], state["seconds"]
    callee = torch.compile(model, dynamic=True) if options.compile else model
    start, losses = time.perf_counter(), []
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate(step, options.steps)
        batch = torch.randint(0, len(images), (options.batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            value = loss(callee, images[batch], labels[batch], step / options.steps)
        losses.append(value.item())
        if not np.isfinite(losses[-1]):
            raise SystemExit(f"the loss of step {step} is {losses[-1]}: go on from {checkpoint} with a smaller --lr than {options.lr}")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(options.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            elapsed = seconds + time.perf_counter() - start
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(state | {"rng": torch.get_rng_state(), "step": step + 1, "seconds": elapsed}, checkpoint)
            entry = {"step": step + 1, "loss": float(np.mean(losses)), "hours": round(elapsed / 3600, 4)}
            with log.open("a") as lines:
                lines.write(json.dumps(entry | {"threads": options.threads, "machine": machine()}) + "\n")
            print(entry, flush=True)
            losses.clear()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in ema.state_dict().items()}, options.output)
        took = json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) | {"machine": machine(), "versions": versions("torch")}
        chosen = {name: getattr(options, name) for name in ("batch", "lr", "ema", "seed", "bf16", "compile")}
        write(options.output.with_suffix(".json"), about | {"quality": [], "training": took | chosen | {"digits": len(images)}})
        print(f"wrote {options.output} ({options.output.stat().st_size / 1e6:.2f} MB) and its record")
    return ema
