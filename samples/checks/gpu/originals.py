"""What a bundle is compared with: the same models in torch on the GPU, eager or compiled, with and without CUDA graphs, by budget.

    python originals.py [--compiled] PRESET...         (CHECK_DEVICE=cpu tries it without a GPU)

Weights are random and made on the device: only times are told. float32 is float32, not TF32.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rows import DEVICE, Table, left, timed
from torch import Tensor, nn

from elastic_export.capture.zoo import FAMILIES
from elastic_export.families.family import Family
from elastic_export.families.layers import sincos_2d
from elastic_runtime.contract.budget import Budget, key

BATCHES = (1, 2, 16)


@dataclass
class Original:
    """A preset's module on the device, with random weights."""

    name: str
    family: Family
    params: Any
    module: nn.Module

    @classmethod
    def build(cls, name: str) -> "Original":
        family = next(family for family in FAMILIES.values() if name in family.presets)
        params = family.presets[name]
        with torch.device("meta"):
            module = family.build(params)
        module = module.to_empty(device=DEVICE).eval().requires_grad_(False)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
        for buffer in module.buffers():
            if buffer.shape[-2:] == (params.tokens, params.hidden_size):
                buffer.copy_(sincos_2d(params.hidden_size, params.grid))
        return cls(name, family, params, module)

    def inputs(self, budget: Budget, batch: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(DEVICE) for name, array in self.family.feeds(self.params, budget, batch).items()}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def captured(model: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], None]:
    """A CUDA graph of one run; what is returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(**inputs)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def measure(table: Table, original: Original, dtype: torch.dtype, batch: int, budget: Budget, compiled: bool) -> None:
    inputs = original.inputs(budget, batch)
    model = torch.compile(original.module, dynamic=True) if compiled else original.module
    facts = {"model": original.name, "way": "compiled" if compiled else "eager", "dtype": str(dtype).removeprefix("torch.")}
    facts |= {"budget": key(budget), "batch": str(batch)}
    flops = original.family.cost(original.params, budget, 1).flops * batch
    begun = time.perf_counter()
    if not torch.isfinite(model(**inputs)).all():
        table.row(**facts, failed="the answer is not finite")
        return
    facts["first_s"] = f"{time.perf_counter() - begun:.2f}"
    plain = timed(lambda: (model(**inputs), synchronize()))
    table.row(**facts, graph=False, **plain, tflops=flops / plain["ms"] / 1e9)
    if DEVICE == "cuda":
        replayed = timed(captured(model, inputs))
        table.row(**facts, graph=True, **replayed, tflops=flops / replayed["ms"] / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--compiled", action="store_true", help="in bfloat16 alone: a compilation takes a minute")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    table = Table("originals-compiled" if options.compiled else "originals")
    dtypes = (torch.bfloat16,) if options.compiled else (torch.bfloat16, torch.float16, torch.float32)
    for name in options.presets:
        original = Original.build(name)
        axis = original.family.axes(original.params)[0]
        for dtype in dtypes:
            original.module = original.module.to(dtype)
            for batch in BATCHES if not options.compiled else BATCHES[1:]:
                for value in axis.doublings():
                    if left() < 15:
                        print("no time is left")
                        return
                    measure(table, original, dtype, batch, Budget(**{axis.name: value}), options.compiled)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
