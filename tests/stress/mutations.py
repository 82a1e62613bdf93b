"""Bad inputs from good ones: JSON with places changed, bytes with some flipped, pickles that call something."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CANARY = "canary-ran"
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**53, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e-300, 1e308, "", "x", "x" * 5000,
    "B", "2*B", "0*h", "../../x", "/etc/passwd", "a\x00b", "\ud800", [], {}, [1], [[]], {"a": 1}, [10**12] * 3, ["B", 10**9],
)  # fmt: skip


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


def hostile(folder: Path, rng: random.Random) -> bytes:
    """A pickle that calls something."""
    module, name = rng.choice(
        (("posix", "system"), ("os", "system"), ("builtins", "eval"), ("subprocess", "getoutput"), ("numpy", "load"), ("x", "Y"))
    )
    text = f"touch {folder / CANARY}" if name != "eval" else f"open({str(folder / CANARY)!r}, 'w')"
    called = f"c{module}\n{name}\n".encode() + b"X" + len(text.encode()).to_bytes(4, "little") + text.encode() + b"\x85"
    end = rng.choice((b"R", b"\x81", b"R}b", b"\x81}b"))
    return b"\x80\x02}X\x03\x00\x00\x00ema" + called + end + b"s."
