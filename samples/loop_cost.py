"""What a loop in the graph costs: one ELT graph against graphs unrolled to 1, 4 and 8 loops, in ONNX Runtime.

    python samples/loop_cost.py --width 384 --tokens 256

Weights are random. Both graphs of a pair run in turn, and the fastest of the rounds counts, so that what else the machine does
falls on both.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from elastic_export.capture.capture import capture
from elastic_export.capture.zoo import Model
from elastic_export.exporting import export_capture
from elastic_export.families.elt import FAMILY, Elt, EltParams
from elastic_export.families.layers import randomize
from elastic_runtime import Budget, Span, open_session
from elastic_targets import target
from record import machine, versions

COUNTS = (1, 4, 8)


class Unrolled(nn.Module):
    """The same network with its count of loops written out."""

    def __init__(self, model: Elt, loops: int):
        super().__init__()
        self.model, self.loops = model, loops

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.model.exits(sample, timestep, class_labels, [self.loops])[0]


def unrolled(model: Elt, loops: int, feeds: dict[str, Any], threads: int, folder: Path) -> Any:
    """A session of the unrolled graph."""
    path = folder / f"unrolled-{loops}.onnx"
    example = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Unrolled(model, loops), kwargs=example, dynamo=True, opset_version=23, verbose=False)
    assert program is not None
    program.save(str(path))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def fastest(runs: list[Any], rounds: int) -> list[float]:
    """Milliseconds of each, run in turn."""
    best = [float("inf")] * len(runs)
    for round_ in range(rounds + 2):
        for i, run in enumerate(runs):
            begun = time.perf_counter()
            run()
            if round_ >= 2:  # the first are for the caches
                best[i] = min(best[i], 1e3 * (time.perf_counter() - begun))
    return best


def main(given: argparse.Namespace) -> None:
    side = int(given.tokens**0.5)
    params = EltParams(
        input_size=side, patch_size=1, in_channels=4, hidden_size=given.width, num_heads=given.width // 64 or 1, num_classes=10,
        unique_blocks=given.blocks, loops=max(COUNTS), max_loops=max(COUNTS),
    )  # fmt: skip
    model = Elt(params).eval().requires_grad_(False)
    randomize(model, seed=0)
    what = f"{given.blocks} blocks of width {given.width} on {side**2} tokens, batch 1, {given.threads} threads"
    print(what, machine(), versions("torch", "onnxruntime"), sep=", ")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        captured = capture(Model("elt", FAMILY, params, model, "random"), {}, Span(1, 4))
        bundle = export_capture(captured, "onnx", target("onnx").options(), folder / "bundle", "samples/loop_cost.py")
        with open_session(bundle, threads=given.threads) as session:
            for loops in COUNTS:
                feeds = FAMILY.feeds(params, Budget(loops=loops), 1)
                fixed = {name: array for name, array in feeds.items() if name != "loops"}
                other = unrolled(model, loops, fixed, given.threads, folder)
                a, b = fastest(
                    [lambda feeds=feeds: session.run(feeds), lambda other=other, fixed=fixed: other.run(None, fixed)], given.rounds
                )
                print(f"loops {loops}: loop {a:.2f} ms, unrolled {b:.2f} ms, ratio {a / b:.2f}", flush=True)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--tokens", type=int, default=256, help="a square number")
    options.add_argument("--blocks", type=int, default=2)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--threads", type=int, default=1)
    main(options.parse_args())
