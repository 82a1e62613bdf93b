"""What a solver of higher order is worth: pictures of a packaged sample by solver and number of evaluations, the same noise for all.

    python samples/solvers.py elit-mnist elt-mnist --steps 4,6,10,20

A row a solver and number of steps, at the model's largest budget with guidance: PSNR of the pictures to those that many steps of the third
order converge to, the share that a judge names as asked, and the Frechet distance to real digits. Each of these solvers evaluates the
model once a step, but heun, which is given half the steps.
"""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

import elastic_export
from classifier import load_judge
from digits import Digits
from elastic_runtime import Budget, ElasticPipeline
from elastic_runtime.sampling.fitting import OFFERED
from evaluate import Protocol, as_drawn, draw
from grading import Grader, integers, run
from record import machine, versions

COLUMNS = ("sample", "evaluations", "solver", "dB to the converged", "named as asked", "Fréchet")
CONVERGED = 60  # steps
NOISY = ("sde", "ddpm")  # which draw noise on the way and converge to no one picture


def main(options: Namespace) -> None:
    print(f"| {' | '.join(COLUMNS)} |\n|---|---:|---|---:|---:|---:|")
    labels = np.arange(options.samples) % 10
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            bundle = elastic_export.export(name, output=Path(folder) / name, batch="1-100")
            whole = Budget().on(bundle.manifest.axes)
            with ElasticPipeline.from_pretrained(bundle, "ort", threads=options.threads) as pipe:

                def images(solver: str, steps: int, pipe: ElasticPipeline = pipe, whole: Budget = whole) -> np.ndarray:
                    protocol = Protocol(samples=options.samples, steps=steps, sampler=solver, seed=options.seed)
                    return draw(pipe, whole, options.guidance, protocol, options.batch).digits.images

                converged = images("ab3", CONVERGED)
                model = bundle.manifest.model
                grader = Grader.of(load_judge(), options.samples, as_drawn=lambda images, model=model: as_drawn(images, model))
                for steps in options.steps:
                    for solver in OFFERED[type(bundle.manifest.model.schedule)]:
                        if solver in NOISY:
                            continue
                        drawn = images(solver, max(steps // 2, 1) if solver == "heun" else steps)
                        grades = grader.grade(Digits(drawn, labels))
                        psnr = 10 * np.log10(4 / np.mean((drawn - converged) ** 2))
                        figures = f"{psnr:.1f} | {grades['accuracy']:.1%} | {grades['frechet_distance']:.2f}"
                        print(f"| {name} | {steps} | {solver} | {figures} |", flush=True)
    print(f"\n{machine()}; {versions('elastic-export', 'onnxruntime')}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=integers, default=[4, 6, 10, 20], help="evaluations of the model a picture")
    parser.add_argument("--guidance", type=float, default=1.5)
    run(main, parser)
