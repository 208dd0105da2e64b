"""Draw on images with Pillow: captions, contact sheets, boxes, label maps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mobilevit.class_names import IGNORE
from mobilevit.errors import MobileViTError
from mobilevit.files import write_atomically

# Pillow's built-in font has Latin letters only; labels in other scripts need a font of the system.
_FONTS_FOR_ALL_SCRIPTS = (
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "wqy-microhei.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
)  # fmt: skip

RGB = tuple[int, int, int]

BLACK, DARK, WHITE = (0, 0, 0), (30, 30, 30), (255, 255, 255)
GREEN, RED = (0, 115, 80), (190, 40, 30)

# The first classes get colors that people with any sort of color vision can tell apart (Okabe and Ito, 2008).
_FIRST_COLORS = (
    (213, 94, 0), (0, 114, 178), (0, 158, 115), (230, 159, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
)  # fmt: skip


@lru_cache(maxsize=64)
def font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load a font of `size` pixels, with the letters of `text` if this machine has such a font."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        for name in _FONTS_FOR_ALL_SCRIPTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def with_caption(image: Image.Image, lines: Sequence[str], *, color: RGB = DARK) -> Image.Image:
    """Put lines of text below an image; the size of the text depends on that of the image."""
    size = max(11, min(image.width // 14, 40))
    pad = size // 3
    out = Image.new("RGB", (image.width, image.height + len(lines) * (size + pad) + pad), "white")
    out.paste(image)
    draw = ImageDraw.Draw(out)
    for row, line in enumerate(lines):
        text = _shorten(line, size, out.width - 2 * pad)
        draw.text((pad, image.height + pad + row * (size + pad)), text, fill=color, font=font(size, text))
    return out


def fit(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize an image so that its longer side has `side` pixels, and keep its proportions."""
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[str]],
    colors: Sequence[RGB],
    *,
    columns: int = 6,
    cell: int = 176,
) -> Image.Image:
    """Arrange images in a grid, each fitted into a square of `cell` pixels above its caption."""
    cells = []
    for image, lines, color in zip(images, captions, colors, strict=True):
        square = ImageOps.pad(fit(image, cell), (cell, cell), color=(242, 242, 242))
        cells.append(with_caption(square, lines, color=color))
    columns = max(1, min(columns, len(cells)))
    rows, gap = -(-len(cells) // columns), 8
    height = max((c.height for c in cells), default=cell)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (height + gap) + gap), "white")
    for number, drawn in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(drawn, (gap + column * (cell + gap), gap + row * (height + gap)))
    return sheet


@lru_cache(maxsize=8)
def class_colors(num_classes: int) -> tuple[RGB, ...]:
    """Return a color for each class: always the same ones, easy to tell apart for 12 classes and distinct for 150."""
    steps = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    lightness, green_red, blue_yellow = _oklab(candidates).T
    vivid = np.hypot(green_red, blue_yellow) > 0.06
    candidates = candidates[vivid & (lightness > 0.35) & (lightness < 0.93)]
    places = _oklab(candidates)
    colors = list(_FIRST_COLORS[:num_classes])
    # Each new color is the one farthest from all before it, so the first colors do not depend on the number of classes.
    distance = np.full(len(candidates), np.inf)
    for place in _oklab(np.array(_FIRST_COLORS)):
        distance = np.minimum(distance, np.linalg.norm(places - place, axis=1))
    while len(colors) < num_classes:
        best = int(distance.argmax())
        red, green, blue = candidates[best].tolist()
        colors.append((red, green, blue))
        distance = np.minimum(distance, np.linalg.norm(places - places[best], axis=1))
    return tuple(colors)


