"""From a name or a file to a model: architecture, head, weights, card."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilevit.models import MODELS, model_config
from mobilevit.models.card import ModelCard, card_of, default_classes
from mobilevit.models.mobilevit import MobileViT, MobileViTConfig, PatchSize
from mobilevit.preprocessing import Preprocessing
from mobilevit.weights import checkpoint, pretrained
from mobilevit.weights.convert import convert_state_dict, detect_family, unwrap_state_dict

log = logging.getLogger("mobilevit")


def create_model(
    name: str,
    *,
    task: str = "classification",
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    patch_size: tuple[PatchSize, PatchSize, PatchSize] | None = None,
    output_stride: int | None = None,
) -> MobileViT:
    """Build a model, with random, public or your own weights.

    Args:
        name: one of `list_models()`.
        task: "classification".
        num_classes: foreground classes. None: as many as `weights` have, or 1000.
        weights: None, a name from `list_pretrained()`, or a file from this package, ml-cvnets, timm or transformers.
            A classifier for another number of classes is replaced by a fresh one, and the log says so.
        patch_size: at strides 8, 16 and 32; (8, 4, 2) is the paper's configuration B. None: as `weights`, or 2, 2, 2.
        output_stride: 32, or 16 or 8 by dilation. None: as `weights`, or 32.

    Returns:
        The model in eval mode; `model.card` holds its classes and preprocessing.

    Raises:
        ValueError: unknown name or task, or weights that cannot be read or belong to another architecture.
    """
    config = model_config(name)
    if task != "classification":
        raise ValueError(f"unknown task {task!r}; this version knows classification")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; give 1 or more")
    card = ModelCard(name=name, task=task, classes=())
    state: dict[str, Tensor] = {}
    if weights is not None:
        source = _load_source(weights, architecture=name)
        card, state = dataclasses.replace(source.card, name=name), source.state
        if source.config is not None:
            config = source.config
    changes: dict[str, Any] = {"patch_size": patch_size, "output_stride": output_stride}
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})

    in_weights = len(state["classifier.weight"]) if "classifier.weight" in state else None
    num_classes = num_classes or in_weights or 1000
    model = MobileViT(config, num_classes)
    if state:
        if in_weights != num_classes:
            reason = "have no classifier" if in_weights is None else f"classify {in_weights} classes, not {num_classes}"
            log.warning("%s: these weights %s; the classifier starts afresh, the rest is kept", weights, reason)
            for key in ("classifier.weight", "classifier.bias"):
                state[key] = model.state_dict()[key]
        _fill(model, state, weights)
    if len(card.classes) != num_classes:
        card = dataclasses.replace(card, classes=default_classes(num_classes), metrics={})
    model.card = card
    return model.eval()


def load(path: str | os.PathLike[str]) -> MobileViT:
    """Load a checkpoint: architecture, classes and preprocessing come from the file, and are in `model.card`.

    A file from ml-cvnets, timm or transformers says none of these: the architecture is recognised by its shapes, the
    classes are ImageNet's where there are 1000, the patch size is taken as 2, 2, 2.

    Raises:
        ValueError: the file is missing, damaged, unsafe, or no MobileViT.
    """
    content, header = checkpoint.read(path)
    if header is not None:
        return checkpoint.restore(content, header, path)
    return create_model(_architecture_of(content, path), weights=path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WeightSource:
    state: dict[str, Tensor]
    card: ModelCard
    config: MobileViTConfig | None  # None: the file does not say


def _load_source(weights: str | os.PathLike[str], *, architecture: str) -> _WeightSource:
    public = pretrained.PRETRAINED.get(str(weights))
    if public is None and not _looks_like_a_file(weights):
        pretrained.resolve(str(weights))  # raises, and suggests the nearest name
    if public is not None and public.architecture != architecture:
        raise ValueError(f"weights {weights} belong to {public.architecture}, not {architecture}; change one of them")
    path = Path(weights) if public is None else pretrained.resolve(public.name)
    content, header = checkpoint.read(path)
    if header is not None:
        model = checkpoint.restore(content, header, path)
        card = card_of(model)
        if card.name != architecture:
            raise ValueError(f"{path}: weights of {card.name}, not {architecture}; change the model or the weights")
        provenance = {"weights": path.name, **{k: v for k, v in card.provenance.items() if k in ("weights", "licence")}}
        return _WeightSource(
            state=dict(model.state_dict()), card=dataclasses.replace(card, provenance=provenance), config=model.config
        )
    state = unwrap_state_dict(content)
    provenance = {"weights": path.name, "family": detect_family(state)}
    preprocessing = Preprocessing(crop_fraction=0.9)  # with which the public weights reach their published accuracy
    if public is not None:
        provenance = {"weights": public.name, "source": public.source, "licence": public.licence}
        preprocessing = public.preprocessing
    state = convert_state_dict(state, to="mobilevit")
    num_classes = len(state.get("classifier.weight", ()))
    classes = pretrained.imagenet_classes() if num_classes == 1000 else default_classes(num_classes)
    card = ModelCard(
        name=architecture, task="classification", classes=classes, preprocessing=preprocessing, provenance=provenance
    )
    return _WeightSource(state=state, card=card, config=None)


def _looks_like_a_file(weights: str | os.PathLike[str]) -> bool:
    path = Path(weights)
    return path.exists() or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or len(path.parts) > 1


def _fill(model: MobileViT, state: Mapping[str, Tensor], source: object) -> None:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip().rstrip(".")
        raise ValueError(f"{source}: not weights of this architecture ({reason})") from None


def _architecture_of(content: Mapping[str, object], path: str | os.PathLike[str]) -> str:
    state = convert_state_dict(unwrap_state_dict(content), to="mobilevit")
    shapes = {key: value.shape for key, value in state.items() if not key.startswith("classifier.")}
    for name, config in MODELS.items():
        with torch.device("meta"):
            ours = MobileViT(config, 0).state_dict()
        if {key: value.shape for key, value in ours.items()} == shapes:
            return name
    raise ValueError(f"{path}: its shapes fit none of {', '.join(MODELS)}")
