"""Weights of any known origin, read from a file or a public name and brought under the names of this package."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.models import HEADS, MODELS, Config, HeadConfig, build_backbone, published_preprocessing
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.mobilevit import MobileViTConfig
from mobilevit.models.pspnet import PSPNetConfig
from mobilevit.weights import checkpoint, pretrained
from mobilevit.weights.checkpoint import Weights, find_misfit
from mobilevit.weights.convert import TITLES, convert_state_dict, recognize, unwrap_state_dict


def read_weights(weights: str | os.PathLike[str], architecture: str) -> Weights:
    """Read the weights of a model, public ones by name, or those in a file; see `read_file`.

    Raises:
        MobileViTError: no such file or name, unreadable, no MobileViT, or another architecture.
    """
    path = Path(weights)
    is_file = path.exists() or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or len(path.parts) > 1
    if str(weights) not in pretrained.PRETRAINED and is_file:
        return read_file(weights, architecture)
    public = pretrained.find(str(weights))
    if public.architecture != architecture:
        raise MobileViTError(
            f"weights {weights} belong to {public.architecture}, not {architecture}; change one of them"
        )
    source = read_file(pretrained.resolve(public.name), architecture)
    provenance = {"weights": public.name, "source": public.source, "license": pretrained.LICENSE}
    preprocessing = public.preprocessing or source.card.preprocessing
    card = dataclasses.replace(source.card, preprocessing=preprocessing, provenance=provenance)
    return dataclasses.replace(source, origin=public.name, card=card)


def read_file(path: str | os.PathLike[str], architecture: str | None = None) -> Weights:
    """Read a checkpoint of this package, ml-cvnets, timm or transformers; `load` says what is assumed of the latter.

    The weights must belong to `architecture`, the name of a model; if it is None, it follows from the shapes.

    Raises:
        MobileViTError: missing, damaged, unsafe, no MobileViT, or another architecture.
    """
    content, header = checkpoint.read(path)
    if header is not None:
        own = checkpoint.describe(content, header, path)
        if architecture not in (None, own.card.name):
            raise MobileViTError(
                f"{path}: weights of {own.card.name}, not {architecture}; change the model or the weights"
            )
        return own

    tensors = unwrap_state_dict(content)
    state = convert_state_dict(tensors, to="mobilevit")
    family, task, generation = recognize(tensors)
    name = architecture or architecture_of(state)
    if name is None:
        raise MobileViTError(f"{path}: its shapes fit none of {', '.join(MODELS)}; give the weights of one of these")
    if not name.startswith(f"{generation}_"):
        told = ", ".join(model for model in MODELS if model.startswith(f"{generation}_"))
        raise MobileViTError(f"{path}: weights of a {TITLES[generation]}, not of {name}; use one of {told}")
    config, head = _published_shape(state, MODELS[name])
    card = ModelCard(
        name=name,
        task=task,
        classes=HEADS[task].guess_classes(state),
        preprocessing=published_preprocessing(config, task),
        provenance={"weights": Path(path).name, "family": family},
    )
    return Weights(origin=str(path), described=False, state=state, card=card, config=config, head=head)


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of the backbone from those of a model for any task, under the backbone's own names."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    heads = ("head_conv.", "classifier.")
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if (key.startswith(prefix) if prefix else not key.startswith(heads))
    }


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """Name the model whose backbone has the tensors of these weights, if there is one."""
    backbone = backbone_of(state)
    last_channels = len(backbone.get("layer5.0.project.conv.weight", ()))
    for name, config in MODELS.items():
        if config.channels[-1] != last_channels:
            continue
        with torch.device("meta"):
            ours = build_backbone(config).state_dict()
        if not find_misfit(ours, backbone):
            return name
    return None


def _published_shape(state: Mapping[str, Tensor], config: Config) -> tuple[Config, HeadConfig | None]:
    """Read the shape of a segmenter from its weights; dilation leaves no trace in them, so it is guessed.

    The published forms of output stride 8 have 512 channels on MobileViT, and ADE20k's 150 classes on MobileViTv2.
    """
    layers = ("aspp.near.conv", "psp.project.conv", "aux_head.0.conv", "classifier")
    aspp_channels, channels, aux_channels, num_classes = (len(state.get(f"{layer}.weight", ())) for layer in layers)
    if not (aspp_channels or channels):
        return config, None
    fine = aspp_channels == 512 if isinstance(config, MobileViTConfig) else num_classes == 150
    config = dataclasses.replace(config, output_stride=8 if fine else 16)
    has_aux, aux = aux_channels > 0, aux_channels or None
    if channels:
        return config, PSPNetConfig(channels=channels, aux_head=has_aux, aux_channels=aux)
    return config, DeepLabv3Config(aspp_channels=aspp_channels, aux_head=has_aux, aux_channels=aux)
