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
from elastic_runtime.pipeline import ElasticPipeline

KEPT = (255, 140, 0)
ROWS = 10  # steps of a sheet of kept tokens


def highlighted(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """`picture` in colour with the kept cells of its square token grid tinted; `mask` is bool (L,), in raster order."""
    side = math.isqrt(len(mask))
    cells = Image.fromarray(mask.reshape(side, side)).resize(picture.size, Image.Resampling.NEAREST)
    tinted = picture.convert("RGB")
    tinted.paste(Image.blend(tinted, Image.new("RGB", picture.size, KEPT), 0.5), mask=cells)
    return tinted


class KeptTokens:
    """What a router kept at up to `ROWS` of a picture's steps, seen as they are drawn."""

    def __init__(self, steps: int | None):
        count = steps or ROWS
        self._shown = set(np.linspace(0, count - 1, min(count, ROWS)).round().astype(int).tolist())
        self._seen: dict[int, dict[str, np.ndarray]] = {}

    def see(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep what the callback of step `index` was given, if it is one of those to show."""
        if index in self._shown:
            self._seen[index] = arrays

    def sheet(self, pipe: ElasticPipeline, column_names: Sequence[str]) -> Image.Image:
        """A row a step, a column a picture; what was kept is tinted."""
        rows = []
        for arrays in self._seen.values():
            pictures = pipe.images(arrays.get("denoised", arrays["latents"]))
            rows.append([highlighted(*pair) for pair in zip(pictures, arrays["mask"], strict=True)])
        names = [f"step {index + 1}: {arrays['mask'].mean():.0%}" for index, arrays in self._seen.items()]
        return grid(rows, names, column_names, least=128)


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
