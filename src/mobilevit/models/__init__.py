"""The architectures, by name and task."""

from __future__ import annotations

from difflib import get_close_matches

from mobilevit.card import Task
from mobilevit.errors import MobileViTError
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.models.mobilevit import XS, XXS, MobileViT, MobileViTBackbone, MobileViTConfig, S
from mobilevit.models.ssdlite import SSDLite, SSDLiteConfig

MODELS: dict[str, MobileViTConfig] = {
    "mobilevit_s": S,
    "mobilevit_xs": XS,
    "mobilevit_xxs": XXS,
}

Model = MobileViT | SSDLite | DeepLabv3
"""A model for any of the tasks."""

HeadConfig = SSDLiteConfig | DeepLabv3Config
"""What decides the shape of a model beyond its backbone."""

HEAD_CONFIGS: dict[Task, type[HeadConfig] | None] = {
    "classification": None,
    "detection": SSDLiteConfig,
    "segmentation": DeepLabv3Config,
}
"""Type of the head's configuration, by task."""


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return sorted(MODELS)


def model_config(name: str) -> MobileViTConfig:
    """The configuration of a named model.

    Raises:
        ValueError: no such model; the nearest name is suggested.
    """
    if name not in MODELS:
        near = get_close_matches(name, MODELS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else ""
        raise MobileViTError(f"unknown model {name!r}; {hint} There are {', '.join(list_models())}".replace("  ", " "))
    return MODELS[name]


def known_task(task: str) -> Task:
    """The task itself.

    Raises:
        ValueError: no such task.
    """
    if task not in HEAD_CONFIGS:
        raise MobileViTError(f"unknown task {task!r}; choose from {', '.join(HEAD_CONFIGS)}")
    return task


def build_model(config: MobileViTConfig, *, task: str, num_classes: int, head: HeadConfig | None = None) -> Model:
    """A model with fresh weights and no card.

    Args:
        config: the backbone.
        task: "classification", "detection" or "segmentation".
        num_classes: without the background in detection, with it in segmentation.
        head: shape of the part after the backbone; None: the published one.

    Raises:
        ValueError: unknown task, a head of another task, or a backbone that does not suit it.
    """
    wanted = HEAD_CONFIGS[known_task(task)]
    if head is not None and not (wanted and isinstance(head, wanted)):
        remedy = f"give a {wanted.__name__}" if wanted else "leave it out"
        raise MobileViTError(f"head is a {type(head).__name__}, which does not suit {task}; {remedy}")
    if task == "detection":
        return SSDLite(MobileViTBackbone(config), num_classes, head if isinstance(head, SSDLiteConfig) else None)
    if task == "segmentation":
        return DeepLabv3(MobileViTBackbone(config), num_classes, head if isinstance(head, DeepLabv3Config) else None)
    return MobileViT(config, num_classes)
