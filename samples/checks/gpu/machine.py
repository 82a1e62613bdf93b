"""What the machine is, and its ceilings: copying on the device, a large matrix product in each type, one launch.

python machine.py
"""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from functools import partial

import onnxruntime
import torch
from rows import DEVICE, Table, timed

SIDE = 8192  # of the matrix product
FIELDS = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of `work` on the device."""
    for _ in range(3):
        work()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in marks:
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in marks) / 1e3


def main() -> None:
    table = Table("machine")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    table.row(what="versions", cuda=str(torch.version.cuda), cpus=os.cpu_count(), **versions)
    if DEVICE == "cpu":
        print("no GPU: the ceilings are not measured")
        return
    driver = subprocess.run(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    table.row(what="gpu", said=driver.stdout.strip() or driver.stderr.strip(), providers=onnxruntime.get_available_providers())
    source = torch.randn(1 << 30, device="cuda")
    table.row(what="copy", tb_per_s=2 * source.numel() * 4 / seconds(partial(torch.empty_like(source).copy_, source)) / 1e12)
    del source
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(SIDE, SIDE, device="cuda").to(dtype) for _ in range(2))
        table.row(what="product", dtype=str(dtype), tflops=2 * SIDE**3 / seconds(lambda a=a, b=b: a @ b, 8) / 1e12)
    x = torch.zeros(1, device="cuda")
    table.row(what="launch", **timed(lambda: (x.add_(1), torch.cuda.synchronize())))


if __name__ == "__main__":
    main()
