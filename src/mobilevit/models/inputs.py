"""From bytes to what a model takes, for tensors on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilevit.imaging.preprocessing import Preprocessing


def normalize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale to 0..1, subtract mean, divide by std: `Preprocessing.normalize` for tensors; the memory layout stays.

    Shape: uint8 (B, 3, H, W) -> float32 (B, 3, H, W), on the same device.
    """
    x = pixels.float() / 255
    if any(preprocessing.mean) or any(s != 1 for s in preprocessing.std):
        on_gpu = x.device.type == "cuda"  # where the host would otherwise wait for all that was started before
        mean, std = (
            torch.tensor(values).to(x.device, non_blocking=on_gpu)[:, None, None]
            for values in (preprocessing.mean, preprocessing.std)
        )
        x = (x - mean) / std
    return x
