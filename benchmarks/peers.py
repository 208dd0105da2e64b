"""Other implementations of MobileViT, made as their users make them."""

from __future__ import annotations

import torch
from torch import nn

from mobilevit.models import MODELS


def timm_model(name: str, num_classes: int = 1000) -> nn.Module:
    """timm's, as `timm.create_model` gives it."""
    import timm

    return timm.create_model(name, num_classes=num_classes)


class Logits(nn.Module):
    """transformers' model, returning the tensor of logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def transformers_model(name: str, num_classes: int = 1000) -> nn.Module:
    """transformers', configured to the same sizes."""
    from transformers import MobileViTConfig, MobileViTForImageClassification

    ours = MODELS[name]
    config = MobileViTConfig(
        hidden_sizes=list(ours.embed_dims),
        neck_hidden_sizes=[ours.stem_channels, *ours.channels, ours.head_channels],
        expand_ratio=float(ours.expand_ratio),
        num_labels=num_classes,
    )
    return Logits(MobileViTForImageClassification(config))
