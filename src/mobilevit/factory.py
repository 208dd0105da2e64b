"""From a name or a file to a model: architecture, head, weights, card."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mobilevit.card import ModelCard, card_of, default_classes
from mobilevit.errors import MobileViTError
from mobilevit.models import Model, build_model, model_config
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.heads import HEADS, known_task
from mobilevit.models.mobilevit import MobileViT, PatchSize
from mobilevit.models.ssdlite import SSDLiteConfig
from mobilevit.weights import checkpoint
from mobilevit.weights.checkpoint import Weights, find_misfit
from mobilevit.weights.reading import backbone_of, read_file, read_weights

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
    head: SSDLiteConfig | DeepLabv3Config | None = None,
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
        patch_size: at strides 8, 16 and 32; (8, 4, 2) is the paper's configuration B. None: as `weights`, or 2, 2, 2.
        output_stride: 32, or 16 or 8 by dilation. None: as `weights`, or 16 for segmentation and 32 otherwise.
        head: shape of the part after the backbone, in detection and segmentation. None: as `weights`, or the published.

    Returns:
        The model in eval mode; `model.card` holds its classes and preprocessing.

    Raises:
        MobileViTError: unknown name or task, options that contradict each other, or weights that cannot be read or
            belong to another architecture.
    """
    config, task, num_classes = model_config(name), known_task(task), _count(num_classes, classes)
    # What the caller leaves open comes from weights for the same task, else it is the published.
    source = weights if isinstance(weights, Weights) or weights is None else read_weights(weights, name)
    similar = source if source is not None and source.card.task == task else None
    if source is not None:
        config = source.config
    if output_stride is None:
        output_stride = HEADS[task].output_stride if similar is None else similar.config.output_stride
    if similar is not None:
        _refuse_missing_background(similar, num_classes)
        num_classes = num_classes or len(similar.card.classes)
        head = head or similar.head_for(output_stride)
    config = dataclasses.replace(config, output_stride=output_stride, patch_size=patch_size or config.patch_size)
    model = build_model(config, task=task, num_classes=num_classes or HEADS[task].num_classes, head=head)

    names = None if classes is None else tuple(classes)
    model.card = ModelCard(
        name=name,
        task=task,
        classes=names or default_classes(model.num_classes),
        preprocessing=HEADS[task].preprocessing,
    )
    if source is not None:
        model.card = _fill(model, source, names)
    return model.eval()


def load(path: str | os.PathLike[str]) -> Model:
    """Load a checkpoint: architecture, classes and preprocessing come from the file, and are in `model.card`.

    A file from ml-cvnets, timm or transformers does not hold these: architecture and task are recognized by its names
    and shapes, the classes are taken for those of ImageNet, COCO or VOC where there are 1000, 80 or 21, the patch size
    for 2, 2, 2, and DeepLabv3 of 512 channels for one of output stride 8 (see `create_model` to say otherwise).

    Raises:
        MobileViTError: the file is missing, damaged, unsafe, or no MobileViT.
    """
    source = read_file(path)
    if source.described:
        return checkpoint.restore(source)
    return create_model(source.card.name, task=source.card.task, weights=source)


def _count(num_classes: int | None, classes: Sequence[str] | None) -> int | None:
    """Agree on a number of classes; None: the caller says nothing of it."""
    if classes is not None and num_classes not in (None, len(classes)):
        raise MobileViTError(
            f"`num_classes` is {num_classes}, but `classes` has {len(classes)} names; leave `num_classes` out"
        )
    count = num_classes if classes is None else len(classes)
    if count is not None and count < 1:
        raise MobileViTError(f"`num_classes` is {count}; give 1 or more")
    return count


def _refuse_missing_background(source: Weights, num_classes: int | None) -> None:
    """Refuse a detector of 80 outputs, which is probably one of COCO's 80 classes, trained without the background."""
    head, state = HEADS[source.card.task], source.state
    count = head.count_classes(state)
    if source.described or not head.other_rows or count != head.num_classes - 1 or count == num_classes:
        return
    raise MobileViTError(
        f"{source.origin}: {len(state[head.class_tensor])} = {head.anchors} x (4 + {count + 1}) outputs, where "
        f"{count + 2} = {count + 1} classes and the background are needed; if they are {count} classes and the "
        f"background, give `num_classes`={count}"
    )


