"""Keep the machine code of one GPU generation in a shared library and zero the rest: it then compresses to a fraction.

    python prune.py LIBRARY SM                        list what is in it
    python prune.py LIBRARY SM OUT [PATTERN ...]      write OUT without the other generations, and without those files' worth of
                                                      kernels whose names all match one of the patterns (needs zstandard, lz4)

Nothing moves: headers, offsets and sizes stay, so the library is otherwise as it was. The driver picks the entry of its own
generation when a kernel of it is first used and never reads the others. A kernel that was left out fails when it is called.
"""

import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
PTX, ELF = 1, 2
ZSTD, LZ4 = 0x8000, 0x2000


class Entry(NamedTuple):
    """One compiled file for one generation."""

    kind: int
    sm: int
    at: int
    size: int
    compressed: int
    plain: int
    flags: int


def section(data: bytes, wanted: bytes) -> tuple[int, int]:
    """Offset and size of an ELF section."""
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    strings = struct.unpack_from("<Q", data, table + names * size + 0x18)[0]
    for i in range(count):
        at = table + i * size
        name = strings + struct.unpack_from("<I", data, at)[0]
        if data[name : data.index(b"\0", name)] == wanted:
            return struct.unpack_from("<QQ", data, at + 0x18)
    raise SystemExit(f"no section {wanted.decode()}")


def entries(data: bytes) -> Iterator[Entry]:
    """Every entry of .nv_fatbin."""
    at, length = section(data, b".nv_fatbin")
    end = at + length
    while at + 16 <= end:
        magic, _, header, fat = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        inner, stop = at + header, at + header + fat
        while inner + 0x40 <= stop:
            kind, _, head, size, compressed = struct.unpack_from("<HHIQI", data, inner)
            if kind not in (PTX, ELF) or not head:
                break
            sm = struct.unpack_from("<I", data, inner + 0x1C)[0]
            flags, _, plain = struct.unpack_from("<QQQ", data, inner + 0x28)
            yield Entry(kind, sm, inner + head, size, compressed or size, plain, flags)
            inner += head + size
        at = stop


def kernels(data: bytes, entry: Entry) -> set[str]:
    """Mangled names of the kernels of an entry."""
    packed = bytes(data[entry.at : entry.at + entry.compressed])
    if entry.flags & ZSTD:
        import zstandard

        packed = zstandard.ZstdDecompressor().decompress(packed, max_output_size=entry.plain)
    elif entry.flags & LZ4:
        import lz4.block

        packed = lz4.block.decompress(packed, uncompressed_size=entry.plain)
    return {name.decode() for name in re.findall(rb"\.text\.([A-Za-z0-9_$]{2,4000})", packed)}


def main() -> None:
    path, sm, out, *patterns = [*sys.argv[1:], None][: max(3, len(sys.argv) - 1)]
    unwanted = re.compile("|".join(patterns)) if patterns else None
    data = bytearray(Path(path).read_bytes())
    before: Counter = Counter()
    kept = left = 0
    for entry in list(entries(bytes(data))):
        before["ptx" if entry.kind == PTX else "code", entry.sm] += entry.size
        keep = entry.kind == ELF and entry.sm == int(sm)
        if keep and unwanted and (names := kernels(data, entry)) and all(unwanted.search(name) for name in names):
            keep = False
            left += entry.size
        if keep:
            kept += entry.size
        elif out:
            data[entry.at : entry.at + entry.size] = bytes(entry.size)
    for (kind, generation), size in sorted(before.items()):
        print(f"  {kind} sm {generation}: {size / 1e6:.1f} MB")
    print(f"{path}: {len(data) / 1e6:.1f} MB, kept {kept / 1e6:.1f} MB of kernels, left out {left / 1e6:.1f} MB by name")
    if not kept:
        raise SystemExit(f"it has no code for sm {sm}")
    if out:
        Path(out).write_bytes(data)


if __name__ == "__main__":
    main()
