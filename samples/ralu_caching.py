"""What step caching saves and what it changes, for every plan of a bundle: reuse and extrapolation against all steps computed.

    python samples/ralu_caching.py BUNDLE --classes 0-9
    python samples/ralu_caching.py BUNDLE --prompt "a red cat" --plans 4x 7x

The same seeds draw each picture with and without it. The error is that of the pictures, in PSNR; the saving is of FLOPs (text
encoders and decoder not counted) and of the time of the steps. Times are shown, not judged: run it on a quiet machine.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from elastic_export.cli.options import integers
from elastic_runtime import Caching, ElasticPipeline, Result
from elastic_runtime.choosing.cost import plan_flops
from elastic_runtime.drawing.plans import takes

KINDS = {"reuse": 0, "extrapolate": 1}


def psnr(picture: np.ndarray, wanted: np.ndarray) -> float:
    """In dB, of values in [0, 1]; infinite for equal ones."""
    error = float(np.mean((picture - wanted) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def rows(pipe: ElasticPipeline, plan: str, interval: int, seed: int, **subject: Any) -> list[tuple[str, ...]]:
    """A row without caching, and one for each kind of it."""
    manifest, (size, steps) = pipe.bundle.manifest, takes(pipe.bundle, plan)
    count = len(subject.get("class_labels") or subject.get("prompt") or ())

    def draw(caching: Caching | None) -> Result:
        generators = [np.random.default_rng([seed, index]) for index in range(count)]
        return pipe(**subject, plan=steps, caching=caching, generator=generators, output_type="np")

    draw(None)  # a first run opens and warms up
    whole = draw(None)
    seconds = sum(step.seconds for step in whole.steps)
    cells = [(plan, "all steps", f"{steps.total}", "1.00", "1.00", "-")]
    for name, order in KINDS.items():
        caching = Caching.every(steps, interval, order)  # type: ignore[arg-type]
        cached = draw(caching)
        computed = steps.total - len(caching.skip)
        faster = seconds / sum(step.seconds for step in cached.steps)
        less = plan_flops(manifest, steps, size) / plan_flops(manifest, steps, size, caching.skip)
        cells.append((plan, name, f"{computed}", f"{less:.2f}", f"{faster:.2f}", f"{psnr(cached.images, whole.images):.1f}"))
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--classes", help="7, 0,3,7 or 0-9")
    what.add_argument("--prompt", nargs="+")
    parser.add_argument("--plans", nargs="+", default=["full", "4x", "7x"])
    parser.add_argument("--interval", type=int, default=2, help="the network runs on every N-th step")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    subject: dict[str, Any] = {"class_labels": integers(options.classes)} if options.classes else {"prompt": options.prompt}
    subject |= {"guidance_scale": options.guidance}
    print("plan, caching, steps computed, times fewer FLOPs, times faster, PSNR dB")
    with ElasticPipeline.from_pretrained(options.bundle) as pipe:
        for plan in options.plans:
            for row in rows(pipe, plan, options.interval, options.seed, **subject):
                print(", ".join(row))
        print(pipe.where)


if __name__ == "__main__":
    main()
