"""Random changes to training pictures, through torchvision's transforms v2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from mobilevit.preprocessing import Preprocessing


def train_transform(
    preprocessing: Preprocessing,
    *,
    min_crop_area: float,
    flip: bool = True,
    randaugment: int = 0,
    random_erasing: float = 0.0,
) -> Callable[[Image.Image], Tensor]:
    """Random resized crop and flip (arXiv:1409.4842), and RandAugment and random erasing if asked for.

    Args:
        preprocessing: size and interpolation.
        min_crop_area: smallest share of the picture's area a crop may have.
        flip: mirror half of the pictures.
        randaugment: strength of two random operations a picture (arXiv:1909.13719); 0 leaves them out.
        random_erasing: probability that a rectangle is blanked (arXiv:1708.04896).

    Returns:
        A function from an RGB picture to uint8 (3, height, width), channels-last in memory.
    """
    interpolation = InterpolationMode(preprocessing.interpolation)
    steps: list[Callable[..., object]] = [
        v2.RandomResizedCrop(preprocessing.size, scale=(min_crop_area, 1.0), interpolation=interpolation)
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=randaugment, interpolation=InterpolationMode.BILINEAR))
    on_pictures = v2.Compose(steps)
    erase = v2.RandomErasing(p=random_erasing) if random_erasing else None
    return partial(_apply, on_pictures, erase)  # which can be sent to a reading process, as a closure cannot


def _apply(on_pictures: v2.Transform, erase: v2.Transform | None, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(on_pictures(image))).permute(2, 0, 1)
    return pixels if erase is None else erase(pixels)


def mix_transform(
    num_classes: int, *, mixup: float, cutmix: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of a batch, one of them at random where both are on.

    Args:
        num_classes: width of the mixed labels.
        mixup: alpha of MixUp's Beta distribution; 0 is off.
        cutmix: alpha of CutMix's; 0 is off.

    Returns:
        Pictures (B, 3, H, W) and labels (B,) to pictures and label shares (B, num_classes); None if both are off.
    """
    choices: list[v2.Transform] = []
    if mixup:
        choices.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        choices.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None
