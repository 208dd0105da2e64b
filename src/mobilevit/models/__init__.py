"""The tables that models are built from: architectures by name, and what each task adds to a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from mobilevit.card import TaskName, default_classes
from mobilevit.class_names import ADE20K_CLASSES, COCO_CLASSES, VOC_CLASSES
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.models.mobilevit import XS, XXS, Backbone, MobileViT, MobileViTBackbone, MobileViTConfig, S
from mobilevit.models.mobilevitv2 import MobileViTv2, MobileViTv2Backbone, MobileViTv2Config
from mobilevit.models.pspnet import PSPNet, PSPNetConfig
from mobilevit.models.ssdlite import SSDLite, SSDLiteConfig

Config = MobileViTConfig | MobileViTv2Config
"""The shape of a backbone of either generation."""

MODELS: dict[str, Config] = {
    "mobilevit_s": S,
    "mobilevit_xs": XS,
    "mobilevit_xxs": XXS,
    **{f"mobilevitv2_{percent:03}": MobileViTv2Config(width=percent / 100) for percent in range(50, 201, 25)},
}

Model = MobileViT | MobileViTv2 | SSDLite | DeepLabv3 | PSPNet
"""A model for any of the tasks."""

HeadConfig = SSDLiteConfig | DeepLabv3Config | PSPNetConfig
"""The shape of a model beyond its backbone."""

HEAD_CONFIGS: dict[str, type[HeadConfig]] = {
    "ssdlite": SSDLiteConfig,
    "deeplabv3": DeepLabv3Config,
    "pspnet": PSPNetConfig,
}
"""Types of heads by the names that `create_model` takes."""


def list_models() -> list[str]:
    """Return the names that `create_model` takes."""
    return sorted(MODELS)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the labels of ImageNet-1k by output index, as torchvision publishes them."""
    from torchvision.models import MobileNet_V2_Weights  # slow to import

    return tuple(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


@dataclass(frozen=True, kw_only=True)
class Head:
    """How models for one task are built, and their defaults."""

    build: Callable[[Config, int, HeadConfig | None], Model]
    """Makes a model from a backbone's shape, the number of classes and a head's shape (None: the published one)."""
    config_types: tuple[type[HeadConfig], ...]
    """Types of the head's shape, the usual one first; none if the head has no shape of its own."""
    num_classes: int
    """Classes of the data behind the public weights, which a new model has, too."""
    class_names: Mapping[int, Callable[[], tuple[str, ...]]]
    """Names of the classes of public weights, by their number."""
    output_stride: int
    """Output stride of a new model."""
    preprocessing: Preprocessing
    """Preprocessing of a new model."""
    class_layers: tuple[str, ...]
    """Layers whose tensors have rows for each class: for each anchor `other_rows` rows, then one for each class."""
    anchors: int = 1
    """Anchors in the first of them."""
    other_rows: int = 0
    """Rows of an anchor before those of the classes: four of the box and one of the background."""

    def guess_classes(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Name the classes of weights that do not: those of public data of as many classes, else placeholders."""
        rows = len(state.get(f"{self.class_layers[0]}.weight", ()))  # 0 without a classifier
        num_classes = max(rows // self.anchors - self.other_rows, 0)
        public = self.class_names.get(num_classes)
        return public() if public is not None else default_classes(num_classes)


def build_backbone(config: Config) -> Backbone:
    """Make a backbone with fresh weights."""
    return MobileViTBackbone(config) if isinstance(config, MobileViTConfig) else MobileViTv2Backbone(config)


def _build_detector(config: Config, num_classes: int, head: HeadConfig | None) -> Model:
    assert head is None or isinstance(head, SSDLiteConfig)
    return SSDLite(build_backbone(config), num_classes, head)


def _build_segmenter(config: Config, num_classes: int, head: HeadConfig | None) -> Model:
    if isinstance(head, PSPNetConfig):
        return PSPNet(build_backbone(config), num_classes, head)
    assert head is None or isinstance(head, DeepLabv3Config)
    return DeepLabv3(build_backbone(config), num_classes, head)


_DETECTION_INPUT = Preprocessing(size=(320, 320), resize_mode="stretch", interpolation="bilinear")
_SEGMENTATION_INPUT = Preprocessing(size=(512, 512), resize_mode="stretch", interpolation="bilinear")

HEADS: dict[TaskName, Head] = {
    "classification": Head(
        build=lambda config, num_classes, _: (
            MobileViT(config, num_classes) if isinstance(config, MobileViTConfig) else MobileViTv2(config, num_classes)
        ),
        config_types=(),
        num_classes=1000,
        class_names={1000: imagenet_classes},
        output_stride=32,
        preprocessing=Preprocessing(),
        class_layers=("classifier",),
    ),
    "detection": Head(
        build=_build_detector,
        config_types=(SSDLiteConfig,),
        num_classes=len(COCO_CLASSES),
        class_names={len(COCO_CLASSES): lambda: COCO_CLASSES},
        output_stride=32,
        preprocessing=_DETECTION_INPUT,
        class_layers=tuple(f"heads.{level}.predict" for level in range(6)),
        anchors=SSDLiteConfig().anchors_per_cell[0],
        other_rows=5,
    ),
    "segmentation": Head(
        build=_build_segmenter,
        config_types=(DeepLabv3Config, PSPNetConfig),
        num_classes=len(VOC_CLASSES),
        class_names={len(VOC_CLASSES): lambda: VOC_CLASSES, len(ADE20K_CLASSES): lambda: ADE20K_CLASSES},
        output_stride=16,
        preprocessing=_SEGMENTATION_INPUT,
        class_layers=("classifier", "aux_head.2"),
    ),
}


def published_preprocessing(config: Config, task: TaskName) -> Preprocessing:
    """Return the preprocessing with which public weights reach their published accuracy."""
    if task == "classification" and isinstance(config, MobileViTConfig):
        return Preprocessing(crop_fraction=0.9)
    return HEADS[task].preprocessing
