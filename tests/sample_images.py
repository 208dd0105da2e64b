"""Images that are made on the spot, and their encoded bytes."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(2 * math.pi * (a * x / width + b * y / height)) for a, b in ((1, 2), (2, -1), (0, 1))]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    return encoded(Image.fromarray(noise), "JPEG")
