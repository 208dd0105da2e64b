"""Images for exports: those that int8 is calibrated on, and those that parity is checked on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import Source, find_images, read_image
from mobilevit.imaging.photographs import builtin_photographs
from mobilevit.imaging.preprocessing import Preprocessing

log = logging.getLogger("mobilevit")

LEAST_CALIBRATION = 32
"""Fewer images do not show what values a layer's output can take."""
MOST_CALIBRATION = 256
"""More change nothing and take time."""
MOST_PARITY = 64

Images = str | os.PathLike[str] | Sequence[Source]
"""A folder, whose images are found at any depth, or images."""


def calibration_pixels(images: Images, preprocessing: Preprocessing) -> Tensor:
    """Resized images, evenly drawn from all there are. Shape: uint8 (n, 3, H, W), n <= `MOST_CALIBRATION`.

    Raises:
        ValueError: too few can be read, or they are noise.
    """
    pixels, named, problems = _pixels(images, preprocessing, MOST_CALIBRATION)
    if len(pixels) < LEAST_CALIBRATION:
        why = f" ({len(problems)} cannot be read, such as {problems[0]})" if problems else ""
        raise MobileViTError(
            f"{named}: {len(pixels)} readable images{why}; int8 needs {LEAST_CALIBRATION} or more to calibrate on"
        )
    if problems:
        log.warning("%s: left out %d images that cannot be read, such as %s", named, len(problems), problems[0])
    smooth = torch.tensor([_neighbors_agree(image) for image in pixels])
    if (smooth < 0.5).float().mean() > 0.5:
        raise MobileViTError(
            f"{named}: most of these images are noise; int8 calibrated on noise gives wrong answers. "
            "Give images of what the model will see"
        )
    return pixels


def parity_pixels(images: Images | None, preprocessing: Preprocessing) -> tuple[Tensor, str]:
    """Resized images to compare answers on, and in words where they come from. Shape: uint8 (n, 3, H, W).

    None stands for the built-in photographs, whole and in parts.

    Raises:
        ValueError: none can be read.
    """
    if images is None:
        return torch.stack([_resized(view, preprocessing) for view in builtin_photographs()]), "built-in photographs"
    pixels, named, problems = _pixels(images, preprocessing, MOST_PARITY)
    if not len(pixels):
        raise MobileViTError(f"{named}: no image can be read" + (f"; {problems[0]}" if problems else ""))
    return pixels, named


def _pixels(images: Images, preprocessing: Preprocessing, most: int) -> tuple[Tensor, str, list[str]]:
    """Up to `most` resized images, where they come from, and what is wrong with the others."""
    if isinstance(images, str | os.PathLike):
        folder = Path(images)
        if not folder.is_dir():
            raise MobileViTError(f"{folder}: no such folder of images")
        sources: Sequence[Source] = [path for path in find_images(folder) if "masks" not in path.parts]
        named = str(folder)
    else:
        sources, named = images, f"{len(images)} images"
    found, problems = [], []
    # Spread over the whole, as folders sort by class; what cannot be read is made up for by its neighbors.
    step = max(1.0, len(sources) / most)
    order = [sources[int(place * step)] for place in range(min(most, len(sources)))]
    for number, source in enumerate(order, start=1):
        try:
            found.append(
                _resized(
                    read_image(source, None if isinstance(source, str | Path) else f"image {number}"), preprocessing
                )
            )
        except ImageError as error:
            problems.append(str(error))
    return torch.stack(found) if found else torch.empty(0, 3, *preprocessing.size, dtype=torch.uint8), named, problems


def _resized(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    return torch.from_numpy(preprocessing.resize(image)).permute(2, 0, 1)


def _neighbors_agree(pixels: Tensor) -> float:
    """Correlation of pixels with those to their right: near 1 in photographs, 0 in noise. Shape: (3, H, W) -> ()."""
    values = pixels.float().numpy()
    left, right = values[..., :-1].ravel(), values[..., 1:].ravel()
    if left.std() == 0 or right.std() == 0:
        return 1.0
    return float(np.corrcoef(left, right)[0, 1])
