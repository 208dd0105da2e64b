"""Other implementations of MobileViT, and the networks it is compared with, built as their users build them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mobilevit import factory
from mobilevit.benchmarking.contenders import Network
from mobilevit.card import card_of
from mobilevit.errors import MissingPackageError, MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import MODELS, Model
from mobilevit.models.mobilevitv2 import MobileViTv2Config
from mobilevit.weights.convert import convert_state_dict

PUBLISHED_TOP1 = {
    **{"mobilevit_xxs": 0.690, "mobilevit_xs": 0.748, "mobilevit_s": 0.784},
    **{"mobilevitv2_050": 0.702, "mobilevitv2_075": 0.756, "mobilevitv2_100": 0.781, "mobilevitv2_125": 0.797},
    **{"mobilevitv2_150": 0.804, "mobilevitv2_175": 0.808, "mobilevitv2_200": 0.812},
}
"""On ImageNet, by the papers."""

_COMPARED = (
    ("mobilenetv2_100", "MobileNetV2", 0.733),
    ("deit_tiny_patch16_224", "DeiT-Ti", 0.722),
    ("pit_ti_224", "PiT-Ti", 0.730),
)
"""Networks that the paper compares MobileViT with for speed (arXiv:2110.02178, table 3): name in timm, label, top-1."""

_CVNETS_CONFIGS = Path("config", "classification", "imagenet")
_CVNETS_MODES = {"mobilevit_xxs": "xx_small", "mobilevit_xs": "x_small", "mobilevit_s": "small"}


def installed_peers(ours: Network) -> tuple[list[Network], list[str]]:
    """List the peers of our network that are installed, and a line on each that is not."""
    peers = [
        replace(ours, label="timm", origin="timm"),
        replace(ours, label="timm channels_last", origin="timm", channels_last=True),
        replace(ours, label="transformers", origin="transformers"),
    ]
    absent = [name for name in ("timm", "transformers") if importlib.util.find_spec(name) is None]
    lines = [f"{name}: not installed; pip install 'mobilevit[peers]'" for name in absent]
    return [peer for peer in peers if peer.origin not in absent], lines


def compared_networks() -> list[Network]:
    """List the networks that the paper compares MobileViT with, and raise a `MissingPackageError` without timm."""
    if importlib.util.find_spec("timm") is None:
        raise MissingPackageError("`compare` takes its networks from timm; pip install 'mobilevit[peers]'")
    return [
        Network(
            label=label,
            origin="timm",
            architecture=name,
            image_size=(224, 224),
            weights=name,
            channels_last=True,  # faster for convolutions, and no slower for the others
            published_top1=top1,
        )
        for name, label, top1 in _COMPARED
    ]


def build(network: Network) -> tuple[nn.Module, Preprocessing]:
    """Build a network in eval mode with the weights of its checkpoint, and the preprocessing of its images."""
    if network.checkpoint is None:
        return timm_model(network.architecture).eval(), Preprocessing(size=network.image_size)
    ours = factory.load(network.checkpoint)
    card = card_of(ours)
    preprocessing = replace(card.preprocessing, size=network.image_size)
    if network.origin == "mobilevit":
        return ours, preprocessing
    return peer_of(ours, network.origin, network.clone), preprocessing


def peer_of(ours: Model, origin: Literal["timm", "transformers", "cvnets"], clone: str | None = None) -> nn.Module:
    """Build the peer's own model with the weights of ours, in eval mode; `clone` is that of ml-cvnets.

    Weights matter for speed, too: with the initial ones of transformers, outputs shrink to denormal numbers, with which
    some processors are far slower.
    """
    card = card_of(ours)
    if origin == "timm":
        peer = timm_model(card.name, len(card.classes))
    elif origin == "transformers":
        peer = transformers_model(card.name, len(card.classes))
    else:
        assert clone is not None
        peer = cvnets_model(card.name, clone, len(card.classes))
    inner = peer.model if isinstance(peer, Logits) else peer
    inner.load_state_dict(convert_state_dict(ours.state_dict(), to=origin))
    return peer.eval()


def timm_model(name: str, num_classes: int = 1000) -> nn.Module:
    """Build the model of timm."""
    import timm

    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    return model


class Logits(nn.Module):
    """The model of transformers, returning the tensor of logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def transformers_model(name: str, num_classes: int = 1000) -> nn.Module:
    """Build the model of transformers, configured to the same sizes."""
    import transformers

    ours = MODELS[name]
    if isinstance(ours, MobileViTv2Config):
        config = transformers.MobileViTV2Config(width_multiplier=ours.width, num_labels=num_classes)
        return Logits(transformers.MobileViTV2ForImageClassification(config))
    config = transformers.MobileViTConfig(
        hidden_sizes=list(ours.embed_dims),
        neck_hidden_sizes=[ours.stem_channels, *ours.channels, ours.head_channels],
        expand_ratio=float(ours.expand_ratio),
        num_labels=num_classes,
    )
    return Logits(transformers.MobileViTForImageClassification(config))


def check_cvnets(name: str, clone: str | os.PathLike[str]) -> Path:
    """Make the folder absolute, and raise a `MobileViTError` if it is not a clone of ml-cvnets with this model."""
    folder = Path(clone).resolve()
    for part in (Path("cvnets", "models"), Path("options", "opts.py"), _cvnets_settings(name)[0]):
        if not (folder / part).exists():
            raise MobileViTError(
                f"{clone}: no clone of https://github.com/apple/ml-cvnets, as it has no {part.as_posix()}"
            )
    return folder


def _cvnets_settings(name: str) -> tuple[Path, str, str | float]:
    """Name a model's configuration file, and the option that says its size, with its value."""
    ours = MODELS[name]
    if isinstance(ours, MobileViTv2Config):
        return _CVNETS_CONFIGS / "mobilevit_v2.yaml", "model.classification.mitv2.width_multiplier", ours.width
    return _CVNETS_CONFIGS / "mobilevit.yaml", "model.classification.mit.mode", _CVNETS_MODES[name]


def cvnets_model(name: str, clone: str | os.PathLike[str], num_classes: int = 1000) -> nn.Module:
    """Build Apple's model from a clone of ml-cvnets, by its own configuration file.

    Puts the clone first on `sys.path`; its modules have names such as `utils` and `data`, so call this only in a
    process that does nothing else.
    """
    folder, (config, option, size) = check_cvnets(name, clone), _cvnets_settings(name)
    sys.path.insert(0, str(folder))
    try:
        arguments = importlib.import_module("options.opts").get_training_arguments
        get_model = importlib.import_module("cvnets").get_model
    except ImportError as error:
        raise MobileViTError(f"{clone}: cannot be imported ({error}); pip install its requirements.txt") from None
    options = arguments(args=["--common.config-file", str(folder / config)])
    setattr(options, option, size)
    setattr(options, "model.classification.n_classes", num_classes)
    model: nn.Module = get_model(options)
    return model
