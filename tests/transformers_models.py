"""Models of transformers, filled by the golden rule, and what its MobileViTv2 needs to compute what ml-cvnets does."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from golden_weights import fill_with_golden_weights
from mobilevit.models import MODELS
from mobilevit.models.mobilevit import MobileViTConfig


def transformers_model(
    name: str, kind: str = "ForImageClassification", *, num_labels: int = 1000, **options: Any
) -> Any:
    """`kind` is the end of the class's name, such as "ForSemanticSegmentation"."""
    transformers = pytest.importorskip("transformers")
    config = MODELS[name]
    if isinstance(config, MobileViTConfig):
        generation = "MobileViT"
        shape = {
            "hidden_sizes": list(config.embed_dims),
            "neck_hidden_sizes": [config.stem_channels, *config.channels, config.head_channels],
            "expand_ratio": float(config.expand_ratio),
        }
    else:
        generation, shape = "MobileViTV2", {"width_multiplier": config.width}
    theirs = getattr(transformers, f"{generation}Config")(**shape, **options, num_labels=num_labels)
    return fill_with_golden_weights(getattr(transformers, generation + kind)(theirs))


def as_transformers_sees(name: str, x: Tensor) -> Tensor:
    """Its MobileViT expects BGR, but its MobileViTv2 has the official weights, whose order is RGB."""
    return x.flip(1) if isinstance(MODELS[name], MobileViTConfig) else x


def dilate(encoder: Any, output_stride: int) -> None:
    """Dilate the convolutions of MobileViTv2's blocks as the official code does; transformers leaves it out."""
    for stage, dilation in {32: {}, 16: {4: 2}, 8: {3: 2, 4: 4}}[output_stride].items():
        conv = encoder.layer[stage].conv_kxk.convolution
        conv.dilation = conv.padding = (dilation, dilation)
