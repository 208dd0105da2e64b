"""Read any image file as upright 8-bit RGB."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from mobilevit.errors import ImageError, TooManyPixelsError, one_line
from mobilevit.files import reading_from

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""An image: a path, encoded bytes, a PIL image, or a numpy array (H, W, 3) of uint8."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})

MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs: Pillow's own limit, half a gigabyte of RGB."""

_MAX_SCANS = 100
"""Limit for a JPEG; progressive ones have about ten. A scan of twelve bytes makes the decoder visit all pixels again,
so a small file could keep it busy for hours. libtiff has the same limit for JPEGs in TIFF files."""

# Formats with a decoder in Pillow itself. Others, such as EPS, start external programs on untrusted files.
_SAFE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def find_images(folder: Path) -> list[Path]:
    """Find every image below a folder, by suffix, sorted; hidden files and folders are skipped.

    Raises:
        ReadError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        with reading_from(error.filename):
            raise error

    found = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]


def read_image(source: Source | EncodedImage, name: str | None = None) -> Image.Image:
    """Decode an image to upright 8-bit RGB; `name` is its name in errors, unless it is a path.

    Takes JPEG, PNG, WebP, BMP, GIF, TIFF, PPM and AVIF in any color mode: the first frame of animations, the high
    byte of 16-bit samples, CMYK and palettes converted, transparency laid over white, EXIF orientation applied.

    Raises:
        ImageError: empty, truncated, not an image, or more than `MAX_PIXELS`.
    """
    return open_image(source, name).decode()


def open_image(source: Source | EncodedImage, name: str | None = None, *, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Read an image's header, not yet its pixels; arguments and errors are those of `read_image`.

    Raises:
        TooManyPixelsError: encoded bytes or a file have more than `max_pixels`, itself at most `MAX_PIXELS`.
    """
    if isinstance(source, EncodedImage):
        return source
    name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "image")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            wanted = "an image is uint8 (height, width, 3), RGB"
            raise ImageError(f"{name}: array is {source.dtype} {source.shape}; {wanted}")
        return EncodedImage(Image.fromarray(source), name)
    if isinstance(source, Image.Image):  # perhaps not decoded yet
        if 0 in source.size:
            raise ImageError(f"{name}: {source.width} x {source.height} pixels; an image has at least one")
        with _pillow_errors(name):
            source = source.copy()  # the caller's image stays unchanged
        return EncodedImage(source, name)
    data = source if isinstance(source, bytes) else _read_file(source, name)
    if not data:
        raise ImageError(f"{name}: the file is empty")
    with _pillow_errors(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below decides
        image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > max_pixels:
        message = f"{image.width} x {image.height} pixels are more than the limit of {max_pixels}"
        raise TooManyPixelsError(f"{name}: {message}")
    if image.format in ("JPEG", "MPO") and _has_too_many_scans(data):
        raise ImageError(f"{name}: more than the limit of {_MAX_SCANS} scans, which would take too long to decode")
    return EncodedImage(image, name, data)


class EncodedImage:
    """An image whose header has been read; `decode` reads the pixels, once."""

    def __init__(self, image: Image.Image, name: str, data: bytes | None = None) -> None:
        self._image, self.name = image, name
        with _pillow_errors(name):
            orientation = image.getexif().get(_ORIENTATION, 1)
        self.size: tuple[int, int] = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        """(width, height) of the upright image."""
        is_plain = image.format == "JPEG" and image.mode == "RGB" and orientation == 1
        self.plain_jpeg = data if is_plain else None
        """The file, if it is an upright JPEG in color, which any decoder can read."""

    def decode(self, reduction: float = 1.0) -> Image.Image:
        """Decode to upright RGB; a JPEG that may be smaller is decoded at a half, a quarter or an eighth of its size.

        Raises:
            ImageError: the pixels cannot be read.
        """
        image = self._image
        with _pillow_errors(self.name):
            if reduction >= 2 and isinstance(image, JpegImageFile):
                width, height = image.size
                image.draft(None, (max(1, int(width / reduction)), max(1, int(height / reduction))))
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:  # otherwise Pillow would copy the image
                image = ImageOps.exif_transpose(image)
        image = _to_8_bits(image)
        with _pillow_errors(self.name):
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")


_ORIENTATION = 0x0112  # the EXIF tag


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turn anything that Pillow raises on damaged files, which is much, into an `ImageError` with the image's name.

    So that no bug of ours is taken for a damaged file, these blocks hold nothing but calls of Pillow.
    """
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise TooManyPixelsError(f"{name}: more pixels than the limit of {MAX_PIXELS}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(_formats())})") from None
    except Exception as error:
        raise ImageError(f"{name}: cannot be read ({one_line(error)})") from error


def _read_file(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path, as in a list that is none
        raise ImageError(f"{name}: cannot be read ({one_line(error)})") from error


_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
"""A marker with a length; those without may occur within the data of a scan."""
_SCAN, _END = b"\xda", b"\xd9"


def _has_too_many_scans(data: bytes) -> bool:
    # Nearly every file passes this quick test. The others are parsed: thumbnails, profiles or a video appended to the
    # image can contain these bytes as well.
    if data.count(b"\xff" + _SCAN) <= _MAX_SCANS:
        return False
    scans, at = 0, 0
    while (marker := _JPEG_MARKER.search(data, at)) is not None and marker[1] != _END and scans <= _MAX_SCANS:
        scans += marker[1] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans > _MAX_SCANS


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """List the safe formats that this build of Pillow has; it loads most of its decoders only when asked."""
    Image.init()
    return tuple(name for name in _SAFE_FORMATS if name in Image.OPEN)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit and floating-point grays to 8 bits; other images pass."""
    if image.mode.startswith("I"):  # 16-bit grays, also those that Pillow keeps in 32 bits
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        return Image.fromarray((values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 255).astype(np.uint8))
    return image
