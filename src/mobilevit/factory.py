"""From a name or a file to a model: architecture, head, weights, card."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mobilevit.card import ModelCard, default_classes
from mobilevit.errors import MobileViTError, some, unknown
from mobilevit.models import HEAD_CONFIGS, HEADS, MODELS, Config, HeadConfig, Model
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.mobilevit import Backbone, PatchSize
from mobilevit.models.mobilevitv2 import MobileViTv2Config
from mobilevit.weights.checkpoint import Weights, find_misfit
from mobilevit.weights.reading import architecture_of, backbone_of, read_file, read_weights

log = logging.getLogger("mobilevit")


def create_model(
    name: str,
    *,
    task: str = "classification",
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    weights: str | os.PathLike[str] | Weights | None = None,
    patch_size: tuple[PatchSize, PatchSize, PatchSize] | None = None,
    output_stride: int | None = None,
    head: HeadConfig | str | None = None,
) -> Model:
    """Build a model, with random, public or your own weights.

    Args:
        name: one of `list_models()`.
        task: "classification", "detection" or "segmentation".
        num_classes: without the background in detection, with it in segmentation. None: as many as `classes`, or as
            `weights` have, or 1000, 80 or 21 by task.
        classes: their names, in the order of the outputs.
        weights: None, a name from `list_pretrained()`, or a file from this package, ml-cvnets, timm or transformers.
            From weights for other classes, the answers for classes of the same name are kept and the others start
            afresh; from weights for another task, the backbone is kept. The log says so.
        patch_size: at strides 8, 16 and 32; (8, 4, 2) is the paper's configuration B. None: as `weights`, or 2, 2, 2,
            which is all that MobileViTv2 has.
        output_stride: 32, or 16 or 8 by dilation. None: as `weights`, or 16 for segmentation and 32 otherwise.
        head: shape of the part after the backbone, in detection and segmentation, or its name for the published shape:
            "ssdlite", "deeplabv3" or "pspnet". None: as `weights`, or the published, of DeepLabv3 in segmentation.

    Returns:
        The model in eval mode; `model.card` holds its classes and preprocessing.

    Raises:
        MobileViTError: unknown name or task, options that contradict each other, or weights that cannot be read or
            belong to another architecture.
    """
    config = config_of(name)
    if task not in HEADS:
        raise MobileViTError(f"unknown task {task!r}; choose from {', '.join(HEADS)}")
    if classes is not None:
        if num_classes not in (None, len(classes)):
            raise MobileViTError(
                f"`num_classes` is {num_classes}, but `classes` has {len(classes)} names; leave `num_classes` out"
            )
        num_classes = len(classes)
    if isinstance(head, str):
        if head not in HEAD_CONFIGS:
            raise unknown("head", head, HEAD_CONFIGS)
        head = HEAD_CONFIGS[head]()
    if num_classes is not None and num_classes < 1:
        raise MobileViTError(f"`num_classes` is {num_classes}; give 1 or more")

    # What the caller leaves open comes from weights for the same task, else it is the published.
    defaults = HEADS[task]
    source = weights if isinstance(weights, Weights) or weights is None else read_weights(weights, name)
    if source is not None:
        config = source.config
    if source is not None and source.card.task == task:
        output_stride = output_stride or config.output_stride
        _refuse_missing_background(source, num_classes)
        num_classes = num_classes or len(source.card.classes)
        theirs = source.head
        if isinstance(theirs, DeepLabv3Config):
            theirs = theirs.scaled(config.output_stride / output_stride)
        head = head or theirs
    config = dataclasses.replace(
        config, output_stride=output_stride or defaults.output_stride, patch_size=patch_size or config.patch_size
    )
    num_classes = num_classes or defaults.num_classes
    names = tuple(classes) if classes is not None else None
    card = ModelCard(
        name=name, task=task, classes=names or default_classes(num_classes), preprocessing=defaults.preprocessing
    )
    model = build_model(config, card, head)
    if source is not None:
        model.card = _fill(model, source, names)
    return model.eval()


def config_of(name: str) -> Config:
    """Return the shape of a published model.

    Raises:
        MobileViTError: unknown name; for a width that does not exist, in percent or as a factor, the nearest is told.
    """
    if name in MODELS:
        return MODELS[name]
    meant, written = None, re.fullmatch(r"mobilevitv2.?(\d+(?:\.\d+)?)", name)
    if written:
        width = float(written[1]) / (1 if float(written[1]) < 10 else 100)
        widths = {abs(c.width - width): other for other, c in MODELS.items() if isinstance(c, MobileViTv2Config)}
        meant = widths[min(widths)]
    raise unknown("model", name, MODELS, meant=meant)


def build_model(config: Config, card: ModelCard, head: HeadConfig | None = None) -> Model:
    """Make a model with fresh weights for the card's task and classes; `head` None: the published one.

    Raises:
        MobileViTError: a head of another task, or a backbone that does not suit the task.
    """
    task = HEADS[card.task]
    if head is not None and type(head) not in task.config_types:
        remedy = f"give a {task.config_types[0].__name__}" if task.config_types else "leave it out"
        raise MobileViTError(f"`head` is a {type(head).__name__}, which does not suit {card.task}; {remedy}")
    model = task.build(config, len(card.classes), head)
    model.card = card
    return model


def load(path: str | os.PathLike[str]) -> Model:
    """Load a checkpoint: architecture, classes and preprocessing come from the file, and are in `model.card`.

    A file from ml-cvnets, timm or transformers does not hold these: architecture and task are recognized by its names
    and shapes, the classes are taken for those of ImageNet, COCO, VOC or ADE20k where there are 1000, 80, 21 or 150,
    the patch size for 2, 2, 2, and DeepLabv3 for one of output stride 8 where it has 512 channels, on MobileViT, or 150
    classes, on MobileViTv2 (see `create_model` to say otherwise).

    Raises:
        MobileViTError: the file is missing, damaged, unsafe, or no MobileViT.
    """
    source = read_file(path)
    if not source.described:
        return create_model(source.card.name, task=source.card.task, weights=source)
    model = build_model(source.config, source.card, source.head)
    if reason := find_misfit(model.state_dict(), source.state):
        raise MobileViTError(f"{path}: header and weights do not fit ({reason}); save it again")
    model.load_state_dict(source.state)
    return model.eval()


def _refuse_missing_background(source: Weights, num_classes: int | None) -> None:
    """Refuse a detector of 80 outputs, which is probably one of COCO's 80 classes, trained without the background."""
    count, task = len(source.card.classes), HEADS[source.card.task]
    if task.other_rows and not source.described and count == task.num_classes - 1 != num_classes:
        raise MobileViTError(
            f"{source.origin}: {count + 1} outputs for an anchor, where {count + 2} = {count + 1} classes and the "
            f"background are needed; if they are {count} classes and the background, give `num_classes`={count}"
        )


