"""JPEGs decoded, cropped and resized where the model is: for GPUs that few cores cannot feed.

Reading processes then only read, and draw crop and flip; the compressed images travel to the training process.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg

from mobilevit.data.transforms import decoded_pixels, random_crop
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import EncodedImage, Source, open_image
from mobilevit.imaging.preprocessing import Preprocessing

MOST_AT_ONCE = 16
"""How many times smaller one antialiased resize may make an image; the kernel for GPUs ends with an error near 47."""


class EncodedCrop(NamedTuple):
    """An image that is still to be decoded, and what is to be shown of it."""

    name: str
    """For errors."""
    data: bytes | Tensor
    """A JPEG that the device can decode; of others the pixels, uint8 (3, H, W)."""
    crop: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels."""
    size: tuple[int, int]
    """(height, width) to be resized to."""
    flip: bool
    """Whether to mirror it."""


@dataclass(frozen=True, kw_only=True)
class EncodedCropTransform:
    """What `ClassificationTransform` draws, with the same random numbers, without doing it."""

    preprocessing: Preprocessing
    """Size."""
    min_crop_area: float
    """Smallest share of the image's area a crop may have."""
    flip: bool = True
    """Mirror half of the images."""

    def __call__(
        self, image: Source | EncodedImage, label: int, size: tuple[int, int] | None = None
    ) -> tuple[EncodedCrop, int]:
        """`size` is (height, width), where it is not that of the preprocessing."""
        encoded = open_image(image)
        crop = random_crop(encoded.size, self.min_crop_area)
        flip = self.flip and bool(torch.rand(()) < 0.5)
        data: bytes | Tensor = encoded.plain_jpeg if encoded.plain_jpeg is not None else decoded_pixels(encoded)
        return EncodedCrop(encoded.name, data, crop, size or self.preprocessing.size, flip), label


def decode_crops(crops: Sequence[EncodedCrop], device: torch.device) -> tuple[Tensor, list[int], list[str]]:
    """Decode, crop, resize (bicubic, antialiased) and mirror on a device; all crops have one size.

    Returns:
        uint8 (B, 3, height, width), channels-last in memory; the places in `crops` of those B; and a line for each
        image that cannot be decoded.
    """
    shown, places, errors = [], [], []
    for place, (crop, pixels) in enumerate(zip(crops, _decoded(crops, device), strict=True)):
        if isinstance(pixels, ImageError):
            errors.append(str(pixels))
            continue
        left, top, right, bottom = crop.crop
        part = pixels[None, :, top:bottom, left:right].to(device, torch.float32)
        sides = zip(part.shape[2:], crop.size, strict=True)
        factors = [math.ceil(before / (after * MOST_AT_ONCE)) for before, after in sides]
        if max(factors) > 1:
            part = nn.functional.avg_pool2d(part, factors, ceil_mode=True)
        resized = nn.functional.interpolate(part, crop.size, mode="bicubic", antialias=True)
        shown.append(resized[0].flip(-1) if crop.flip else resized[0])
        places.append(place)
    height, width = crops[0].size
    images = torch.stack(shown) if shown else torch.empty(0, 3, height, width, device=device)
    images = images.round().clamp(0, 255).to(torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), places, errors


def require_decoder(device: torch.device) -> None:
    """See that a device decodes JPEGs, as `decode_crops` would otherwise do without it, slowly and silently.

    Raises:
        ValueError: it does not.
    """
    if device.type != "cuda":
        return
    gray = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(gray, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(gray.getvalue()), dtype=torch.uint8)], device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MobileViTError(f"--decode device: this GPU cannot decode JPEGs ({reason}); use --decode cpu") from None


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        # The decoder writes from a stream of its own, which does not wait for this one to have read what lay in the
        # memory before.
        torch.cuda.current_stream(device).synchronize()
    pixels: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return pixels


def _decoded(crops: Sequence[EncodedCrop], device: torch.device) -> list[Tensor | ImageError]:
    """Pixels, uint8 (3, H, W), or why there are none."""
    encoded = [place for place, crop in enumerate(crops) if isinstance(crop.data, bytes)]
    found: dict[int, Tensor | ImageError] = {}
    try:
        buffers = [torch.frombuffer(bytearray(crops[place].data), dtype=torch.uint8) for place in encoded]
        if buffers:
            found = dict(zip(encoded, _decode(buffers, device), strict=True))
    except RuntimeError:  # one of them is damaged, or of a kind that the device does not know
        found = {place: _by_itself(crops[place]) for place in encoded}
    return [crop.data if isinstance(crop.data, Tensor) else found[place] for place, crop in enumerate(crops)]


def _by_itself(crop: EncodedCrop) -> Tensor | ImageError:
    assert isinstance(crop.data, bytes)
    try:
        return decoded_pixels(open_image(crop.data, crop.name))
    except ImageError as error:
        return error
