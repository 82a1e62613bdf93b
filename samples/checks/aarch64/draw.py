"""Draw a digit from a bundle and keep its latents, or hold them against those of another machine.

    python draw.py BUNDLE OUT.npy [OTHER.npy]

Exit code 1: the pictures differ by more than 1e-5 of the largest value.
"""

import platform
import sys

import numpy as np
import onnxruntime

import elastic_runtime as er

TOLERANCE = 1e-5

bundle, out, *others = sys.argv[1:]
with er.ElasticPipeline.from_pretrained(bundle, "ort", threads=1) as pipe:
    latents = pipe(class_labels=[7], num_inference_steps=4, seeds=0, budget=er.Budget(latents=64), output_type="latent").images
np.save(out, latents)
print(f"{platform.machine()}, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}: a digit of shape {latents.shape}")
for other in others:
    wanted = np.load(other)
    distance = float(np.abs(latents - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
    print(f"it is {distance:.1e} from {other}'s")
    if not distance <= TOLERANCE:
        sys.exit(1)
