"""The one place where a picture becomes a tensor.

Training-time evaluation, `Predictor` and every exported artefact share the `Preprocessing` that a checkpoint carries.
The contract: a model is fed RGB in 0..1 (before mean and std), whatever its weights' origin.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""What can be read as a picture: a path, encoded bytes, a PIL image, or a numpy array (H, W, 3) of uint8."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})

MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs: Pillow's own limit, half a gigabyte of RGB."""

_MAX_SCANS = 100
"""Of a JPEG; progressive ones have ten or so. A scan of twelve bytes makes the decoder go through all the pixels again,
so that a small file could keep it busy for hours. libtiff has the same limit for JPEGs within TIFFs."""

# Formats with a decoder in Pillow itself. Others (EPS, for one) start outside programs on files from strangers.
_SAFE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def find_images(folder: Path) -> list[Path]:
    """Every picture below a folder, by suffix, sorted; hidden files and folders are passed over."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]


class ImageError(ValueError):
    """A picture that cannot be read; the message names it and says why."""


class TooManyPixelsError(ImageError):
    """A picture that may be whole, but is too large to decode."""


def read_image(source: Source | EncodedImage, name: str | None = None) -> Image.Image:
    """Decode a picture to upright 8-bit RGB.

    Takes JPEG, PNG, WebP, BMP, GIF, TIFF, PPM and AVIF in any colour mode: the first frame of animations, the high
    byte of 16-bit samples, CMYK and palettes converted, transparency laid over white, EXIF orientation applied.

    Args:
        source: see `Source`; or what `open_image` has opened.
        name: what to call the picture in errors; a path is its own name.

    Raises:
        ImageError: empty, truncated, not a picture, or more than `MAX_PIXELS`.
    """
    return open_image(source, name).decode()


def open_image(source: Source | EncodedImage, name: str | None = None, *, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Read a picture's header, not yet its pixels; arguments and errors are those of `read_image`.

    Raises:
        TooManyPixelsError: encoded bytes or a file have more than `max_pixels`, itself no more than `MAX_PIXELS`.
    """
    if isinstance(source, EncodedImage):
        return source
    name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "picture")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            wanted = "a picture is uint8 (height, width, 3), RGB"
            raise ImageError(f"{name}: array is {source.dtype} {source.shape}; {wanted}")
        return EncodedImage(Image.fromarray(source), name)
    with _named(name):
        if isinstance(source, Image.Image):  # perhaps not decoded yet
            if 0 in source.size:
                raise ImageError(f"{name}: {source.width} x {source.height} pixels are no picture")
            return EncodedImage(source.copy(), name)  # the caller's stays the caller's
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise ImageError(f"{name}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below decides
            image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > max_pixels:
            told = f"{image.width} x {image.height} pixels are more than the limit of {max_pixels}"
            raise TooManyPixelsError(f"{name}: {told}")
        if image.format in ("JPEG", "MPO") and _has_too_many_scans(data):
            raise ImageError(f"{name}: more than the limit of {_MAX_SCANS} scans, which would take too long to decode")
        return EncodedImage(image, name, data)


class EncodedImage:
    """A picture of which the size is known, and the pixels can be had, once."""

    def __init__(self, image: Image.Image, name: str, data: bytes | None = None) -> None:
        self._image, self.name = image, name
        with _named(name):
            orientation = image.getexif().get(_ORIENTATION, 1)
        self.size: tuple[int, int] = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        """(width, height) of the upright picture."""
        is_plain = image.format == "JPEG" and image.mode == "RGB" and orientation == 1
        self.plain_jpeg = data if is_plain else None
        """The file, if it is an upright JPEG in colour, which any decoder can read."""

    def decode(self, reduction: float = 1.0) -> Image.Image:
        """The upright RGB picture; a JPEG perhaps smaller.

        Args:
            reduction: how many times smaller it may be. A JPEG is then decoded at a half, a quarter or an eighth,
                which leaves out most of the work; other formats stay as they are.

        Raises:
            ImageError: the pixels cannot be read.
        """
        with _named(self.name):
            if reduction >= 2 and isinstance(self._image, JpegImageFile):
                width, height = self._image.size
                self._image.draft(None, (max(1, int(width / reduction)), max(1, int(height / reduction))))
            return _to_rgb(self._image)

    def pixels(self, reduction: float = 1.0) -> Tensor:
        """What `decode` gives, as uint8 (3, height, width), channels-last in memory; of most JPEGs in half the time.

        Raises:
            ImageError: the pixels cannot be read.
        """
        if self.plain_jpeg is not None and reduction < 2:
            from torchvision.io import decode_jpeg  # equal to Pillow's, but laid out as pixels are used here

            with suppress(RuntimeError):  # Pillow says what is wrong
                pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(self.plain_jpeg), dtype=torch.uint8))
                return pixels
        return torch.from_numpy(np.array(self.decode(reduction))).permute(2, 0, 1)


_ORIENTATION = 0x0112  # the EXIF tag


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever goes wrong in reading a picture, as an `ImageError` with its name."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise TooManyPixelsError(f"{name}: more pixels than the limit of {MAX_PIXELS}") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in a known format ({', '.join(_formats())})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise ImageError(f"{name}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from error


_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
"""Not those without a length, which may stand within the data of a scan."""
_SCAN, _END = b"\xda", b"\xd9"


