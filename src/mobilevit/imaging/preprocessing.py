"""Preprocessing: from an image to the input of a model.

Evaluation, `Predictor` and every exported artifact use the `Preprocessing` in the checkpoint. The input of every model
is RGB in 0..1 (before mean and std), wherever its weights come from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.errors import MobileViTError
from mobilevit.files import Json

RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The part of an image that the model's input shows, and its place there; maps boxes between the two."""

    image: tuple[int, int]
    """(height, width) of the image."""
    region: tuple[float, float, float, float]
    """Left, top, right, bottom of the visible part, in pixels of the image."""
    size: tuple[int, int]
    """(height, width) of the input."""
    filled: tuple[int, int]
    """(height, width) that the region takes at the top left of the input; the rest is padding."""

    def to_input(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map boxes from pixels of the image to 0..1 of the input, cut off at its border. Shape: (N, 4) -> (N, 4)."""
        offset, scale = self._offset_and_scale()
        moved: NDArray[np.float64] = (boxes_xyxy - offset) / scale
        return moved.clip(0, 1)

    def to_image(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map boxes from 0..1 of the input to pixels of the image, cut off at its border. Shape: (N, 4) -> (N, 4)."""
        offset, scale = self._offset_and_scale()
        rows, columns = self.image
        return (boxes_xyxy * scale + offset).clip(0, [columns, rows, columns, rows])

    def _offset_and_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute both for left, top, right, bottom: 0..1 of the input times scale, plus offset, is pixels."""
        left, top, right, bottom = self.region
        (height, width), (filled_height, filled_width) = self.size, self.filled
        scale_x, scale_y = width / filled_width * (right - left), height / filled_height * (bottom - top)
        return np.array([left, top, left, top]), np.array([scale_x, scale_y, scale_x, scale_y])


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the input of a model; stored in checkpoints and exported artifacts.

    Resizing always antialiases (Pillow's filters). The defaults are those of the paper's evaluation.

    Raises:
        MobileViTError: a field has an impossible value.
    """

    size: tuple[int, int] = (256, 256)
    """(height, width) of the model's input in pixels."""
    resize_mode: Literal["crop", "stretch", "pad"] = "crop"
    """"crop": the largest centered region with the proportions of the input, times `crop_fraction`; "stretch": the
    whole image; "pad": the whole image in its own proportions, at the top left, with black beside or below it."""
    crop_fraction: float = 256 / 288
    """Share of each side that "crop" keeps."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Resampling filter."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from RGB in 0..1."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divisor after subtracting `mean`."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 32:
            raise MobileViTError(f"image size {tuple(self.size)} is too small; both sides must be 32 pixels or more")
        if not 0 < self.crop_fraction <= 1:
            raise MobileViTError(f"`crop_fraction` is {self.crop_fraction}; it must be above 0 and at most 1")
        if self.resize_mode not in ("crop", "stretch", "pad"):
            raise MobileViTError(f"`resize_mode` is {self.resize_mode!r}; it can be 'crop', 'stretch' or 'pad'")
        if self.interpolation not in RESAMPLING:
            raise MobileViTError(f"`interpolation` is {self.interpolation!r}; choose from {', '.join(RESAMPLING)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise MobileViTError(f"`mean` is {self.mean}, `std` {self.std}; both have three numbers, std all above 0")

    def placement(self, image: tuple[int, int]) -> Placement:
        """Compute where an image of (height, width) pixels goes in the input."""
        (height, width), (rows, columns) = self.size, image
        region, filled = (0.0, 0.0, float(columns), float(rows)), self.size
        if self.resize_mode == "crop":
            scale = min(columns / width, rows / height) * self.crop_fraction
            left, top = (columns - width * scale) / 2, (rows - height * scale) / 2
            right, bottom = left + width * scale, top + height * scale
            # Rounding errors can put the sums outside the image, which Pillow refuses.
            region = (max(left, 0.0), max(top, 0.0), min(right, columns), min(bottom, rows))
        elif self.resize_mode == "pad":
            scale = min(width / columns, height / rows)
            filled = (max(1, round(rows * scale)), max(1, round(columns * scale)))
        return Placement(image=image, region=region, size=self.size, filled=filled)

    def resize(self, image: Image.Image) -> NDArray[np.uint8]:
        """Crop, resize and pad an RGB image by `resize_mode`, in one resampling step. Shape: (height, width, 3)."""
        placement = self.placement((image.height, image.width))
        resample = RESAMPLING[self.interpolation]
        resized = np.array(image.resize(placement.filled[::-1], resample, placement.region))
        if placement.filled == placement.size:
            return resized
        whole = np.zeros((*placement.size, 3), np.uint8)
        whole[: placement.filled[0], : placement.filled[1]] = resized
        return whole

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale to 0..1, subtract mean, divide by std. Shape: (B, H, W, 3) -> (B, 3, H, W), contiguous."""
        x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        x /= np.float32(255)
        if any(self.mean) or any(s != 1 for s in self.std):
            x -= np.array(self.mean, np.float32)[:, None, None]
            x /= np.array(self.std, np.float32)[:, None, None]
        return x

    def to_dict(self) -> Json:
        """Return plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Json) -> Preprocessing:
        """Make a `Preprocessing` from the values of `to_dict`."""
        known: Json = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)