def _fill(model: Model, source: Weights, classes: tuple[str, ...] | None) -> ModelCard:
    """Fill a fresh model with what weights have for it, log what starts afresh, and make the card of the result.

    Args:
        model: has the card of a new model.
        source: weights of the same architecture, for any task and classes.
        classes: names that the caller gave, if any.

    Raises:
        MobileViTError: the weights have other shapes.
    """
    card, fresh, names = card_of(model), model.state_dict(), source.card.classes
    head, backbone = HEADS[card.task], backbone_of(source.state)
    same_task = source.card.task == card.task and len(backbone) < len(source.state)
    kept = _kept_classes(names, classes, model.num_classes)

    prefix = "" if isinstance(model, MobileViT) else "backbone."
    in_backbone = {prefix + key for key in backbone_of(fresh)}
    state = source.state if same_task else {prefix + key: value for key, value in backbone.items()}
    # The auxiliary head only helps training, so it may come and go.
    state = {key: value for key, value in state.items() if key in fresh or not key.startswith("aux_head.")}
    for key, value in fresh.items():
        if (not same_task and key not in in_backbone) or (key.startswith("aux_head.") and key not in state):
            state[key] = value
        elif same_task and head.class_tensors.match(key):
            if not names:
                state[key] = value
            elif key in state:
                state[key] = _keep_rows(state[key], value, kept, head.other_rows, (len(names), model.num_classes))
    if reason := find_misfit(fresh, state):
        raise MobileViTError(f"{source.origin}: not weights of this architecture ({reason}); change one of them")
    model.load_state_dict(state)

    origin = {key: value for key, value in source.card.provenance.items() if key in _ORIGIN}
    provenance = {"weights": Path(source.origin).name, **origin}
    if not same_task:
        told = "%s: weights for %s; the backbone is kept, the rest of the model for %s starts afresh"
        log.warning(told, source.origin, source.card.task, card.task)
        theirs = source.card.preprocessing
        preprocessing = dataclasses.replace(card.preprocessing, mean=theirs.mean, std=theirs.std)
        return dataclasses.replace(card, preprocessing=preprocessing, provenance=provenance)
    _log_kept(source.origin, names, kept, model.num_classes)
    if len(kept) == len(names) == model.num_classes:  # all classes are kept, so what was measured still holds
        return dataclasses.replace(source.card, classes=classes or names, provenance=provenance)
    return dataclasses.replace(card, preprocessing=source.card.preprocessing, provenance=provenance)


_ORIGIN = ("weights", "family", "source", "license")
"""Entries that a model takes over from the provenance of its starting weights."""


def _kept_classes(theirs: Sequence[str], ours: Sequence[str] | None, num_classes: int) -> dict[int, int]:
    """Find the classes whose rows are kept: index in the model -> index in the weights.

    They go by position where either side has no names for the same number of classes, else by those names that each
    side has exactly once.
    """
    unnamed = theirs == default_classes(len(theirs))
    if len(theirs) == num_classes and (unnamed or ours in (None, theirs)):
        return {index: index for index in range(num_classes)}
    if unnamed or ours is None:
        return {}
    times_here, times_there = Counter(ours), Counter(theirs)
    there = {name: index for index, name in enumerate(theirs)}
    return {index: there[name] for index, name in enumerate(ours) if times_here[name] == times_there[name] == 1}


def _keep_rows(
    theirs: Tensor, fresh: Tensor, kept: Mapping[int, int], other_rows: int, num_classes: tuple[int, int]
) -> Tensor:
    """Take the rows of the kept classes, and those that answer for no class, from other weights.

    Args:
        theirs: a tensor with a row for each class: for each anchor `other_rows`, then one for each class.
        fresh: the same of the new model.
        kept: index of a class in `fresh` -> in `theirs`.
        other_rows: rows of an anchor that answer for no class.
        num_classes: of `theirs` and of `fresh`.

    Returns:
        A tensor like `fresh`; `theirs` where its shape does not fit.
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
        some = [names[index] for index in kept.values()]
        listed = ", ".join(some[:10]) + (f" and {len(some) - 10} more" if len(some) > 10 else "")
        more = f"; {fresh} class{'es start' if fresh > 1 else ' starts'} afresh" if fresh else ""
        level = logging.WARNING if fresh else logging.INFO
        log.log(level, "%s: kept the answers for %s%s", origin, listed, more)
    else:
        reason = f"classify {len(names)} classes, not {num_classes}" if names else "have no classifier"
        if len(names) == num_classes:
            reason = "classify other classes"
        log.warning("%s: these weights %s; the classifier starts afresh, the rest is kept", origin, reason)
