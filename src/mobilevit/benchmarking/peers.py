"""Other implementations of MobileViT, and the networks it is compared with, made as their users make them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mobilevit.errors import MobileViTError
from mobilevit.models import MODELS

PEERS = ("timm", "transformers")
"""Those that are packages; ml-cvnets is a folder."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A network of another architecture, from timm."""

    label: str
    image_size: tuple[int, int]
    published_top1: float


COMPARED: dict[str, Compared] = {
    "mobilenetv2_100": Compared(label="MobileNetV2", image_size=(224, 224), published_top1=0.733),
    "deit_tiny_patch16_224": Compared(label="DeiT-Ti", image_size=(224, 224), published_top1=0.722),
    "pit_ti_224": Compared(label="PiT-Ti", image_size=(224, 224), published_top1=0.730),
}
"""What the paper compares MobileViT with for speed (arXiv:2110.02178, table 3), by their names in timm."""

PUBLISHED_TOP1 = {"mobilevit_xxs": 0.690, "mobilevit_xs": 0.748, "mobilevit_s": 0.784}
"""On ImageNet, by the paper."""


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported for that."""
    return importlib.util.find_spec(package) is not None


def timm_model(name: str, num_classes: int = 1000) -> nn.Module:
    """timm's, as `timm.create_model` gives it."""
    import timm

    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    return model


class Logits(nn.Module):
    """transformers' model, returning the tensor of logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


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


_CVNETS_CONFIG = Path("config", "classification", "imagenet", "mobilevit.yaml")
_CVNETS_MODES = {"mobilevit_xxs": "xx_small", "mobilevit_xs": "x_small", "mobilevit_s": "small"}


def check_cvnets(clone: str | os.PathLike[str]) -> Path:
    """The folder itself, made absolute.

    Raises:
        ValueError: it is not what https://github.com/apple/ml-cvnets has.
    """
    folder = Path(clone).resolve()
    for part in (Path("cvnets", "models"), Path("options", "opts.py"), _CVNETS_CONFIG):
        if not (folder / part).exists():
            raise MobileViTError(
                f"--cvnets {clone}: no clone of https://github.com/apple/ml-cvnets, as it has no {part.as_posix()}"
            )
    return folder


def cvnets_model(name: str, clone: str | os.PathLike[str], num_classes: int = 1000) -> nn.Module:
    """Apple's, from a clone of ml-cvnets, by its own configuration file.

    Puts the clone first on `sys.path`; its modules have names such as `utils` and `data`, so call this only in a
    process that does nothing else.

    Raises:
        ValueError: not such a clone, or it cannot be imported.
    """
    folder = check_cvnets(clone)
    sys.path.insert(0, str(folder))
    try:
        arguments = importlib.import_module("options.opts").get_training_arguments
        get_model = importlib.import_module("cvnets").get_model
    except ImportError as error:
        raise MobileViTError(
            f"--cvnets {clone}: cannot be imported ({error}); pip install what its requirements.txt names"
        ) from None
    options = arguments(args=["--common.config-file", str(folder / _CVNETS_CONFIG)])
    setattr(options, "model.classification.mit.mode", _CVNETS_MODES[name])
    setattr(options, "model.classification.n_classes", num_classes)
    model: nn.Module = get_model(options)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a peer with weights under its own names."""
    inner = model.model if isinstance(model, Logits) else model
    assert isinstance(inner, nn.Module)
    with torch.no_grad():
        inner.load_state_dict(dict(weights))
