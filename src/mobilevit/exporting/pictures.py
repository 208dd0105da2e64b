"""Pictures for exports: those that int8 is calibrated on, and those that parity is checked on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mobilevit.preprocessing import ImageError, Preprocessing, Source, find_images, read_image

log = logging.getLogger("mobilevit")

LEAST_CALIBRATION = 32
"""Fewer pictures do not show what values a layer's output can take."""
MOST_CALIBRATION = 256
"""More change nothing and take time."""
MOST_PARITY = 64

Pictures = str | os.PathLike[str] | Sequence[Source]
"""A folder, whose pictures are found at any depth, or pictures."""


def calibration_pixels(pictures: Pictures, preprocessing: Preprocessing) -> Tensor:
    """Resized pictures, evenly drawn from all there are. Shape: uint8 (n, 3, H, W), n <= `MOST_CALIBRATION`.

    Raises:
        ValueError: too few can be read, or they are noise.
    """
    pixels, named, problems = _pixels(pictures, preprocessing, MOST_CALIBRATION)
    if len(pixels) < LEAST_CALIBRATION:
        why = f" ({len(problems)} cannot be read, such as {problems[0]})" if problems else ""
        raise ValueError(
            f"{named}: {len(pixels)} readable pictures{why}; int8 needs {LEAST_CALIBRATION} or more to calibrate on"
        )
    if problems:
        log.warning("%s: left out %d pictures that cannot be read, such as %s", named, len(problems), problems[0])
    smooth = torch.tensor([_neighbours_agree(picture) for picture in pixels])
    if (smooth < 0.5).float().mean() > 0.5:
        raise ValueError(
            f"{named}: most of these pictures are noise; int8 calibrated on noise gives wrong answers. "
            "Give pictures of what the model will see"
        )
    return pixels


def parity_pixels(pictures: Pictures | None, preprocessing: Preprocessing) -> tuple[Tensor, str]:
    """Resized pictures to compare answers on, and in words where they come from. Shape: uint8 (n, 3, H, W).

    None stands for the built-in photographs, whole and in parts.

    Raises:
        ValueError: none can be read.
    """
    if pictures is None:
        views = [
            view for path in find_images(Path(__file__).parent / "photographs") for view in _views(read_image(path))
        ]
        return torch.stack([preprocessing.resize(view) for view in views]), "built-in photographs"
    pixels, named, problems = _pixels(pictures, preprocessing, MOST_PARITY)
    if not len(pixels):
        raise ValueError(f"{named}: no picture can be read" + (f"; {problems[0]}" if problems else ""))
    return pixels, named


def _views(picture: Image.Image) -> list[Image.Image]:
    """A picture, its four quarters and its middle."""
    width, height = picture.size
    starts = [(0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2), (width // 4, height // 4)]
    return [picture, *(picture.crop((x, y, x + width // 2, y + height // 2)) for x, y in starts)]


def _pixels(pictures: Pictures, preprocessing: Preprocessing, most: int) -> tuple[Tensor, str, list[str]]:
    """Up to `most` resized pictures, where they come from, and what is wrong with the others."""
    if isinstance(pictures, str | os.PathLike):
        folder = Path(pictures)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of pictures")
        sources: Sequence[Source] = [path for path in find_images(folder) if "masks" not in path.parts]
        named = str(folder)
    else:
        sources, named = pictures, f"{len(pictures)} pictures"
    found, problems = [], []
    # Spread over the whole, as folders sort by class; what cannot be read is made up for by its neighbours.
    step = max(1.0, len(sources) / most)
    order = [sources[int(place * step)] for place in range(min(most, len(sources)))]
    for number, source in enumerate(order, start=1):
        try:
            found.append(
                preprocessing.resize(
                    read_image(source, None if isinstance(source, str | Path) else f"picture {number}")
                )
            )
        except ImageError as error:
            problems.append(str(error))
    return torch.stack(found) if found else torch.empty(0, 3, *preprocessing.size, dtype=torch.uint8), named, problems


def _neighbours_agree(pixels: Tensor) -> float:
    """Correlation of pixels with those to their right: near 1 in photographs, 0 in noise. Shape: (3, H, W) -> ()."""
    values = pixels.float().numpy()
    left, right = values[..., :-1].ravel(), values[..., 1:].ravel()
    if left.std() == 0 or right.std() == 0:
        return 1.0
    return float(np.corrcoef(left, right)[0, 1])
