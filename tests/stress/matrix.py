"""Every family on every target, small models through the public API: how far each artifact is from its original.

    python tests/stress/matrix.py --rows build/matrix.json --page README.md        (half an hour)
    python tests/stress/matrix.py elit-sit flux

Rows that are in the file of `--rows` are taken from there, and new ones are added to it as they are done, so that a run goes on where it
was stopped; delete the file to begin anew.

ONNX artifacts run in ONNX Runtime on this machine's CPU, Core ML packages are evaluated operator by operator, engines of TensorRT-RTX are
built. A cell is the largest difference over all recorded budgets, in units of the tolerance's scale (1, or the largest value), or why there
is none.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "samples"), str(ROOT / "tests" / "fakes")]

import folders  # noqa: E402
from backbones import Backbone  # noqa: E402

import elastic_export  # noqa: E402
from card import filled  # noqa: E402
from elastic_runtime import Bundle, ElasticError  # noqa: E402
from elastic_runtime.contract.artifacts import Artifact, TrtArtifact  # noqa: E402
from elastic_runtime.files.atomic import save  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
FIGURES = re.compile(r"max abs error (\S+) of at most (\S+), .*tolerance is (\S+) of")
# name of the column -> target and its options
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "ONNX, opset 23": ("onnx", {"precision": "fp32", "opset": 23}),
    "ONNX, opset 20": ("onnx", {"precision": "fp32", "opset": 20}),
    "ONNX, fp16": ("onnx", {"precision": "fp16", "opset": 23}),
    "ONNX, int8w": ("onnx", {"precision": "int8w", "opset": 23}),
    "Core ML, functions, fp32": ("coreml", {"precision": "fp32"}),
    "Core ML, functions, fp16": ("coreml", {"precision": "fp16"}),
    "TensorRT-RTX": ("trt", {"builder": "rtx"}),
}


@dataclass(frozen=True)
class Subject:
    """A small model of a family: what `elastic_export.export` is given. `write` makes its folder first, or its `config`."""

    family: str
    model: str | Path
    source: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Path], Any] | None = None


def recorded(family: str, name: str) -> Subject:
    """A checkpoint of the tests' recordings."""
    return Subject(family, family, {"checkpoint": GOLDEN / f"{name}.pt", "config": GOLDEN / f"{name}.json"})


def plain(family: str, name: str) -> Subject:
    """The same of a plain backbone, whose config holds more than sizes."""
    return Subject(family, family, {"checkpoint": GOLDEN / f"{name}.pt"}, lambda folder: Backbone.read(GOLDEN, name, folder).config)


SUBJECTS = (
    Subject("elit-sit", "elit-mnist"),
    recorded("elit-uvit", "elit-uvit-b"),
    recorded("elit-hdit", "elit-hdit-b"),
    recorded("elit-uvit-tokens", "elit-uvit-tokens-a"),
    recorded("elit-hdit-levels", "elit-hdit-levels-a"),
    Subject("elit-qwen-image", GOLDEN / "elit-qwen-image-a", {"size": "128x192"}),
    plain("uvit", "uvit-b"),
    plain("hdit", "hdit-a"),
    Subject("dc-dit", "dcdit-mnist"),
    Subject("elt", "elt-mnist"),
    Subject("elt-masked", "elt-mnist-masked"),
    Subject("flux", "ralu-digits", {"components": "transformer"}),
    Subject("sd3", "sd3", {"components": "transformer"}, lambda folder: folders.write(folder, folders.sd3())),
    Subject("qwen-image", GOLDEN / "qwen-image-a", {"components": "transformer"}),
    Subject("flux2", "flux2", {"components": "transformer"}, lambda folder: folders.write(folder, folders.flux2())),
    Subject("z-image", "z-image", {"components": "transformer"}, lambda folder: folders.write(folder, folders.z_image())),
    Subject("krea2", "krea2", {"components": "transformer"}, lambda folder: folders.write(folder, folders.krea2())),
)


def cells(subject: Subject, folder: Path) -> list[str]:
    """A cell for each target, in the order of TARGETS."""
    model, words = subject.model, dict(subject.source)
    if "checkpoint" in words and subject.write:
        words["config"] = subject.write(folder)
    elif subject.write:
        model = folder / subject.family
        subject.write(model)
    row = []
    for name, (target, options) in TARGETS.items():
        print(f"{subject.family}: {name}", file=sys.stderr, flush=True)
        made = folder / "bundles" / f"{subject.family}-{options.get('opset', target)}"
        try:
            if target == "trt":
                row.append(engine(folder / "bundles", subject.family, options))
                continue
            bundle = elastic_export.export(model, output=made, target=target, **words, **options)
        except ElasticError as error:
            figures = FIGURES.search(str(error))
            row.append(f"refused: {_share(*figures.groups()) if figures else str(error).split('. ')[0][:70].strip()}")
            continue
        row.append(cell(bundle, target, options.get("precision")))
    return row


def engine(bundles: Path, family: str, options: dict[str, Any]) -> str:
    """A cell of an engine from the ONNX file that is there: of opset 23, or where the builder cannot parse that, of 20."""
    try:
        return cell(elastic_export.export(bundles / f"{family}-23", output=bundles / f"{family}-23", target="trt", **options), "trt", None)
    except ElasticError:
        bundle = elastic_export.export(bundles / f"{family}-20", output=bundles / f"{family}-20", target="trt", **options)
        return f"{cell(bundle, 'trt', None)}, from opset 20"


def cell(bundle: Bundle, target: str, precision: str | None) -> str:
    """What the manifest says of the denoiser's artifact."""
    made = [
        artifact
        for artifact in bundle.manifest.graphs["denoiser"].artifacts
        if artifact.target == target and precision in (None, artifact.precision)
    ]
    artifact: Artifact = made[-1]
    if isinstance(artifact, TrtArtifact):
        return f"built, {artifact.files[0].bytes / 1e6:.1f} MB"
    if not artifact.verified:
        return f"made, not evaluated: {artifact.unverified}"
    worst = max(artifact.verified, key=lambda row: row.share)
    return f"{worst.share * worst.tolerance:.1e}{'' if all(row.passed for row in artifact.verified) else ' FAILS'}"


def _share(difference: str, bound: str, tolerance: str) -> str:
    """A difference in units of what the tolerance is of."""
    return f"{float(difference) / float(bound) * float(tolerance):.1e}"


def table(rows: Sequence[tuple[str, list[str]]]) -> str:
    lines = [f"| family | {' | '.join(TARGETS)} |", f"|---|{'---|' * len(TARGETS)}"]
    return "\n".join(lines + [f"| {family} | {' | '.join(row)} |" for family, row in rows]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all where none is named")
    parser.add_argument("--rows", type=Path, help="a file of rows that are kept")
    parser.add_argument("--page", type=Path, help="a page that holds the table between its markers")
    options = parser.parse_args(arguments)
    known = [subject.family for subject in SUBJECTS]
    if unknown := set(options.families) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [subject for subject in SUBJECTS if not options.families or subject.family in options.families]
    kept: dict[str, list[str]] = json.loads(options.rows.read_text()) if options.rows and options.rows.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for subject in wanted:
            if subject.family in kept:
                continue
            kept[subject.family] = cells(subject, Path(folder))
            print(table([(subject.family, kept[subject.family])]).splitlines()[-1], flush=True)
            if options.rows:
                save(options.rows, json.dumps(kept, indent=1).encode())
    rows = [(subject.family, kept[subject.family]) for subject in wanted]
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        save(options.page, filled(page, "families", table(rows), str(options.page)).encode())


if __name__ == "__main__":
    main()
