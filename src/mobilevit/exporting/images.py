"""Images for exports: to calibrate int8 on, and to compare answers on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import Source, find_images, read_image
from mobilevit.imaging.photographs import builtin_photographs
from mobilevit.imaging.preprocessing import Preprocessing

log = logging.getLogger("mobilevit")

_MIN_CALIBRATION = 32
"""Fewer images do not show which values the outputs of a layer can take."""
_MAX_CALIBRATION = 256
"""More change nothing and take time."""
_MAX_PARITY = 64

Images = str | os.PathLike[str] | Sequence[Source]
"""A folder, whose images are found at any depth, or images."""


def calibration_pixels(images: Images, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Read and resize images (n, H, W, 3) for calibration, evenly drawn from all there are.

    Raises:
        MobileViTError: too few can be read, or they are noise.
    """
    pixels, origin, problems = _read(images, preprocessing, _MAX_CALIBRATION)
    if len(pixels) < _MIN_CALIBRATION:
        why = f" ({len(problems)} cannot be read, such as {problems[0]})" if problems else ""
        raise MobileViTError(
            f"{origin}: {len(pixels)} readable images{why}; int8 needs {_MIN_CALIBRATION} or more to calibrate on"
        )
    if problems:
        log.warning("%s: left out %d images that cannot be read, such as %s", origin, len(problems), problems[0])
    if np.mean([_correlation_of_neighbors(image) < 0.5 for image in pixels]) > 0.5:
        raise MobileViTError(
            f"{origin}: most of these images are noise; int8 calibrated on noise gives wrong answers. "
            "Give images like those that the model will see"
        )
    return np.stack(pixels)


def parity_pixels(images: Images | None, preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], str]:
    """Read and resize images (n, H, W, 3) to compare answers on, or built-in photographs; say where they come from.

    Raises:
        MobileViTError: none can be read.
    """
    if images is None:
        return np.stack([preprocessing.resize(view) for view in builtin_photographs()]), "built-in photographs"
    pixels, origin, problems = _read(images, preprocessing, _MAX_PARITY)
    if not pixels:
        raise MobileViTError(f"{origin}: no image can be read" + (f"; {problems[0]}" if problems else ""))
    return np.stack(pixels), origin


def _read(images: Images, preprocessing: Preprocessing, most: int) -> tuple[list[NDArray[np.uint8]], str, list[str]]:
    """Read up to `most` images; return them, where they come from, and what is wrong with the unreadable ones."""
    if isinstance(images, str | os.PathLike):
        folder = Path(images)
        if not folder.is_dir():
            raise MobileViTError(f"{folder}: no such folder of images")
        sources: Sequence[Source] = [path for path in find_images(folder) if "masks" not in path.parts]
        origin = str(folder)
    else:
        sources, origin = images, f"{len(images)} images"
    found, problems = [], []
    count = min(most, len(sources))
    for number in range(count):
        source = sources[number * len(sources) // count]  # spread over the whole, as folders sort by class
        name = None if isinstance(source, str | Path) else f"image {number + 1}"
        try:
            found.append(preprocessing.resize(read_image(source, name)))
        except ImageError as error:
            problems.append(str(error))
    return found, origin, problems


def _correlation_of_neighbors(pixels: NDArray[np.uint8]) -> float:
    """Correlate pixels with those to their right: near 1 in photographs, 0 in noise. Shape: (H, W, 3) -> ()."""
    left, right = pixels[:, :-1].ravel(), pixels[:, 1:].ravel()
    if left.std() == 0 or right.std() == 0:
        return 1.0
    return float(np.corrcoef(left, right)[0, 1])
