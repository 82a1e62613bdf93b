"""Draw one picture with a bundle of any size, and say what it took: seconds by step, and the most memory that the process held when the
bundle was open, after the last step, and with the decoder.

    python samples/real_size.py BUNDLE --plan 7x --side 512 -o picture.png
    python samples/real_size.py BUNDLE --budgets 64,256 --steps 2

Where the bundle has no text encoders, embeddings are random: with random weights the picture is noise, and the path is the real one. It
uses the runtime alone, without torch.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from elastic_runtime import Budget, Bundle, ElasticPipeline, Request
from elastic_runtime.device.memory import peak_bytes
from record import machine, versions


def embeddings(bundle: Bundle) -> dict[str, Any]:
    """Random embeddings of one prompt, for a model of prompts."""
    text, source = bundle.manifest.model.text, np.random.default_rng(0)
    if text is None:
        return {"class_labels": 1} if bundle.manifest.model.num_classes else {}
    return {
        "prompt_embeds": source.standard_normal((1, text.length, text.width)).astype(np.float32),
        "pooled_prompt_embeds": source.standard_normal((1, text.pooled)).astype(np.float32),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--plan")
    parser.add_argument("--side", type=int, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, help="of plan full, or at each of --budgets")
    parser.add_argument("--budgets", help="values of the bundle's axis, to time steps at each")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--backend")
    parser.add_argument("--precision", help="choose among the bundle's artifacts")
    parser.add_argument("-o", "--output", type=Path, help="a picture; or .npz, which holds what was drawn at each budget, to compare")
    given = parser.parse_args(arguments)
    bundle = Bundle.open(given.bundle)
    begun = time.monotonic()
    with ElasticPipeline.from_pretrained(bundle, given.backend, given.precision or ()) as pipe:
        opened, most = time.monotonic() - begun, [_held()]

        def watch(*_: object) -> dict[str, Any]:
            most.append(_held())
            return {}

        request = Request(
            **embeddings(bundle), plan=given.plan, height=given.side, width=given.side, num_inference_steps=given.steps, seeds=0,
            guidance_scale=given.guidance, output_type="pil" if "decoder" in bundle.manifest.graphs else "latent",
        )  # fmt: skip
        outcome: dict[str, Any] = {"bundle": given.bundle.name, "opened_s": round(opened, 1)}
        drawn: dict[str, np.ndarray] = {}
        if given.budgets:
            axis = bundle.manifest.axes[0].name
            for value in given.budgets.split(","):
                at = msgspec.structs.replace(request, budget=Budget(**{axis: int(value)}))
                result = pipe.draw(at, callback_on_step_end=watch)
                outcome[f"{axis}={value}"] = round(1e3 * statistics.median(record.seconds for record in result.steps))
                drawn[f"{axis}={value}"] = np.asarray(result.images[0], np.float32)
        else:
            result = pipe.draw(request, callback_on_step_end=watch)
            outcome["steps_s"] = [round(record.seconds, 1) for record in result.steps]
            drawn[str(given.plan)] = np.asarray(result.images[0], np.float32)
        outcome["total_s"] = round(time.monotonic() - begun, 1)
        if given.output and given.output.suffix == ".npz":
            np.savez(given.output, **drawn)
        elif given.output:
            result.images[0].save(given.output)
    outcome |= {"opened_gb": most[0], "steps_gb": most[-1], "peak_gb": _held()}
    print(json.dumps(outcome | {"machine": machine(), "versions": versions()}))
    return 0


def _held() -> float:
    """GB that this process held at most so far."""
    return round((peak_bytes() or 0) / 1e9, 2)


if __name__ == "__main__":
    sys.exit(main())
