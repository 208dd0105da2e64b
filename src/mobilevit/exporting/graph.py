"""What is exported: a fused model between one input tensor and the outputs that a program on a device wants.

Letters used in shape comments:

    B  images in a run     A  anchors     K  classes     H, W  height and width of the input     h, w  of a coarse map
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mobilevit.card import card_of
from mobilevit.models.deeplabv3 import DeepLabv3
from mobilevit.models.fuse import fuse
from mobilevit.models.mobilevit import MobileViTBackbone
from mobilevit.models.ssdlite import SSDLite


class ExportGraph(nn.Module):
    """A model as a function from one tensor to a tuple of tensors, named in `output_names`.

    Classification gives "logits" (B, K); detection "boxes_xyxy" (B, A, 4), in 0..1 of the input, and "scores" (B, A, K)
    without the background; segmentation "logits" (B, K, H, W) or "label_map" (B, H, W), uint8.

    Args:
        model: of any task, with a card; it is fused here and stays as it is.
        image_size: (height, width) of the input; None: it may change from run to run.
        baked: take uint8 (B, H, W, 3) and scale inside, instead of scaled float32 (B, 3, H, W).
        label_map: segmentation: give the best class of every pixel instead of logits.
    """

    input_name = "images"

    def __init__(
        self, model: nn.Module, *, image_size: tuple[int, int] | None, baked: bool = False, label_map: bool = False
    ) -> None:
        super().__init__()
        card = card_of(model)
        self.task = card.task
        self.model = fuse(model).cpu()
        self.baked, self.label_map = baked, label_map
        self.output_names: tuple[str, ...] = ("logits",)
        if self.task == "detection":
            self.output_names = ("boxes_xyxy", "scores")
        elif label_map:
            self.output_names = ("label_map",)
        scaling = card.preprocessing
        mean, std = (torch.tensor(values)[:, None, None] for values in (scaling.mean, scaling.std))
        self.scale: Tensor
        self.shift: Tensor
        self.rows: Tensor | None
        self.columns: Tensor | None
        self.register_buffer("scale", 1 / (255 * std))  # (3, 1, 1)
        self.register_buffer("shift", -mean / std)
        rows = columns = None
        if isinstance(self.model, DeepLabv3) and image_size is not None:
            rows, columns = (_enlarging(-(-side // self.model.output_stride), side) for side in image_size)
            columns = columns.T.contiguous()
        self.register_buffer("rows", rows)  # (H, h)
        self.register_buffer("columns", columns)  # (w, W)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images
        if self.baked:
            x = x.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (B, 3, H, W)
        return self.answer(x)

    def answer(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs for scaled images. Shape: (B, 3, H, W) -> see the class."""
        if self.task == "detection":
            return tuple(cast(SSDLite, self.model)(x).named().values())
        if self.task == "classification":
            return (self.model(x),)
        model = cast(DeepLabv3, self.model)
        if self.rows is None or self.columns is None:
            logits = model(x).logits
        else:
            # Bilinear enlargement is linear in rows and in columns. As two products it is exact on every device,
            # where kernels for a resize differ in how they place corners, or are missing.
            logits = self.rows @ (model.coarse_logits(x) @ self.columns)  # (B, K, H, W)
        return (logits.argmax(dim=1).to(torch.uint8) if self.label_map else logits,)

    @property
    def size_multiple(self) -> tuple[int, int]:
        """(height, width) of which inputs must be multiples, so that nothing is resized inside."""
        backbone = self.model if isinstance(self.model, MobileViTBackbone) else self.model.backbone
        return cast(MobileViTBackbone, backbone).size_multiple

    def example(self, batch_size: int, image_size: tuple[int, int]) -> Tensor:
        """An input of the right shape and type; zeros."""
        if self.baked:
            return torch.zeros(batch_size, *image_size, 3, dtype=torch.uint8)
        return torch.zeros(batch_size, 3, *image_size)


def _enlarging(coarse: int, fine: int) -> Tensor:
    """The matrix that enlarges a line of `coarse` values to `fine`, bilinearly, ends on ends. Shape: (fine, coarse)."""
    place = torch.arange(fine, dtype=torch.float64) * ((coarse - 1) / max(fine - 1, 1))
    below = place.floor().long().clamp(max=max(coarse - 2, 0))
    share = place - below
    matrix = torch.zeros(fine, coarse, dtype=torch.float64)
    rows = torch.arange(fine)
    matrix[rows, below] = 1 - share
    matrix[rows, (below + 1).clamp(max=coarse - 1)] += share
    return matrix.float()
