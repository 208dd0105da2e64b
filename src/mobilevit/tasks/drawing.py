"""Pictures made of pictures: captions and contact sheets, with Pillow alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mobilevit.files import write_atomically

# Pillow's built-in font has Latin letters only; labels in other scripts need one from the system.
_FONTS_FOR_ALL_SCRIPTS = (
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "wqy-microhei.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
)  # fmt: skip

GREEN, RED = (0, 115, 80), (190, 40, 30)


@lru_cache(maxsize=64)
def font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of `size` pixels that has the letters of `text`, as far as this machine has one."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        for name in _FONTS_FOR_ALL_SCRIPTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def with_caption(
    image: Image.Image, lines: Sequence[str], *, colour: tuple[int, int, int] = (30, 30, 30)
) -> Image.Image:
    """The picture above a strip with a few lines of text; the type's size follows the picture's."""
    size = max(11, min(image.width // 14, 40))
    pad = size // 3
    out = Image.new("RGB", (image.width, image.height + len(lines) * (size + pad) + pad), "white")
    out.paste(image)
    draw = ImageDraw.Draw(out)
    for row, line in enumerate(lines):
        text = _shorten(line, size, out.width - 2 * pad)
        draw.text((pad, image.height + pad + row * (size + pad)), text, fill=colour, font=font(size, text))
    return out


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[str]],
    colours: Sequence[tuple[int, int, int]],
    *,
    columns: int = 6,
    cell: int = 176,
) -> Image.Image:
    """Pictures in a grid, each fitted into a square of `cell` pixels above its caption."""
    cells = []
    for image, lines, colour in zip(images, captions, colours, strict=True):
        square = Image.new("RGB", (cell, cell), (242, 242, 242))
        scale = cell / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, Image.Resampling.BICUBIC)
        square.paste(small, ((cell - small.width) // 2, (cell - small.height) // 2))
        cells.append(with_caption(square, lines, colour=colour))
    columns = max(1, min(columns, len(cells)))
    rows, gap = -(-len(cells) // columns), 8
    height = max((c.height for c in cells), default=cell)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (height + gap) + gap), "white")
    for number, picture in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(picture, (gap + column * (cell + gap), gap + row * (height + gap)))
    return sheet


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture in the format of its suffix, whole or not at all.

    Raises:
        ValueError: a suffix that stands for no format.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: not the name of a picture; end it in .jpg or .png")
    return write_atomically(path, lambda aside: image.save(aside))


def _shorten(text: str, size: int, width: int) -> str:
    face = font(size, text)
    if face.getlength(text) <= width:
        return text
    while len(text) > 1 and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
