"""Targets of detection and segmentation, as data have them: the boxes and the mask of one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.errors import ImageError, one_line


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The objects of one image, perhaps none."""

    xyxy: NDArray[np.float32]
    """(N, 4): left, top, right, bottom in pixels of the upright image."""
    labels: NDArray[np.int64]
    """(N,): index into the classes."""
    crowd: NDArray[np.bool_]
    """(N,): objects that are neither trained on nor counted (COCO's crowds, VOC's difficult objects)."""
    areas: NDArray[np.float32]
    """(N,): pixels of the object itself if the data say so, else of its box."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A label map in a file: a gray or palette image whose values are class numbers."""

    path: Path
    class_of: bytes
    """256 entries: for each value in the file the class index, or `IGNORE`."""

    def read(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Read the class indices, or `IGNORE`, of all pixels. Shape: uint8 (H, W).

        Raises:
            ImageError: another size than that of the image, (height, width), or see `read_label_map`.
        """
        label_map = np.frombuffer(self.class_of, np.uint8)[read_label_map(self.path)]
        if size is not None and size != label_map.shape:
            (rows, columns), (height, width) = label_map.shape, size
            raise ImageError(
                f"{self.path}: {columns} x {rows} pixels, its image has {width} x {height}; they must agree"
            )
        return label_map


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """Read the values of a mask file. Shape: uint8 (H, W).

    Raises:
        ImageError: missing, unreadable, in color, or with values above 255.
    """
    try:
        with Image.open(path, formats=("PNG", "BMP", "TIFF", "GIF")) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise ImageError(
                    f"{path}: a mask in {image.mode}; save it as a gray or palette PNG whose values are class numbers"
                )
            values = np.asarray(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such mask") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise ImageError(f"{path}: cannot be read ({one_line(error)})") from error
    if values.dtype != np.bool_ and values.max(initial=0) > 255:
        raise ImageError(f"{path}: has the value {values.max()}; class numbers end at 255")
    return values.astype(np.uint8)
