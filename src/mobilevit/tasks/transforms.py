"""Random changes of training images and their targets, by torchvision's transforms v2.

A transform takes an image, perhaps not decoded yet, and its target as the `ImageSet` has it. It returns uint8
(3, height, width), channels-last in memory, and the target as the loss takes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from mobilevit.class_names import IGNORE
from mobilevit.imaging.decode import EncodedImage, Source, open_image, read_image
from mobilevit.imaging.preprocessing import RESAMPLING, Preprocessing
from mobilevit.tasks.settings import ClassificationSettings, DetectionSettings, SegmentationSettings
from mobilevit.tasks.targets import Boxes, Mask

MOST_OF_ONE_CLASS = 0.75
"""Crops for segmentation in which one class has a larger share are drawn again, ten times at most."""

_GRAY = (124, 116, 104)
"""ImageNet's mean color."""


@dataclass(frozen=True, kw_only=True)
class ClassificationTransform:
    """Random resized crop and flip (arXiv:1409.4842), RandAugment (arXiv:1909.13719), erasing (arXiv:1708.04896)."""

    preprocessing: Preprocessing
    """Size and interpolation."""
    settings: ClassificationSettings
    flip: bool

    def __call__(
        self, image: Source | EncodedImage, label: int, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, int]:
        # (height, width) is given where it changes from step to step.
        height, width = size or self.preprocessing.size
        encoded = open_image(image)
        # The crop is drawn before the image is decoded: a JPEG is decoded no finer than the crop can show.
        crop = random_crop(encoded.size, self.settings.min_crop_area)
        pixels = _cropped(encoded, crop, (height, width), self.preprocessing.interpolation)
        if self.flip and _uniform(0, 1) < 0.5:
            pixels = pixels.permute(1, 2, 0).flip(1).permute(2, 0, 1)  # as the pixels lie, which is much faster
        if magnitude := self.settings.randaugment:
            augment = v2.RandAugment(num_ops=2, magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
            pixels = _pixels(augment(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
        if self.settings.random_erasing:
            pixels = v2.RandomErasing(p=self.settings.random_erasing)(pixels)
        return _channels_last(pixels), label


def _cropped(image: EncodedImage, crop: tuple[int, int, int, int], size: tuple[int, int], interpolation: str) -> Tensor:
    """Crop to left, top, right, bottom and resize to (height, width), antialiased; uint8 (3, height, width)."""
    left, top, right, bottom = crop
    reduction = min((right - left) / size[1], (bottom - top) / size[0])
    if interpolation not in ("bilinear", "bicubic"):
        return _pixels(image.decode().resize(size[::-1], RESAMPLING[interpolation], crop))
    pixels = decoded_pixels(image, reduction)
    down, across = pixels.shape[1] / image.size[1], pixels.shape[2] / image.size[0]
    rows, columns = slice(round(top * down), round(bottom * down)), slice(round(left * across), round(right * across))
    # As (H, W, 3) with an axis before it, which PyTorch knows as channels-last; its kernels for bytes then do in a
    # third of the time what Pillow's do, to one level.
    part = pixels.permute(1, 2, 0)[rows, columns].contiguous()[None].permute(0, 3, 1, 2)
    resized: Tensor = nn.functional.interpolate(part, size, mode=interpolation, antialias=True)
    return resized[0]


def decoded_pixels(image: EncodedImage, reduction: float = 1.0) -> Tensor:
    """Decode as `EncodedImage.decode` does, most JPEGs in half the time; uint8 (3, height, width), channels-last.

    Raises:
        ImageError: the pixels cannot be read.
    """
    if image.plain_jpeg is not None and reduction < 2:
        with suppress(RuntimeError):  # Pillow says what is wrong
            pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(image.plain_jpeg), dtype=torch.uint8))
            return pixels
    return _pixels(image.decode(reduction))


def random_crop(image: tuple[int, int], min_area: float) -> tuple[int, int, int, int]:
    """Draw left, top, right, bottom of a part of an image of (width, height) pixels (arXiv:1409.4842, section 6).

    It has `min_area` to 1 of the area, sides of 3:4 to 4:3; after ten attempts that do not fit, it is in the middle.
    """
    columns, rows = image
    draws = torch.rand(10, 2).tolist()
    for area, shape in draws:
        pixels = columns * rows * (min_area + (1 - min_area) * area)
        ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * shape)
        width, height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            left, top = (int(torch.randint(spare + 1, ())) for spare in (columns - width, rows - height))
            return left, top, left + width, top + height
    width, height = min(columns, max(1, round(rows * 4 / 3))), min(rows, max(1, round(columns * 4 / 3)))
    left, top = (columns - width) // 2, (rows - height) // 2
    return left, top, left + width, top + height


class BoxTargets(NamedTuple):
    """The targets of `detection_loss` for B images."""

    boxes_cxcywh: Tensor
    """float32 (B, N, 4): center and size in 0..1; rows without an object fill up."""
    labels: Tensor
    """int64 (B, N): 0..K-1, or -1 in rows without an object."""