def _fill(model: Model, source: Weights, classes: tuple[str, ...] | None) -> ModelCard:
    """Fill a fresh model with what weights have for it, log what starts afresh, and make the card of the result.

    Raises:
        MobileViTError: the weights have other shapes.
    """
    card, fresh, names = model.card, model.state_dict(), source.card.classes
    head, backbone = HEADS[card.task], backbone_of(source.state)
    same_task = source.card.task == card.task and len(backbone) < len(source.state)
    kept = _kept_classes(names, classes, model.num_classes)

    # The auxiliary head only helps training, so it may come and go.
    if same_task:
        state = {key: value for key, value in source.state.items() if key in fresh or not key.startswith("aux_head.")}
        for key, value in fresh.items():
            if key.startswith("aux_head.") and key not in state:
                state[key] = value
            elif key.rpartition(".")[0] in head.class_layers:
                if not names:
                    state[key] = value
                elif key in state:
                    counts = len(names), model.num_classes
                    state[key] = _keep_rows(state[key], value, kept, head.other_rows, counts)
    else:
        prefix = "" if isinstance(model, Backbone) else "backbone."
        ours = backbone_of(fresh)
        state = {key: value for key, value in fresh.items() if key.removeprefix(prefix) not in ours}
        state |= {prefix + key: value for key, value in backbone.items()}
    if reason := find_misfit(fresh, state):
        if (fitting := architecture_of(source.state)) not in (None, card.name):
            raise MobileViTError(
                f"{source.origin}: weights of {fitting}, not {card.name}; change the model or the weights"
            )
        raise MobileViTError(f"{source.origin}: not weights of this architecture ({reason}); change one of them")
    model.load_state_dict(state)

    carried = ("weights", "family", "source", "license")
    origin = {key: value for key, value in source.card.provenance.items() if key in carried}
    provenance = {"weights": Path(source.origin).name, **origin}
    theirs = source.card.preprocessing
    if not same_task:
        told = "%s: weights for %s; the backbone is kept, the rest of the model for %s starts afresh"
        log.warning(told, source.origin, source.card.task, card.task)
        theirs = dataclasses.replace(card.preprocessing, mean=theirs.mean, std=theirs.std)
        return dataclasses.replace(card, preprocessing=theirs, provenance=provenance)
    _log_kept(source.origin, names, kept, model.num_classes)
    if len(kept) == len(names) == model.num_classes:  # all classes are kept, so what was measured still holds
        return dataclasses.replace(source.card, classes=classes or names, provenance=provenance)
    return dataclasses.replace(card, preprocessing=theirs, provenance=provenance)


