"""Pictures in a row or a captioned grid, written whole or not at all; pictures with the tokens that a router kept."""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from elastic_runtime.errors import UsageError

KEPT = (255, 140, 0)


def highlighted(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """`picture` in colour with the kept cells of its square token grid tinted; `mask` is bool (L,), in raster order."""
    side = math.isqrt(len(mask))
    cells = Image.fromarray(mask.reshape(side, side)).resize(picture.size, Image.Resampling.NEAREST)
    tinted = picture.convert("RGB")
    tinted.paste(Image.blend(tinted, Image.new("RGB", picture.size, KEPT), 0.5), mask=cells)
    return tinted


def grid(
    rows: Sequence[Sequence[Image.Image]], row_names: Sequence[str] = (), column_names: Sequence[str] = (), least: int = 64
) -> Image.Image:
    """Pictures of one size in rows, with captions; small ones are enlarged by a whole factor to at least `least` pixels."""
    side = rows[0][0].size
    factor = max(1, -(-least // min(side)))
    width, height = side[0] * factor, side[1] * factor
    font = ImageFont.load_default(16)
    widest = max((math.ceil(font.getlength(name)) for name in row_names), default=0)
    gap = 4
    left, top = max(44, widest + 12) if row_names else 0, 28 if column_names else 0
    shape = (left + len(rows[0]) * (width + gap) - gap, top + len(rows) * (height + gap) - gap)
    sheet = Image.new("L" if rows[0][0].mode == "L" else "RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        draw.text((left + column * (width + gap) + width // 2, top // 2), name, fill="black", font=font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        if row_names:
            draw.text((left // 2, y + height // 2), row_names[i], fill="black", font=font, anchor="mm")
        for j, picture in enumerate(row):
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left + j * (width + gap), y))
    return sheet


def refuse_clobber(path: Path, overwrite: bool, option: str = "-o/--output") -> None:
    """Raise UsageError where a picture cannot go to `path`."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"pictures are written as .png, got {path.name!r}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another {option}, or replace it with --overwrite")
    # Drawing takes a while: a place that cannot be written should not wait for its end.
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"cannot write {path}: {above} is {'not writable' if above.is_dir() else 'a file'}; choose another {option}")


def save(picture: Image.Image, path: Path, facts: str = "") -> None:
    """Write a PNG with `facts` in its metadata, under a temporary name until it is whole."""
    information = PngInfo()
    information.add_text("elastic-export", facts)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part, format="PNG", pnginfo=information)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # there may be no such folder
            part.unlink(missing_ok=True)
