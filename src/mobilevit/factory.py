"""From a name or a file to a model: architecture, head, weights, card."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mobilevit.card import ModelCard, Task, card_of, default_classes
from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import MODELS, HeadConfig, Model, build_model, known_task, model_config
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.mobilevit import MobileViT, MobileViTBackbone, MobileViTConfig, PatchSize
from mobilevit.models.ssdlite import SSDLiteConfig
from mobilevit.weights import checkpoint, pretrained
from mobilevit.weights.convert import convert_state_dict, detect_family, detect_task, unwrap_state_dict

log = logging.getLogger("mobilevit")

_NUM_CLASSES = {"classification": 1000, "detection": 80, "segmentation": 21}
_PREPROCESSING = {
    "classification": Preprocessing(),
    "detection": Preprocessing(size=(320, 320), resize_mode="stretch", interpolation="bilinear"),
    "segmentation": Preprocessing(size=(512, 512), resize_mode="stretch", interpolation="bilinear"),
}


def create_model(
    name: str,
    *,
    task: str = "classification",
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
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
            Of weights for other classes, the answers for classes of the same name are kept and the others start
            afresh; of weights for another task, the backbone is kept. The log says so.
        patch_size: at strides 8, 16 and 32; (8, 4, 2) is the paper's configuration B. None: as `weights`, or 2, 2, 2.
        output_stride: 32, or 16 or 8 by dilation. None: as `weights`, or 16 for segmentation and 32 otherwise.
        head: shape of the part after the backbone, in detection and segmentation. None: as `weights`, or the published.

    Returns:
        The model in eval mode; `model.card` holds its classes and preprocessing.

    Raises:
        ValueError: unknown name or task, options that contradict each other, or weights that cannot be read or belong
            to another architecture.
    """
    config = model_config(name)
    task = known_task(task)
    if classes is not None and num_classes not in (None, len(classes)):
        raise MobileViTError(
            f"num_classes is {num_classes}, but classes has {len(classes)} names; leave num_classes out"
        )
    if classes is not None:
        num_classes = len(classes)
    if num_classes is not None and num_classes < 1:
        raise MobileViTError(f"num_classes is {num_classes}; give 1 or more")
    if task == "detection" and output_stride not in (None, 32):
        raise MobileViTError(
            f"output_stride is {output_stride}; detection needs maps at strides 16 and 32, so leave it out"
        )
    source = None if weights is None else _load_source(weights, name, task, num_classes)
    same_task = source is not None and source.card.task == task
    if source is not None:
        config = source.config
    stride = output_stride
    if stride is None:
        stride = config.output_stride if same_task else 16 if task == "segmentation" else 32
    if source is not None and same_task and head is None:
        head = _reaching_as_far(source.head, config.output_stride / stride)
    config = dataclasses.replace(config, output_stride=stride, patch_size=patch_size or config.patch_size)
    known = len(source.card.classes) if source is not None and same_task else 0
    num_classes = num_classes or known or _NUM_CLASSES[task]
    model = build_model(config, task=task, num_classes=num_classes, head=head)
    if source is None:
        names = default_classes(num_classes) if classes is None else tuple(classes)
        model.card = ModelCard(name=name, task=task, classes=names, preprocessing=_PREPROCESSING[task])
    else:
        model.card = _fill(model, source, task, None if classes is None else tuple(classes), weights)
    return model.eval()