def _kept_classes(theirs: Sequence[str], ours: Sequence[str] | None, num_classes: int) -> dict[int, int]:
    """Find the classes whose rows are kept: index in the model -> index in the weights.

    By position if the number is the same and a side has no names, else by the names that each side has exactly once.
    """
    unnamed = theirs == default_classes(len(theirs))
    if len(theirs) == num_classes and (unnamed or ours in (None, theirs)):
        return {index: index for index in range(num_classes)}
    if unnamed or ours is None:
        return {}
    here, there = Counter(ours), Counter(theirs)
    return {index: theirs.index(name) for index, name in enumerate(ours) if here[name] == there[name] == 1}


def _keep_rows(
    theirs: Tensor, fresh: Tensor, kept: Mapping[int, int], other_rows: int, num_classes: tuple[int, int]
) -> Tensor:
    """Make a tensor like `fresh`, with the rows of the kept classes, and those for no class, of `theirs`.

    `num_classes` is that of `theirs` and that of `fresh`. Where the shapes do not fit, the result is `theirs`.
    """
    anchors = fresh.shape[0] // (other_rows + num_classes[1])
    if theirs.shape != (anchors * (other_rows + num_classes[0]), *fresh.shape[1:]):
        return theirs
    old = theirs.reshape(anchors, -1, *theirs.shape[1:])
    new = fresh.clone().reshape(anchors, -1, *fresh.shape[1:])
    new[:, :other_rows] = old[:, :other_rows]
    if kept:
        new[:, [other_rows + index for index in kept]] = old[:, [other_rows + index for index in kept.values()]]
    return new.reshape(fresh.shape)


def _log_kept(origin: str, names: Sequence[str], kept: Mapping[int, int], num_classes: int) -> None:
    """Say which classes are kept, unless all are, in the same order."""
    fresh = num_classes - len(kept)
    if len(names) == num_classes and not fresh:
        if any(ours != theirs for ours, theirs in kept.items()):
            log.info("%s: the same %d classes in another order; their answers are reordered", origin, num_classes)
    elif kept:
        listed = some([names[index] for index in kept.values()], limit=10)
        more = f"; {fresh} class{'es start' if fresh > 1 else ' starts'} afresh" if fresh else ""
        level = logging.WARNING if fresh else logging.INFO
        log.log(level, "%s: kept the answers for %s%s", origin, listed, more)
    else:
        reason = f"classify {len(names)} classes, not {num_classes}" if names else "have no classifier"
        if len(names) == num_classes:
            reason = "classify other classes"
        log.warning("%s: these weights %s; the classifier starts afresh, the rest is kept", origin, reason)
