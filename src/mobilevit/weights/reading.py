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
from mobilevit.models import HEADS, MODELS, HeadConfig
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.mobilevit import MobileViTBackbone, MobileViTConfig
from mobilevit.weights import checkpoint, pretrained
from mobilevit.weights.checkpoint import Weights, find_misfit
from mobilevit.weights.convert import convert_state_dict, recognize, unwrap_state_dict


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
    card = dataclasses.replace(source.card, provenance=provenance)
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
    family, task = recognize(tensors)
    name = architecture or _architecture_of(state, path)
    config, head = _published_shape(state, MODELS[name])
    card = ModelCard(
        name=name,
        task=task,
        classes=HEADS[task].guess_classes(state),
        preprocessing=HEADS[task].published_preprocessing,
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


def _architecture_of(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    backbone = backbone_of(state)
    for name, config in MODELS.items():
        with torch.device("meta"):
            ours = MobileViTBackbone(config).state_dict()
        if not find_misfit(ours, backbone):
            return name
    raise MobileViTError(f"{path}: its shapes fit none of {', '.join(MODELS)}; give the weights of one of these")


def _published_shape(state: Mapping[str, Tensor], config: MobileViTConfig) -> tuple[MobileViTConfig, HeadConfig | None]:
    """Read the shape of a DeepLabv3 from its weights; dilation leaves no trace in them, so it is guessed by width."""
    if "aspp.near.conv.weight" not in state:
        return config, None
    width = len(state["aspp.near.conv.weight"])
    config = dataclasses.replace(config, output_stride=8 if width == 512 else 16)  # the two published forms
    aux_channels = len(state.get("aux_head.0.conv.weight", ()))
    return config, DeepLabv3Config(
        aspp_channels=width,
        atrous_rates=DeepLabv3Config.for_output_stride(config.output_stride).atrous_rates,
        aux_head=aux_channels > 0,
        aux_channels=aux_channels or DeepLabv3Config.aux_channels,
    )