def draw_boxes(image: Image.Image, boxes_xyxy: ArrayLike, texts: Sequence[str], colors: Sequence[RGB]) -> Image.Image:
    """Draw boxes (N, 4) in pixels on a copy of an image, each with its text, if any, on a label of its color.

    A label is at the top or bottom of its box, where it hides no earlier label if there is such a place, and never
    outside the image. The first boxes are drawn on top. Lines and text are as large as suits the image.
    """
    out = image.copy()
    draw = ImageDraw.Draw(out)
    thick = max(2, round(_side(image) / 300))
    size = max(12, round(_side(image) / 42))
    pad, height = max(2, size // 5), round(1.3 * size)
    labels: list[tuple[int, int, int, str, RGB]] = []
    boxes = list(zip(_pixels(boxes_xyxy, image), texts, colors, strict=True))
    for (left, top, _, bottom), text, color in boxes:
        if text:
            text = _shorten(text, size, image.width - 2 * pad)
            width = round(font(size, text).getlength(text)) + 2 * pad
            x = max(0, min(left, image.width - width))
            beside = [other for other in labels if other[0] < x + width and x < other[0] + other[2]]
            lowest = max(0, image.height - height)
            places = [min(y, lowest) for y in (top - height, top, bottom - height, bottom) if y >= 0] or [0]
            free = [y for y in places if all(abs(y - other[1]) >= height for other in beside)]
            y = (free or places)[0]
            labels.append((x, y, width, text, color))
    for (left, top, right, bottom), _, color in reversed(boxes):
        # A dark outline keeps pale boxes visible on a pale background.
        halo = max(1, thick // 3)
        draw.rectangle((left - halo, top - halo, right + halo, bottom + halo), outline=(40, 40, 40), width=halo)
        draw.rectangle((left, top, right, bottom), outline=color, width=thick)
    for x, y, width, text, color in reversed(labels):
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
        middle = (x + width / 2, y + height / 2)
        draw.text(middle, text, fill=text_color(color), font=font(size, text), anchor="mm")
    return out


def draw_outlines(image: Image.Image, boxes_xyxy: ArrayLike) -> Image.Image:
    """Draw thin dashed boxes in black and white, distinct from those of `draw_boxes`, on a copy of an image."""
    out = image.copy()
    draw = ImageDraw.Draw(out)
    thick = max(1, round(_side(image) / 400))
    dash = 4 * thick
    for left, top, right, bottom in _pixels(boxes_xyxy, image):
        draw.line(((left, top), (right, top), (right, bottom), (left, bottom), (left, top)), fill=BLACK, width=thick)
        for x in range(left, right, 2 * dash):
            for y in (top, bottom):
                draw.line((x, y, min(x + dash, right), y), fill=WHITE, width=thick)
        for y in range(top, bottom, 2 * dash):
            for x in (left, right):
                draw.line((x, y, x, min(y + dash, bottom)), fill=WHITE, width=thick)
    return out


def draw_label_map(
    image: Image.Image, label_map: NDArray[np.uint8], classes: Sequence[str], *, opacity: float = 0.55
) -> Image.Image:
    """Color a copy of an image by class; the background gets no color, nor do pixels with `IGNORE`.

    Shape: label_map (H, W), the size of the image.
    """
    colors = np.zeros((256, 3), np.float32)
    colors[: len(classes)] = class_colors(len(classes))
    weight = np.full(256, opacity, np.float32)
    weight[[IGNORE, *background(classes)]] = 0
    weights = weight[label_map][..., None]
    return Image.fromarray((np.asarray(image) * (1 - weights) + colors[label_map] * weights).round().astype(np.uint8))


def background(classes: Sequence[str]) -> list[int]:
    """List the numbers of the classes named "background"; there is one at most, usually."""
    return [number for number, name in enumerate(classes) if name.strip("_").lower() == "background"]


def with_legend(image: Image.Image, texts: Mapping[int, str], num_classes: int) -> Image.Image:
    """Put a legend below an image: squares in the colors of classes with texts, in as many lines as needed."""
    if not texts:
        return image
    size = max(12, round(_side(image) / 38))
    pad, line = size // 2, round(1.5 * size)
    places, x, y = [], pad, pad
    for label, text in texts.items():
        text = _shorten(text, size, image.width - 3 * pad - size)
        width = size + pad + round(font(size, text).getlength(text))
        if x > pad and x + width > image.width - pad:
            x, y = pad, y + line
        places.append((x, y, text, class_colors(num_classes)[label]))
        x += width + 2 * pad
    out = Image.new("RGB", (image.width, image.height + y + line + pad // 2), "white")
    out.paste(image)
    draw = ImageDraw.Draw(out)
    for x, y, text, color in places:
        top = image.height + y
        draw.rectangle((x, top, x + size - 1, top + size - 1), fill=color, outline=(90, 90, 90))
        draw.text((x + size + pad, top + size / 2), text, fill=DARK, font=font(size, text), anchor="lm")
    return out


def text_color(background: RGB) -> RGB:
    """Choose black or white, whichever has the higher contrast (WCAG): at least 4.5 to 1 on any color."""
    luminance = float(_linear(np.array(background)) @ (0.2126, 0.7152, 0.0722))
    return BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else WHITE


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write an image in the format of the file's suffix, whole or not at all.

    Raises:
        MobileViTError: the suffix belongs to no image format, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise MobileViTError(f"{path}: not the name of an image; use a name that ends in .jpg or .png")
    return write_atomically(path, lambda aside: image.save(aside))


def _shorten(text: str, size: int, width: int) -> str:
    """Cut a text to fit a width in pixels, ending in dots."""
    face = font(size, text)
    if face.getlength(text) <= width:
        return text
    while len(text) > 1 and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _side(image: Image.Image) -> float:
    return float((image.width * image.height) ** 0.5)


def _pixels(boxes_xyxy: ArrayLike, image: Image.Image) -> list[list[int]]:
    """Round boxes to whole pixels inside the image."""
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    whole: list[list[int]] = boxes.clip(0, [image.width - 1, image.height - 1] * 2).round().astype(np.int64).tolist()
    return whole


def _linear(rgb: NDArray[np.int64]) -> NDArray[np.float64]:
    """Convert sRGB values 0 to 255 to linear light 0 to 1."""
    values = rgb / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _oklab(rgb: NDArray[np.int64]) -> NDArray[np.float64]:
    """Convert sRGB to Oklab, where distance is close to perceived difference (Ottosson, 2020).

    Shape: (N, 3) -> (N, 3).
    """
    to_cones = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929],
         [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    to_lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468],
         [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    lab: NDArray[np.float64] = np.cbrt(_linear(rgb) @ to_cones.T) @ to_lab.T
    return lab
