"""Kinds of input that are fuzzed: how a bad one is made of a good one, and all that is then done with it."""

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mutations import ODD, damaged, hostile, mutated

from elastic_runtime import Bundle, ElasticError, ElasticPipeline, Fixed, Request
from elastic_runtime.contract.bundle import MANIFEST
from elastic_runtime.denoising.pictures import obstacle


def bundles(work: Path) -> list[Path]:
    """Bundles of each kind of model, made once."""
    import elastic_export

    root = work / "bundles"
    if not root.exists():
        golden = Path(__file__).parents[1] / "golden"
        partial = work / "making"
        shutil.rmtree(partial, ignore_errors=True)
        make: dict[str, dict[str, Any]] = {
            "elit": {"model": "elit-sit", "checkpoint": golden / "elit-c.pt", "config": golden / "elit-c.json"},
            "elt": {"model": "elt-mnist-masked"},
            "dc": {"model": "dc-dit", "checkpoint": golden / "dcdit-a.pt", "config": golden / "dcdit-a.json"},
            "flux": {"model": model_folders(work)[0], "size": "16-32"},
        }
        for name, how in make.items():
            elastic_export.export(output=partial / name, batch="1-2", **how)
        partial.rename(root)
    return sorted(root.iterdir())


def model_folders(work: Path) -> list[Path]:
    """Diffusers folders of small models."""
    root = work / "folders"
    if not root.exists():
        tree = Path(__file__).parents[2]
        sys.path[:0] = [str(tree / "samples"), str(tree / "tests" / "fakes")]
        import folders

        partial = work / "making-folders"
        shutil.rmtree(partial, ignore_errors=True)
        folders.write(partial / "flux", folders.flux(), text=True)
        folders.write(partial / "sd3", folders.sd3(), text=True)
        partial.rename(root)
    return sorted(root.iterdir())


def checkpoints(work: Path) -> list[tuple[str, Path, Path]]:
    """Checkpoints of each family, in both formats: family, file, config."""
    from safetensors.torch import save_file

    from elastic_export.foreign.checkpoint import read_checkpoint

    golden, entries = Path(__file__).parents[1] / "golden", []
    names = {
        "elit-sit": "elit-c", "elit-uvit": "elit-uvit-b", "elit-hdit": "elit-hdit-b", "elit-uvit-tokens": "elit-uvit-tokens-a",
        "elit-hdit-levels": "elit-hdit-levels-a", "dc-dit": "dcdit-a",
    }  # fmt: skip
    for family, name in names.items():
        flat = work / f"{name}.safetensors"
        if not flat.exists():
            weights = read_checkpoint(golden / f"{name}.pt").weights
            save_file({key: value.contiguous().clone() for key, value in weights.items()}, flat)
        entries += [(family, golden / f"{name}.pt", golden / f"{name}.json"), (family, flat, golden / f"{name}.json")]
    return entries


class Fuzzer:
    """One kind of input: `attempt(folder, rng)` makes a bad one in an empty folder and uses it."""

    def __init__(self, work: Path):
        self.work = work

    def use(self, folder: Path) -> None:
        """All that one does with a bundle: look, predict, draw a little, verify."""
        from elastic_export.verifying import verify

        command(["inspect", str(folder), "--json"])
        bundle = Bundle.open(folder)
        with ElasticPipeline.from_pretrained(bundle, "ort", threads=1, spinning=False) as pipe:
            request = self.request(bundle)
            outlook = pipe.outlook(request)
            for option in outlook.options()[:3]:
                outlook.quality(option), outlook.memory(option), outlook.peak_seconds(option)
            pipe.draw(request)
        verify(bundle)

    def request(self, bundle: Bundle) -> Request:
        model = bundle.manifest.model
        steps: dict[str, Any] = {"plan": "full"} if model.patches else {}
        steps |= {"num_inference_steps": 2}
        what = {"class_labels": (0,)} if model.num_classes else {"prompt": "a cat"}
        return Request(**what, **steps, guidance_scale=1.5, policy=Fixed(), seeds=(3,), output_type="np")  # type: ignore[arg-type]


def command(arguments: list[str]) -> int:
    """Run a command line in this process; its exit status."""
    from elastic_export.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(arguments)
        except SystemExit as end:
            if "Traceback" in errors.getvalue():
                raise RuntimeError(errors.getvalue()[-2000:]) from None
            return int(end.code or 0) if isinstance(end.code, int | None) else 1
    return 0


class Manifests(Fuzzer):
    def attempt(self, folder: Path, rng: random.Random) -> None:
        source = rng.choice(bundles(self.work))
        shutil.copytree(source, folder / "b", copy_function=os.link)
        text = json.loads((source / MANIFEST).read_text())
        (folder / "b" / MANIFEST).unlink()
        if rng.random() < 0.1:
            (folder / "b" / MANIFEST).write_bytes(damaged((source / MANIFEST).read_bytes(), rng))
        else:
            (folder / "b" / MANIFEST).write_text(json.dumps(mutated(text, rng), ensure_ascii=True))
        self.use(folder / "b")