def load(path: str | os.PathLike[str]) -> Model:
    """Load a checkpoint: architecture, classes and preprocessing come from the file, and are in `model.card`.

    A file from ml-cvnets, timm or transformers says none of these: architecture and task are recognized by its names
    and shapes, the classes are taken for those of ImageNet, COCO or VOC where there are 1000, 80 or 21, the patch size
    for 2, 2, 2, and DeepLabv3 of 512 channels for one of output stride 8 (see `create_model` to say otherwise).

    Raises:
        ValueError: the file is missing, damaged, unsafe, or no MobileViT.
    """
    content, header = checkpoint.read(path)
    if header is not None:
        return checkpoint.restore(content, header, path)
    state = convert_state_dict(content, to="mobilevit")
    return create_model(_architecture_of(state, path), task=detect_task(state), weights=path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WeightSource:
    state: dict[str, Tensor]
    card: ModelCard
    """No classes where the part that answers for them is missing."""
    config: MobileViTConfig
    head: HeadConfig | None


def _load_source(
    weights: str | os.PathLike[str], architecture: str, wanted_task: Task, wanted_classes: int | None
) -> _WeightSource:
    public = pretrained.PRETRAINED.get(str(weights))
    if public is None and not _looks_like_a_file(weights):
        pretrained.resolve(str(weights))  # raises, and suggests the nearest name
    if public is not None and public.architecture != architecture:
        raise MobileViTError(
            f"weights {weights} belong to {public.architecture}, not {architecture}; change one of them"
        )
    path = Path(weights) if public is None else pretrained.resolve(public.name)
    content, header = checkpoint.read(path)
    if header is not None:
        return _own_source(checkpoint.restore(content, header, path), path, architecture)
    tensors = unwrap_state_dict(content)
    state = convert_state_dict(tensors, to="mobilevit")
    task = detect_task(state)
    provenance = {"weights": path.name, "family": detect_family(tensors)}
    preprocessing = _PREPROCESSING[task]
    if task == "classification":
        preprocessing = Preprocessing(crop_fraction=0.9)  # with which the public weights reach their published accuracy
    if public is not None:
        provenance = {"weights": public.name, "source": public.source, "license": public.license}
        preprocessing = public.preprocessing
    config, head = _shape_of(state, task, MODELS[architecture])
    num_classes = _count_classes(state, task)
    if (task, wanted_task, num_classes) == ("detection", "detection", 79) and wanted_classes != 79:
        raise MobileViTError(
            f"{path}: {len(state['heads.0.predict.weight'])} = 6 x (4 + 80) outputs, where 81 = 80 classes and the "
            "background are needed; if they are 79 classes and the background, give num_classes=79"
        )
    classes = pretrained.public_classes(task, num_classes)
    card = ModelCard(name=architecture, task=task, classes=classes, preprocessing=preprocessing, provenance=provenance)
    return _WeightSource(state=state, card=card, config=config, head=head)


def _own_source(model: Model, path: Path, architecture: str) -> _WeightSource:
    card = card_of(model)
    if card.name != architecture:
        raise MobileViTError(f"{path}: weights of {card.name}, not {architecture}; change the model or the weights")
    provenance = {"weights": path.name, **{k: v for k, v in card.provenance.items() if k in ("weights", "license")}}
    return _WeightSource(
        state=dict(model.state_dict()),
        card=dataclasses.replace(card, provenance=provenance),
        config=model.config,
        head=None if isinstance(model, MobileViT) else model.head_config,
    )


def _looks_like_a_file(weights: str | os.PathLike[str]) -> bool:
    path = Path(weights)
    return path.exists() or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or len(path.parts) > 1


def _shape_of(
    state: Mapping[str, Tensor], task: Task, config: MobileViTConfig
) -> tuple[MobileViTConfig, HeadConfig | None]:
    """What weights from elsewhere say of their architecture; dilation leaves no trace in them, so it goes by width."""
    if task != "segmentation" or "aspp.near.conv.weight" not in state:
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


def _reaching_as_far(head: HeadConfig | None, ratio: float) -> HeadConfig | None:
    """The same head on a map that is `ratio` times as large."""
    if not isinstance(head, DeepLabv3Config):
        return head
    return dataclasses.replace(head, atrous_rates=tuple(max(int(rate * ratio), 1) for rate in head.atrous_rates))


def _count_classes(state: Mapping[str, Tensor], task: Task) -> int:
    """How many classes weights from elsewhere answer for; 0 where that part is missing."""
    if task != "detection":
        return len(state.get("classifier.weight", ()))
    outputs = len(state.get("heads.0.predict.weight", ())) // SSDLiteConfig().anchors_per_cell[0]
    return max(outputs - 4 - 1, 0)


# Tensors whose rows answer for the classes. A detector's are anchor by anchor: four numbers of the box, the background,
# then the classes.
_ANSWERS: dict[str, tuple[re.Pattern[str], int]] = {
    "classification": (re.compile(r"classifier\."), 0),
    "detection": (re.compile(r"heads\.\d+\.predict\."), 5),
    "segmentation": (re.compile(r"classifier\.|aux_head\.2\."), 0),
}


def _fill(
    model: Model, source: _WeightSource, task: Task, classes: tuple[str, ...] | None, weights: object
) -> ModelCard:
    """Load what suits the model and say what does not; the card of the result."""
    try:
        only_backbone = len(_backbone(source.state)) == len(source.state)
        if source.card.task == task and not only_backbone:
            return _fill_same_task(model, source, classes, weights)
        return _fill_backbone(model, source, task, classes, weights)
    except (ValueError, RuntimeError) as error:  # from comparing shapes, and from using tensors of wrong ones
        reason = str(error).splitlines()[0].strip().rstrip(".")
        raise MobileViTError(f"{weights}: not weights of this architecture ({reason})") from None


def _fill_backbone(
    model: Model, source: _WeightSource, task: Task, classes: tuple[str, ...] | None, weights: object
) -> ModelCard:
    prefix, fresh = "" if task == "classification" else "backbone.", model.state_dict()
    rest = {key: fresh[key] for key in fresh.keys() - {prefix + key for key in _backbone(fresh)}}
    checkpoint.fill(model, rest | {prefix + key: value for key, value in _backbone(source.state).items()})
    told = "%s: weights for %s; the backbone is kept, the rest of the model for %s starts afresh"
    log.warning(told, weights, source.card.task, task)
    normalization = source.card.preprocessing
    return ModelCard(
        name=source.card.name,
        task=task,
        classes=default_classes(model.num_classes) if classes is None else classes,
        preprocessing=dataclasses.replace(_PREPROCESSING[task], mean=normalization.mean, std=normalization.std),
        provenance=source.card.provenance,
    )


def _fill_same_task(model: Model, source: _WeightSource, classes: tuple[str, ...] | None, weights: object) -> ModelCard:
    card, fresh = source.card, model.state_dict()
    # The auxiliary head helps training only, so it may come and go.
    state = {key: value for key, value in source.state.items() if key in fresh or not key.startswith("aux_head.")}
    state |= {key: value for key, value in fresh.items() if key not in state and key.startswith("aux_head.")}

    theirs, count = card.classes, model.num_classes
    unnamed = theirs == default_classes(len(theirs))
    if len(theirs) == count and (unnamed or classes in (None, theirs)):
        checkpoint.fill(model, state)
        return dataclasses.replace(card, classes=classes or theirs)

    kept = {} if unnamed else _same_names(theirs, classes or ())
    pattern, fixed = _ANSWERS[card.task]
    for key in filter(pattern.match, fresh):
        known = key in state and len(theirs) > 0
        state[key] = _move_rows(state[key], fresh[key], kept, fixed, (len(theirs), count)) if known else fresh[key]
    checkpoint.fill(model, state)
    _tell_kept(weights, theirs, count, kept)
    card = dataclasses.replace(card, classes=classes or default_classes(count))
    if len(kept) == len(theirs) == count:  # only the order is another
        return card
    return dataclasses.replace(card, metrics={}, score_threshold=None)


def _same_names(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Index in ours -> index in theirs, of the names that each has exactly once."""
    times_here, times_there = Counter(ours), Counter(theirs)
    there = {name: index for index, name in enumerate(theirs)}
    return {index: there[name] for index, name in enumerate(ours) if times_here[name] == times_there[name] == 1}


def _move_rows(theirs: Tensor, fresh: Tensor, kept: Mapping[int, int], fixed: int, counts: tuple[int, int]) -> Tensor:
    """Fresh rows, but for the first `fixed` of every anchor and those of the kept classes.

    Args:
        theirs: a tensor whose rows answer for classes.
        fresh: the same of the new model.
        kept: index of a class in the new model -> in theirs.
        fixed: rows of an anchor that stand before those of the classes.
        counts: of classes, theirs and the new model's.
    """
    old = theirs.reshape(-1, fixed + counts[0], *theirs.shape[1:])
    new = fresh.clone().reshape(-1, fixed + counts[1], *fresh.shape[1:])
    new[:, :fixed] = old[:, :fixed]
    if kept:
        new[:, [fixed + index for index in kept]] = old[:, [fixed + index for index in kept.values()]]
    return new.reshape(fresh.shape)


def _tell_kept(weights: object, names: Sequence[str], num_classes: int, kept: Mapping[int, int]) -> None:
    fresh = num_classes - len(kept)
    if kept and not fresh and len(names) == num_classes:
        log.info("%s: the same %d classes in another order; their answers are reordered", weights, num_classes)
    elif kept:
        some = [names[index] for index in kept.values()]
        listed = ", ".join(some[:10]) + (f" and {len(some) - 10} more" if len(some) > 10 else "")
        more = f"; {fresh} class{'es start' if fresh > 1 else ' starts'} afresh" if fresh else ""
        log.log(logging.WARNING if fresh else logging.INFO, "%s: kept the answers for %s%s", weights, listed, more)
    else:
        reason = f"classify {len(names)} classes, not {num_classes}" if names else "have no classifier"
        if len(names) == num_classes:
            reason = "classify other classes"
        log.warning("%s: these weights %s; the classifier starts afresh, the rest is kept", weights, reason)


def _backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors of a model for any task, under their own names."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    heads = ("head_conv.", "classifier.")
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if (key.startswith(prefix) if prefix else not key.startswith(heads))
    }


def _architecture_of(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    shapes = _shapes(_backbone(state))
    for name, config in MODELS.items():
        with torch.device("meta"):
            ours = MobileViTBackbone(config).state_dict()
        if _shapes(ours) == shapes:
            return name
    raise MobileViTError(f"{path}: its shapes fit none of {', '.join(MODELS)}")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
