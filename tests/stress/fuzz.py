"""Damaged and hostile inputs by the thousand: every one is used, or refused in a sentence.

    python tests/stress/fuzz.py --seconds 600                 # all kinds in turn
    python tests/stress/fuzz.py manifests --seconds 60 --seed 7

Kinds: manifests and references (a bundle's files changed, then inspected, drawn and verified), checkpoints and folders (what an export
reads), requests and command lines. A failure is an exception that is none of this library's, a hang, code of an input that runs, or a
file written outside the folder that was named. Failures are printed with the seed that makes them again; the exit status is their number.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elastic_runtime import Bundle, ElasticError, ElasticPipeline, Fixed, Request
from elastic_runtime.contract.bundle import MANIFEST

HANG = 30  # seconds after which a try counts as one
MEMORY = 12 << 30  # bytes of address space, so that an impossible size is an error and not the machine's end
CANARY = "canary-ran"
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**53, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e-300, 1e308, "", "x", "x" * 5000,
    "B", "2*B", "0*h", "../../x", "/etc/passwd", "a\x00b", "\ud800", [], {}, [1], [[]], {"a": 1}, [10**12] * 3, ["B", 10**9],
)  # fmt: skip


@dataclass
class Tally:
    """What became of the tries of one kind."""

    tries: int = 0
    used: int = 0
    refused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)


class Hang(BaseException):
    """The clock's, which nothing that is tried may catch."""


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of nested JSON with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        _change(holder, key, rng)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield value, key
        yield from _places(each)


