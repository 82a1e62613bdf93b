"""Pictures in a row or a captioned grid, written whole or not at all; pictures with the tokens that a router kept."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from elastic_runtime.errors import UsageError
from elastic_runtime.files import atomic

KEPT = (255, 140, 0)


def highlighted(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """`picture` in colour with the kept cells of its square token grid tinted; `mask` is bool (L,), in raster order."""
    side = math.isqrt(len(mask))
    cells = Image.fromarray(mask.reshape(side, side)).resize(picture.size, Image.Resampling.NEAREST)
    whole = picture.convert("RGB")
    whole.paste(Image.blend(whole, Image.new("RGB", picture.size, KEPT), 0.5), mask=cells)
    return whole


def grid(
    rows: Sequence[Sequence[Image.Image]], row_names: Sequence[str] = (), column_names: Sequence[str] = (), least: int = 64
) -> Image.Image:
    """Pictures of one size in rows, with captions; small ones are enlarged by a whole factor to at least `least` pixels."""
    side = rows[0][0].size
    factor = max(1, -(-least // min(side)))
    width, height = side[0] * factor, side[1] * factor
    font = ImageFont.load_default(16)
    widest = max((math.ceil(font.getlength(name)) for name in row_names), default=0)
    gap, left, top = 4, max(44, widest + 12) * bool(row_names), 28 * bool(column_names)
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
    """Raise UsageError where a picture cannot go to `path`: drawing takes a while, and a refusal should not wait for its end."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"pictures are written as .png, got {path.name!r}")
    atomic.refuse_clobber(path, overwrite, option)


def save(picture: Image.Image, path: Path, facts: str = "") -> None:
    """Write a PNG with `facts` in its metadata, whole or not at all; raise UsageError where that is not possible."""
    information = PngInfo()
    information.add_text("elastic-export", facts)
    content = io.BytesIO()
    picture.save(content, format="PNG", pnginfo=information)
    atomic.save(path, content.getvalue())
