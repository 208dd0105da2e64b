"""The part that models for segmentation share: a classifier of every pixel between a context module and a resize.

Letters used in shape comments:

    B  images in the batch     C  channels of the backbone's last map     K  classes, background included
    H, W  height and width of the input     h, w  of the backbone's last map: H / output_stride, W / output_stride
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit.card import ModelCard
from mobilevit.models.mobilevit import Backbone, ConvNormAct


class SegmentationOutput(NamedTuple):
    """The output of a `Segmenter` for B images."""

    logits: Tensor
    """(B, K, H, W), at the size of the input."""
    aux_logits: Tensor | None
    """(B, K, H, W) of the auxiliary head; None unless the model has one and is in training mode."""

    def named(self) -> dict[str, Tensor]:
        """The outputs as sessions and exported files give them: "logits" (B, K, H, W)."""
        return {"logits": self.logits}


class Segmenter(nn.Module):
    """A backbone, a module that looks around on its last map, and a classifier whose logits are resized to the input.

    `DeepLabv3` and `PSPNet` differ in `context`. K is `num_classes`, background included if there is one.

    Shape: RGB in 0..1, (B, 3, H, W), H and W >= 32 -> `SegmentationOutput`.
    """

    card: ModelCard
    """Name, task, classes and preprocessing; set by `create_model` and `load`."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.num_classes = num_classes
        self.output_stride = max(backbone.feature_channels)

    def _add_classifiers(self, context: nn.Module, *, channels: int, dropout: float, aux_channels: int | None) -> None:
        """Complete the model after its context module; `aux_channels` None: without an auxiliary head."""
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, self.num_classes, 1)
        self.aux_head = None
        if aux_channels is not None:
            aux_conv = ConvNormAct(self.config.channels[-2], aux_channels, 3, act="relu")
            aux_classifier = nn.Conv2d(aux_channels, self.num_classes, 1)
            self.aux_head = nn.Sequential(aux_conv, nn.Dropout2d(dropout), aux_classifier)
        self.backbone.initialize(context)
        self.backbone.initialize_prediction(self.classifier)
        if self.aux_head is not None:
            self.backbone.initialize(self.aux_head)
            self.backbone.initialize_prediction(aux_classifier)

    def context(self, x: Tensor) -> Tensor:
        """Look around. Shape: (B, C, h, w) -> (B, channels, h, w)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> SegmentationOutput:
        size = (x.shape[2], x.shape[3])
        if not (self.training and self.aux_head is not None):
            return SegmentationOutput(_resize(self.coarse_logits(x), size), None)
        *_, penultimate, last = self.backbone.forward_stages(x)
        aux_logits = _resize(self.aux_head(penultimate), size)  # (B, K, H, W)
        return SegmentationOutput(_resize(self._classify(last), size), aux_logits)

    def coarse_logits(self, x: Tensor) -> Tensor:
        """Compute the logits before they are resized. Shape: (B, 3, H, W) -> (B, K, h, w)."""
        return self._classify(self.backbone.forward_features(x)[self.output_stride])

    def _classify(self, x: Tensor) -> Tensor:
        """Shape: (B, C, h, w) -> (B, K, h, w)."""
        x = self.classifier(self.dropout(self.context(x)))
        return x


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, with corners aligned as in the official code."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def published_aux_channels(backbone: Backbone) -> int:
    """Return the published width of the auxiliary head: a quarter of layer4's, 128 or more."""
    return max(backbone.config.channels[-2] // 4, 128)
