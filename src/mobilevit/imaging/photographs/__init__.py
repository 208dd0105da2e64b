"""Photographs that come with the package, to compare engines and export formats on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mobilevit.imaging.decode import find_images, read_image


def builtin_photographs() -> list[Image.Image]:
    """Read the built-in photographs: each whole, its four quarters, and its middle."""
    return [view for path in find_images(Path(__file__).parent) for view in _views(read_image(path))]


def _views(image: Image.Image) -> list[Image.Image]:
    width, height = image.size
    starts = [(0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2), (width // 4, height // 4)]
    return [image, *(image.crop((x, y, x + width // 2, y + height // 2)) for x, y in starts)]