def _change(holder: Any, key: Any, rng: random.Random) -> None:
    value, way = holder[key], rng.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, list):
        holder.append(copy.deepcopy(value))
    elif way == 2 and isinstance(holder, dict):
        holder[rng.choice((key + "x", "", "schema", "path"))] = holder.pop(key)
    elif way in (3, 4) and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice(
            (-value, value + 1, value - 1, value * 2, value * 10**6, value // 2 if isinstance(value, int) else value / 2)
        )
    elif way == 5:
        other, place = rng.choice(list(_places(holder)) or [(holder, key)])
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few flipped, cut off, or something put in between."""
    changed = bytearray(content)
    way = rng.randrange(4)
    if way == 0:
        return bytes(changed[: rng.randrange(len(changed) + 1)])
    if way == 1:
        at = rng.randrange(len(changed) + 1)
        return bytes(changed[:at] + rng.randbytes(rng.randrange(1, 64)) + changed[at:])
    for _ in range(rng.randrange(1, 12)):
        # Headers lie at the beginning, and those of a zip at the end.
        at = rng.choice(
            (rng.randrange(len(changed)), rng.randrange(min(len(changed), 2000)), len(changed) - 1 - rng.randrange(min(len(changed), 2000)))
        )
        changed[at] = rng.randrange(256)
    return bytes(changed)


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
        if value.dtype.kind == "U":
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


def hostile(folder: Path, rng: random.Random) -> bytes:
    """A pickle that calls something."""
    module, name = rng.choice(
        (("posix", "system"), ("os", "system"), ("builtins", "eval"), ("subprocess", "getoutput"), ("numpy", "load"), ("x", "Y"))
    )
    text = f"touch {folder / CANARY}" if name != "eval" else f"open({str(folder / CANARY)!r}, 'w')"
    called = f"c{module}\n{name}\n".encode() + b"X" + len(text.encode()).to_bytes(4, "little") + text.encode() + b"\x85"
    end = rng.choice((b"R", b"\x81", b"R}b", b"\x81}b"))
    return b"\x80\x02}X\x03\x00\x00\x00ema" + called + end + b"s."


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
            record(graph.loaded(), [graph.traced])


class Requests(Fuzzer):
    def attempt(self, folder: Path, rng: random.Random) -> None:
        source = rng.choice(bundles(self.work))
        text = self.request(Bundle.open(source)).to_json()
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
            arguments.append("--dry-run")  # whole exports are other tests'
        if word == "bench":
            arguments += ["--help"]
        with contextlib.chdir(folder):
            if command(arguments):
                raise ElasticError("refused")


KINDS: dict[str, type[Fuzzer]] = {
    "manifests": Manifests, "references": References, "checkpoints": Checkpoints, "folders": Folders, "requests": Requests,
    "commands": Commands,
}  # fmt: skip


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

    golden, found = Path(__file__).parents[1] / "golden", []
    for family, name in (("elit-sit", "elit-c"), ("dc-dit", "dcdit-a")):
        flat = work / f"{name}.safetensors"
        if not flat.exists():
            weights = read_checkpoint(golden / f"{name}.pt").weights
            save_file({key: value.contiguous().clone() for key, value in weights.items()}, flat)
        found += [(family, golden / f"{name}.pt", golden / f"{name}.json"), (family, flat, golden / f"{name}.json")]
    return found


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Files that are opened for writing outside `folder`, by Python."""
    strangers: list[str] = []
    _WATCHING.append((folder, strangers))
    try:
        yield strangers
    finally:
        _WATCHING.pop()


_WATCHING: list[tuple[Path, list[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHING:
        return
    folder, strangers = _WATCHING[-1]
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        path, flags = os.path.abspath(arguments[0]), arguments[2]
        allowed = (str(folder), "/dev/", "/proc/", os.environ["XDG_CACHE_HOME"], "/tmp/torchinductor")
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(allowed) and "__pycache__" not in path:
            strangers.append(path)
    elif event in ("os.system", "os.exec", "os.posix_spawn") or (event == "subprocess.Popen" and CANARY in str(arguments)):
        strangers.append(f"{event} {arguments}")


def attempt(fuzzer: Fuzzer, kind: str, seed: int, tally: Tally) -> None:
    """One try, counted."""
    folder = Path(tempfile.mkdtemp(dir=fuzzer.work))
    signal.alarm(HANG)
    tally.tries += 1
    failure = None
    try:
        with watched(folder) as strangers:
            try:
                fuzzer.attempt(folder, random.Random(f"{kind} {seed}"))
                tally.used += 1
            except ElasticError:
                tally.refused += 1
        if strangers:
            failure = f"wrote or ran {strangers[0]}", str(strangers)
        elif list(folder.rglob(CANARY)):
            failure = "code ran", ""
    except Hang:
        failure = "hang", traceback.format_exc()
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "elastic" in frame.filename]
        at = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}", traceback.format_exc()
    finally:
        signal.alarm(0)
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                path.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
    if failure:
        name, detail = failure
        if name not in tally.failures:
            tally.first[name] = f"{kind} --seed {seed} --tries 1\n{detail}"
        tally.failures[name] += 1


def run(kinds: list[str], seconds: float, seed: int, tries: int | None, work: Path) -> dict[str, Tally]:
    """Try all kinds in turn until the time is over, or each `tries` times."""

    def ring(number: int, frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    sys.addaudithook(_audit)
    warnings.simplefilter("ignore")
    tallies = {kind: Tally() for kind in kinds}
    for kind in kinds:
        KINDS[kind](work)
    bundles(work), model_folders(work), checkpoints(work)
    end = time.monotonic() + seconds
    number = seed
    while (tries is None and time.monotonic() < end) or (tries is not None and number < seed + tries):
        for kind in kinds:
            attempt(KINDS[kind](work), kind, number, tallies[kind])
        number += 1
    return tallies


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, help="so many of each kind, in place of --seconds")
    parser.add_argument("--work", type=Path, help="a folder that is kept, for what is made once")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        tallies = run(given.kinds or list(KINDS), given.seconds, given.seed, given.tries, work)
    for kind, tally in tallies.items():
        print(f"{kind:12} {tally.tries:7} tries, {tally.used:6} used, {tally.refused:6} refused, {sum(tally.failures.values()):4} failures")
    for tally in tallies.values():
        for name, count in tally.failures.most_common():
            print(f"\n{count} x {name}: {tally.first[name]}")
    return min(sum(len(tally.failures) for tally in tallies.values()), 100)


if __name__ == "__main__":
    sys.exit(main())