@dataclass(frozen=True, kw_only=True)
class DetectionTransform:
    """SSD's augmentation: zoom out, crop by overlap, flip, distort colors (arXiv:1512.02325, section 2.2)."""

    preprocessing: Preprocessing
    """Size, resize mode and interpolation."""
    settings: DetectionSettings
    flip: bool
    photometric_distortion: bool

    def __call__(self, source: Source | EncodedImage, target: Boxes) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        image = read_image(source)
        keep = ~target.crowd
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(target.xyxy[keep]), format="XYXY", canvas_size=(image.height, image.width)
        )
        objects = {"boxes": boxes, "labels": torch.from_numpy(target.labels[keep])}
        steps: list[v2.Transform] = [v2.ClampBoundingBoxes()]
        if self.settings.zoom_out:
            steps.append(v2.RandomZoomOut(fill=_GRAY, side_range=(1.0, 4.0), p=self.settings.zoom_out))
        if self.settings.iou_crop and len(boxes):
            steps.append(v2.RandomIoUCrop())
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        image, objects = v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=2)])(image, objects)
        placement = self.preprocessing.placement((image.height, image.width))
        pixels = torch.from_numpy(self.preprocessing.resize(image)).permute(2, 0, 1)
        if self.photometric_distortion:
            pixels = v2.RandomPhotometricDistort()(pixels)
        corners = torch.from_numpy(placement.to_input(objects["boxes"].double().numpy())).float()
        # With "crop" the input need not show every box, and the loss takes the logarithm of the sides.
        shown = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        return _channels_last(pixels), (corners[shown], objects["labels"][shown])


def collate_boxes(targets: Sequence[tuple[Tensor, Tensor]]) -> BoxTargets:
    """Batch the corner boxes in 0..1 and labels of single images, filled up to the fullest image."""
    most = max((len(labels) for _, labels in targets), default=0)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(targets), max(most, 1), 1)
    labels = torch.full(boxes.shape[:2], -1, dtype=torch.int64)
    for row, (corners, numbers) in enumerate(targets):
        boxes[row, : len(numbers)], labels[row, : len(numbers)] = corners, numbers
    low, high = boxes[..., :2], boxes[..., 2:]
    return BoxTargets(torch.cat([(low + high) / 2, high - low], dim=-1), labels)


@dataclass(frozen=True, kw_only=True)
class SegmentationTransform:
    """Random size, crop, flip, rotation, blur and colors; what lies outside the image is labeled `IGNORE`."""

    preprocessing: Preprocessing
    """Size at scale 1, and interpolation."""
    settings: SegmentationSettings
    crop_size: tuple[int, int]
    """(height, width) of the crops."""
    flip: bool
    photometric_distortion: bool

    def __call__(self, source: Source | EncodedImage, target: Mask) -> tuple[Tensor, Tensor]:
        image = read_image(source)
        mask = torch.from_numpy(target.read((image.height, image.width)))[None]
        size = self._size_of_image((image.height, image.width))
        pixels = _pixels(F.resize(image, size, interpolation=InterpolationMode(self.preprocessing.interpolation)))
        # The "exact" one takes the middle of each pixel, as Pillow does; the other is off by up to half a pixel.
        mask = F.resize(mask, size, interpolation=InterpolationMode.NEAREST_EXACT)

        height, width = self.crop_size
        margin = [0, 0, max(0, width - size[1]), max(0, height - size[0])]
        pixels, mask = F.pad(pixels, margin), F.pad(mask, margin, fill=IGNORE)
        top, left = self._place_of_crop(mask)
        pixels, mask = F.crop(pixels, top, left, height, width), F.crop(mask, top, left, height, width)
        if self.flip and _uniform(0, 1) < 0.5:
            pixels, mask = F.horizontal_flip(pixels), F.horizontal_flip(mask)
        if self.settings.rotation and _uniform(0, 1) < 0.5:
            angle = _uniform(-self.settings.rotation, self.settings.rotation)
            pixels = F.rotate(pixels, angle, interpolation=InterpolationMode.BILINEAR)
            mask = F.rotate(mask, angle, interpolation=InterpolationMode.NEAREST, fill=IGNORE)
        if self.settings.blur and _uniform(0, 1) < self.settings.blur:
            sigma = _uniform(1, 0)  # never 0
            pixels = F.gaussian_blur(pixels, kernel_size=[7, 7], sigma=[sigma, sigma])
        if self.photometric_distortion:
            pixels = v2.RandomPhotometricDistort()(pixels)
        return _channels_last(pixels), mask[0]

    def _size_of_image(self, image: tuple[int, int]) -> list[int]:
        """Draw the (height, width) to which an image of (height, width) pixels is resized before the crop."""
        sides, most = image, self.settings.max_long_side
        if self.settings.short_side_range is None:
            scale, sides = _uniform(*self.settings.scale_range), self.preprocessing.placement(image).filled
        else:
            low, high = self.settings.short_side_range
            scale = int(torch.randint(low, high + 1, ())) / min(image)
            scale = scale if most is None else min(scale, most / max(image))
        return [max(1, round(side * scale)) for side in sides]

    def _place_of_crop(self, mask: Tensor) -> tuple[int, int]:
        """Draw top and left of a crop in which no class prevails, if ten attempts find one."""
        (height, width), (rows, columns) = self.crop_size, mask.shape[-2:]
        for _ in range(10):
            top, left = (int(torch.randint(spare + 1, ())) for spare in (rows - height, columns - width))
            counts = torch.bincount(mask[0, top : top + height, left : left + width].flatten(), minlength=256)[:IGNORE]
            if counts.max() <= MOST_OF_ONE_CLASS * counts.sum():
                break
        return top, left


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _channels_last(pixels: Tensor) -> Tensor:
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def mix_transform(num_classes: int, *, mixup: float, cutmix: float) -> v2.Transform | None:
    """Return MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899), or one of them at random; None if both are off.

    Shape: images (B, 3, H, W), labels (B,) -> images and shares (B, num_classes).
    """
    kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    choices = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(choices) if choices else None
