"""Every command that writes is killed at many moments, and its disk runs full: what stood there before is whole, or what is new is.

    python tests/stress/crash.py --kills 200
    python tests/stress/crash.py generate extend --kills 20

Commands: generate (a picture that is replaced), make (a bundle), replace (a bundle, --overwrite), extend (a bundle by another opset), trt
(by an engine, where tensorrt-rtx is installed). After each kill the bundle must open with its hashes as the old one or the new one, foreign
files in its folder must be there, the picture must be one of the two, and the next run must succeed. Full disks need root and a Linux that
mounts.
"""

import argparse
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from elastic_runtime import Bundle

MODEL = ("elit-mnist", "--batch", "1-2")
FOREIGN = "notes.txt"
RUN = (sys.executable, "-c", "from elastic_export.cli import main; main()")


@dataclass(frozen=True)
class Command:
    """A command that writes at `{out}`: its words, and whether something stands there before."""

    words: tuple[str, ...]
    standing: bool = True
    picture: bool = False


COMMANDS = {
    "generate": Command(("generate", "{bundle}", "-o", "{out}", "--overwrite", "--steps", "4", "--seed", "{seed}"), picture=True),
    "make": Command(("onnx", *MODEL, "-o", "{out}"), standing=False),
    "replace": Command(("onnx", *MODEL, "-o", "{out}", "--overwrite")),
    "extend": Command(("onnx", *MODEL, "-o", "{out}", "--opset", "20")),
    "trt": Command(("trt", "{out}", "--sm", "89")),
}  # fmt: skip


class Crash:
    """One command, killed again and again in a folder of its own."""

    def __init__(self, name: str, work: Path, bundle: Path):
        self.command, self.work, self.bundle = COMMANDS[name], work, bundle
        self.out = work / ("p.png" if self.command.picture else "b")

    def words(self, seed: int) -> list[str]:
        values = {"bundle": str(self.bundle), "out": str(self.out), "seed": str(seed)}
        return [*RUN, *(word.format(**values) for word in self.command.words)]

    def place(self) -> None:
        """What stands there before the command."""
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.command.picture:
            Image.new("L", (8, 8), 7).save(self.out)
        elif self.command.standing:
            shutil.copytree(self.bundle, self.out)
            (self.out / FOREIGN).write_text("mine", encoding="utf-8")

    def check(self) -> str:
        """Which of the two there is; raises where it is neither."""
        if self.command.picture:
            with Image.open(self.out) as image:
                image.load()
                return "old" if image.size == (8, 8) else "new"
        if self.command.standing and (self.out / FOREIGN).read_text(encoding="utf-8") != "mine":
            raise AssertionError("a foreign file was changed")
        if not (self.out / "elastic.json").exists():
            if self.command.standing:
                raise AssertionError("the bundle is gone")
            return "old"
        bundle = Bundle.open(self.out, hashes=True)
        return "old" if self.command.standing and bundle.text == (self.bundle / "elastic.json").read_bytes() else "new"

    def whole(self, seed: int) -> float:
        """Run it to its end; seconds."""
        begun = time.monotonic()
        done = subprocess.run(self.words(seed), capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"the run after a kill failed: {done.stderr[-500:]}")
        return time.monotonic() - begun

    def kill(self, after: float, seed: int) -> str:
        """Start it, kill it after so many seconds, and see what is left."""
        self.place()
        process = subprocess.Popen(self.words(seed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return self.check()


def crash(name: str, work: Path, bundle: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill a command at `kills` moments spread over its run; how often the old and the new were left."""
    work.mkdir()
    one = Crash(name, work, bundle)
    one.place()
    cold, counts = one.whole(1), {"old": 0, "new": 0}
    one.place()
    seconds = min(cold, one.whole(1))  # the first run is slower
    for number in range(kills):
        # Most of the writing is at the end.
        share = rng.random() if number % 2 else 1 - 0.3 * rng.random() ** 2
        counts[one.kill(share * seconds * 1.05, number)] += 1
        if number % 10 == 0:
            if one.command.picture or one.check() == "old":
                one.whole(number)
            if one.check() != "new":
                raise AssertionError("the run after a kill left the old one")
            left = [path.name for path in one.work.rglob(".*") if path.name not in (".elastic.lock", ".gitignore")]
            if left:
                raise AssertionError(f"the run after a kill left {left}")
    return counts


def full(name: str, bundle: Path, sizes: Sequence[int]) -> dict[str, int]:
    """Run a command on disks of so many KB; how it ended."""
    script = """
import sys, shutil, subprocess
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import crash
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[4]}k", "none", sys.argv[3]], check=True)
one = crash.Crash(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[5]))
one.place()
done = subprocess.run(one.words(1), capture_output=True, text=True)
trace = "Traceback" in done.stderr
print("trace" if trace else one.check() + str(min(done.returncode, 1)), done.stderr[-300:] if trace else "")
"""
    counts: dict[str, int] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as mount:
            given = [str(Path(__file__).parent), name, mount, str(size), str(bundle)]
            done = subprocess.run(["unshare", "-m", sys.executable, "-c", script, *given], capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(done.stderr[-800:])
            word, _, rest = done.stdout.partition(" ")
            if word == "trace" or word == "old0":
                raise AssertionError(f"{name} on {size} KB: {rest or 'it ended well and wrote nothing'}")
            counts[word] = counts.get(word, 0) + 1
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], help=f"of {', '.join(COMMANDS)} (default: all that can run here)")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=20, help="full disks of different sizes, for each command")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    names = given.commands or [name for name in COMMANDS if name != "trt" or importlib.util.find_spec("tensorrt_rtx")]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        subprocess.run([*RUN, "onnx", *MODEL, "-o", str(bundle)], check=True, capture_output=True)
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) // 1024
        for name in names:
            begun = time.monotonic()
            kills = crash(name, Path(folder) / name, bundle, given.kills, random.Random(given.seed)) if given.kills else {}
            disks: dict[str, int] = {}
            if given.disks and os.geteuid() == 0:
                most = 20 if COMMANDS[name].picture else 4 * size  # KB: the old picture has one block
                least = 4 if COMMANDS[name].picture else (size + 64 if COMMANDS[name].standing else 16)
                disks = full(name, bundle, [least + (most - least) * i // given.disks for i in range(given.disks)])
            print(f"{name:10} {given.kills:4} kills: {kills}; full disks: {disks}; {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
