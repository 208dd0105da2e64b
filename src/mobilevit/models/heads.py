"""The three tasks side by side: how models for each are built, and their defaults."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from mobilevit.card import TaskName, default_classes
from mobilevit.class_names import COCO_CLASSES, VOC_CLASSES
from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.models.mobilevit import MobileViT, MobileViTBackbone, MobileViTConfig
from mobilevit.models.ssdlite import SSDLite, SSDLiteConfig

Model = MobileViT | SSDLite | DeepLabv3
"""A model for any of the tasks."""

HeadConfig = SSDLiteConfig | DeepLabv3Config
"""The shape of a model beyond its backbone."""


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the labels of ImageNet-1k by output index, as torchvision publishes them."""
    from torchvision.models import MobileNet_V2_Weights  # slow to import

    return tuple(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


@dataclass(frozen=True, kw_only=True)
class Head:
    """How models for one task are built, and their defaults."""

    build: Callable[[MobileViTConfig, int, HeadConfig | None], Model]
    """Makes a model from a backbone's shape, the number of classes and a head's shape (None: the published one)."""
    config_type: type[SSDLiteConfig] | type[DeepLabv3Config] | None
    """Type of the head's shape; None if the head has none of its own."""
    num_classes: int
    """Classes of a new model, which are those of the data behind the public weights."""
    class_names: Callable[[], tuple[str, ...]]
    """Names of these classes."""
    output_stride: int
    """Output stride of a new model."""
    preprocessing: Preprocessing
    """Preprocessing of a new model."""
    published_preprocessing: Preprocessing
    """Preprocessing with which the public weights reach their published accuracy."""
    class_tensor: str
    """A tensor with a row for each class: for each anchor `other_rows` rows, then one for each class."""
    class_tensors: re.Pattern[str]
    """Matches the names of all such tensors."""
    anchors: int = 1
    """Anchors in `class_tensor`."""
    other_rows: int = 0
    """Rows of an anchor before those of the classes: four of the box and one of the background."""

    def count_classes(self, state: Mapping[str, Tensor]) -> int:
        """Count the classes of weights; 0 if they have no classifier."""
        rows = len(state[self.class_tensor]) if self.class_tensor in state else 0
        return max(rows // self.anchors - self.other_rows, 0)

    def guess_classes(self, num_classes: int) -> tuple[str, ...]:
        """Name the classes of weights that do not: those of the public data if their number fits, else placeholders."""
        return self.class_names() if num_classes == self.num_classes else default_classes(num_classes)


def _build_classifier(config: MobileViTConfig, num_classes: int, _head: HeadConfig | None) -> Model:
    return MobileViT(config, num_classes)


def _build_detector(config: MobileViTConfig, num_classes: int, head: HeadConfig | None) -> Model:
    assert head is None or isinstance(head, SSDLiteConfig)
    return SSDLite(MobileViTBackbone(config), num_classes, head)


def _build_segmenter(config: MobileViTConfig, num_classes: int, head: HeadConfig | None) -> Model:
    assert head is None or isinstance(head, DeepLabv3Config)
    return DeepLabv3(MobileViTBackbone(config), num_classes, head)


_DETECTION_INPUT = Preprocessing(size=(320, 320), resize_mode="stretch", interpolation="bilinear")
_SEGMENTATION_INPUT = Preprocessing(size=(512, 512), resize_mode="stretch", interpolation="bilinear")

HEADS: dict[TaskName, Head] = {
    "classification": Head(
        build=_build_classifier,
        config_type=None,
        num_classes=1000,
        class_names=imagenet_classes,
        output_stride=32,
        preprocessing=Preprocessing(),
        published_preprocessing=Preprocessing(crop_fraction=0.9),
        class_tensor="classifier.weight",
        class_tensors=re.compile(r"classifier\."),
    ),
    "detection": Head(
        build=_build_detector,
        config_type=SSDLiteConfig,
        num_classes=len(COCO_CLASSES),
        class_names=lambda: COCO_CLASSES,
        output_stride=32,
        preprocessing=_DETECTION_INPUT,
        published_preprocessing=_DETECTION_INPUT,
        class_tensor="heads.0.predict.weight",
        class_tensors=re.compile(r"heads\.\d+\.predict\."),
        anchors=SSDLiteConfig().anchors_per_cell[0],
        other_rows=5,
    ),
    "segmentation": Head(
        build=_build_segmenter,
        config_type=DeepLabv3Config,
        num_classes=len(VOC_CLASSES),
        class_names=lambda: VOC_CLASSES,
        output_stride=16,
        preprocessing=_SEGMENTATION_INPUT,
        published_preprocessing=_SEGMENTATION_INPUT,
        class_tensor="classifier.weight",
        class_tensors=re.compile(r"classifier\.|aux_head\.2\."),
    ),
}


def known_task(task: str) -> TaskName:
    """Check the name of a task.

    Raises:
        MobileViTError: no such task.
    """
    if task not in HEADS:
        raise MobileViTError(f"unknown task {task!r}; choose from {', '.join(HEADS)}")
    return task


def build_model(config: MobileViTConfig, *, task: str, num_classes: int, head: HeadConfig | None = None) -> Model:
    """Make a model with fresh weights and no card.

    Args:
        config: shape of the backbone.
        task: "classification", "detection" or "segmentation".
        num_classes: without the background in detection, with it in segmentation.
        head: shape of the part after the backbone; None: the published one.

    Raises:
        MobileViTError: unknown task, a head of another task, or a backbone that does not suit it.
    """
    kind = HEADS[known_task(task)]
    if head is not None and (kind.config_type is None or not isinstance(head, kind.config_type)):
        remedy = f"give a {kind.config_type.__name__}" if kind.config_type else "leave it out"
        raise MobileViTError(f"`head` is a {type(head).__name__}, which does not suit {task}; {remedy}")
    return kind.build(config, num_classes, head)