def _has_too_many_scans(data: bytes) -> bool:
    if data.count(b"\xff" + _SCAN) <= _MAX_SCANS:  # quick, and true of nearly all; others are looked at closely, as
        return False  # thumbnails, profiles or a film behind the picture can have these bytes as well
    scans, at = 0, 0
    while (marker := _JPEG_MARKER.search(data, at)) is not None and marker[1] != _END and scans <= _MAX_SCANS:
        scans += marker[1] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans > _MAX_SCANS


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The safe formats that this build of Pillow has; it loads most of its decoders only when asked."""
    Image.init()
    return tuple(name for name in _SAFE_FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:  # otherwise Pillow would copy the picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys, also those that Pillow keeps in 32 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part of a picture a model's input shows, and where in it; for the way back from outputs to the picture."""

    picture: tuple[int, int]
    """(height, width) of the picture."""
    region: tuple[float, float, float, float]
    """Left, top, right, bottom of the part that is shown, in pixels of the picture."""
    size: tuple[int, int]
    """(height, width) of the input."""
    filled: tuple[int, int]
    """(height, width) of what the region became, at the top left of the input; the rest is margin."""

    def to_input(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes from pixels of the picture to 0..1 of the input, cut at its border. Shape: (N, 4) -> (N, 4)."""
        offset, scale = self._offset_and_scale()
        moved: NDArray[np.float64] = (boxes_xyxy - offset) / scale
        return moved.clip(0, 1)

    def to_picture(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes from 0..1 of the input to pixels of the picture, cut at its border. Shape: (N, 4) -> (N, 4)."""
        offset, scale = self._offset_and_scale()
        rows, columns = self.picture
        return (boxes_xyxy * scale + offset).clip(0, [columns, rows, columns, rows])

    def _offset_and_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of left, top, right, bottom: 0..1 of the input times scale plus offset are pixels of the picture."""
        left, top, right, bottom = self.region
        (height, width), (filled_height, filled_width) = self.size, self.filled
        scale_x, scale_y = width / filled_width * (right - left), height / filled_height * (bottom - top)
        return np.array([left, top, left, top]), np.array([scale_x, scale_y, scale_x, scale_y])


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the input of a model; travels inside checkpoints and exported artefacts.

    Resizing always antialiases (Pillow's filters). The defaults are the paper's evaluation: the middle 256 of 288
    pixels on the shorter side.

    Raises:
        ValueError: a field has no meaning.
    """

    size: tuple[int, int] = (256, 256)
    """(height, width) of the model's input in pixels."""
    resize_mode: Literal["crop", "stretch", "pad"] = "crop"
    """"crop": the largest centred region of the right shape, times `crop_fraction`; "stretch": the whole picture;
    "pad": the whole picture in its own shape, at the top left, and black beside or below it."""
    crop_fraction: float = 256 / 288
    """Share of each side that "crop" keeps."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Resampling filter."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from RGB in 0..1."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divides what is left."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 32:
            raise ValueError(f"image size {tuple(self.size)} is too small; both sides must be 32 pixels or more")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction is {self.crop_fraction}; it must be above 0 and at most 1")
        if self.resize_mode not in ("crop", "stretch", "pad"):
            raise ValueError(f"resize_mode is {self.resize_mode!r}; it can be 'crop', 'stretch' or 'pad'")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation is {self.interpolation!r}; choose from {', '.join(RESAMPLING)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean is {self.mean}, std {self.std}; each has three numbers, std's above 0")

    def placement(self, picture: tuple[int, int]) -> Placement:
        """Where a picture of (height, width) pixels lands."""
        (height, width), (rows, columns) = self.size, picture
        region, filled = (0.0, 0.0, float(columns), float(rows)), self.size
        if self.resize_mode == "crop":
            scale = min(columns / width, rows / height) * self.crop_fraction
            left, top = (columns - width * scale) / 2, (rows - height * scale) / 2
            right, bottom = left + width * scale, top + height * scale
            # The sums can pass the border by a rounding error, which Pillow refuses.
            region = (max(left, 0.0), max(top, 0.0), min(right, columns), min(bottom, rows))
        elif self.resize_mode == "pad":
            scale = min(width / columns, height / rows)
            filled = (max(1, round(rows * scale)), max(1, round(columns * scale)))
        return Placement(picture=picture, region=region, size=self.size, filled=filled)

    def resize(self, image: Image.Image) -> Tensor:
        """Crop, resize and pad as the mode says, in one resampling.

        Shape: RGB picture of any size -> uint8 (3, height, width), channels-last in memory.
        """
        placement = self.placement((image.height, image.width))
        resample = RESAMPLING[self.interpolation]
        resized = np.array(image.resize(placement.filled[::-1], resample, placement.region))
        if placement.filled != placement.size:
            whole = np.zeros((*placement.size, 3), np.uint8)
            whole[: placement.filled[0], : placement.filled[1]] = resized
            resized = whole
        return torch.from_numpy(resized).permute(2, 0, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale to 0..1, subtract mean, divide by std.

        Shape: uint8 (..., 3, H, W) -> float32 (..., 3, H, W), on the same device.
        """
        x = pixels.float() / 255
        if any(self.mean) or any(s != 1 for s in self.std):
            mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
            x = (x - mean) / std
        return x

    def __call__(self, image: Image.Image) -> Tensor:
        """One RGB picture to one model input, float32 (3, height, width)."""
        return self.normalize(self.resize(image))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)
