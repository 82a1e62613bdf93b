"""Damaged and hostile inputs by the thousand: every one is used, or refused in a sentence.

    python tests/stress/fuzz.py --seconds 600                 # all kinds in turn
    python tests/stress/fuzz.py manifests --seconds 60 --seed 7

Kinds: manifests and references (a bundle's files changed, then inspected, drawn and verified), checkpoints and folders (what an export
reads), requests and command lines. A failure is an exception that is none of this library's, a hang, code of an input that runs, or a
file written outside the folder that was named. Failures are printed with the seed that makes them again; the exit status is their number.
"""

import argparse
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinds import KINDS, Fuzzer, bundles, checkpoints, model_folders
from mutations import CANARY

from elastic_runtime import ElasticError

HANG = 30  # seconds after which a try counts as one
MEMORY = 12 << 30  # bytes of address space, so that an impossible size is an error and not the machine's end


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