class References(Fuzzer):
    def attempt(self, folder: Path, rng: random.Random) -> None:
        from elastic_export.verifying import verify

        source = rng.choice(bundles(self.work))
        shutil.copytree(source, folder / "b", copy_function=os.link)
        path = folder / "b" / "reference.npz"
        with np.load(path) as arrays:
            content = dict(arrays)
        path.unlink()
        if rng.random() < 0.4:
            path.write_bytes(damaged((source / "reference.npz").read_bytes(), rng))
        else:
            for _ in range(rng.randrange(1, 4)):
                name = rng.choice(list(content))
                content[rng.choice((name, name + "x", "a/b", "denoiser/feed/x", name.replace("=", "=-"), "a/b=c/d"))] = self.array(
                    content.pop(name), rng
                )
            np.savez(path, **content)
        text = json.loads((folder / "b" / MANIFEST).read_text())
        text["reference"]["bytes"] = path.stat().st_size
        (folder / "b" / MANIFEST).unlink()
        (folder / "b" / MANIFEST).write_text(json.dumps(text))
        rows = verify(Bundle.open(folder / "b"))
        assert all(row.finite for _, artifact in rows for row in artifact.verified if row.passed)

    def array(self, value: np.ndarray, rng: random.Random) -> np.ndarray:
        ways: tuple[Callable[[], np.ndarray], ...] = (
            lambda: value, lambda: value * np.nan, lambda: value[..., :0], lambda: value.astype(np.float16), lambda: value[None],
            lambda: value.astype("U5"), lambda: np.zeros(0), lambda: value.astype(np.int64), lambda: value + np.inf, lambda: np.array(1.0),
            lambda: value.repeat(2, axis=0) if value.ndim else value,
        )  # fmt: skip
        if value.dtype.kind == "U" or not value.ndim:
            return value
        return rng.choice(ways)()


class Checkpoints(Fuzzer):
    def attempt(self, folder: Path, rng: random.Random) -> None:
        from elastic_export.capture.zoo import Request as Model
        from elastic_export.capture.zoo import load

        sources = checkpoints(self.work)
        family, source, config = rng.choice(sources)
        path = folder / source.name
        if source.suffix == ".pt" and rng.random() < 0.3:
            path.write_bytes(hostile(folder, rng))
        else:
            path.write_bytes(damaged(source.read_bytes(), rng))
        load(Model(family, path, config))


class Folders(Fuzzer):
    def attempt(self, folder: Path, rng: random.Random) -> None:
        from elastic_export.capture.folders import capture_folder
        from elastic_export.verifying import record
        from elastic_runtime import Span

        source = rng.choice(model_folders(self.work))
        shutil.copytree(source, folder / "m")
        files = [path for path in (folder / "m").rglob("*") if path.is_file()]
        for path in rng.sample(files, rng.choice((1, 1, 2))):
            if path.suffix == ".json" and rng.random() < 0.8:
                path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
            elif rng.random() < 0.2:
                path.unlink()
            else:
                path.write_bytes(damaged(path.read_bytes(), rng))
        captured = capture_folder(folder / "m", None, rng.choice((None, Span(16, 32))), Span(1, 2), digest=False)
        for graph in captured.graphs:
            record(graph, [graph.traced])


class Requests(Fuzzer):
    def attempt(self, folder: Path, rng: random.Random) -> None:
        source = rng.choice([folder for folder in bundles(self.work) if obstacle(Bundle.open(folder).manifest) is None])
        text = msgspec.structs.replace(self.request(Bundle.open(source)), output_type="pil").to_json()
        content = json.loads(text)
        whole = {name: rng.choice((*ODD, 3, 0.5)) for name in rng.sample(list(Request.__struct_fields__), rng.randrange(1, 4))}
        changed = mutated(content, rng) if rng.random() < 0.6 else content | whole
        if isinstance(changed.get("num_inference_steps"), int):
            changed["num_inference_steps"] = min(changed["num_inference_steps"], 5)  # as many as were asked for are drawn
        (folder / "r.json").write_text(json.dumps(changed))
        arguments = ["generate", str(source), "--request", str(folder / "r.json"), "-o", str(folder / "p.png"), "--backend", "ort"]
        if command(arguments):
            raise ElasticError("refused")


class Commands(Fuzzer):
    words = ("generate", "verify", "inspect", "onnx", "trt", "coreml", "bench", "devices", "doctor", "models")
    flags = (
        "-o", "--output", "--steps", "--latents", "--tokens", "--loops", "--classes", "--seed", "--guidance", "--target-ms", "--budget",
        "--quality", "--max-memory", "--plan", "--backend", "--json", "--prompt", "--size", "--batch", "--precision", "--opset", "--vae",
        "--checkpoint", "--config", "--components", "--overwrite", "--dry-run", "--tolerance", "--device", "--request", "--runtimes",
        "--sm", "--buckets", "--shapes", "--help",
    )  # fmt: skip
    values = (
        "", "0", "-1", "1", "2", "4x", "16-32", "32-16", "nan", "inf", "1e999", "99999999999999999999", "a,b", "..", "/", "/dev/null",
        "/proc/self/mem", "\udcff", "elit-mnist", "x" * 300, "0.5", "2GB", "auto", "fp16", "--", "*",
    )  # fmt: skip

    def attempt(self, folder: Path, rng: random.Random) -> None:
        word = rng.choice(self.words)
        arguments = [word]
        if rng.random() < 0.8:
            arguments.append(rng.choice((*map(str, bundles(self.work)), *self.values)))
        for _ in range(rng.randrange(5)):
            arguments.append(rng.choice(self.flags))
            if rng.random() < 0.8:
                arguments.append(rng.choice((*self.values, str(folder / "out"))))
        if word in ("onnx", "trt", "coreml") or "--overwrite" in arguments:
            arguments.insert(1, "--dry-run")  # whole exports are other tests'
        if word == "bench":
            arguments += ["--help"]
        with contextlib.chdir(folder):
            if command(arguments):
                raise ElasticError("refused")


KINDS: dict[str, type[Fuzzer]] = {
    "manifests": Manifests, "references": References, "checkpoints": Checkpoints, "folders": Folders, "requests": Requests,
    "commands": Commands,
}  # fmt: skip
