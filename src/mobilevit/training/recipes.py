"""Settings by name: the published ones, and ones that suit little data. Flags change single values."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Values for fields of `TrainConfig`."""

    about: str
    """What it is for, in a line."""
    settings: dict[str, Any]
    """By field; everything else keeps its default."""


_PUBLISHED_HEADS: dict[str, Any] = {
    "model": "mobilevit_s",
    "weights": "pretrained",
    "batch_size": 128,
    "learning_rate": 9e-4,
    "final_lr_fraction": 0.1,
}
"""What detection and segmentation share (arXiv:2110.02178, sections 4.2 and A): 128 pictures a step, on all GPUs."""

_IMAGENET: dict[str, Any] = {
    "task": "classification",
    "multi_scale": "paper",
    "min_crop_area": 0.08,
    "epochs": 300,
    "batch_size": 128,
    "learning_rate": 2e-3,
    "warmup_fraction": 3000 / (300 * 1251),
    "final_lr_fraction": 0.1,
}
"""Of all three sizes (arXiv:2110.02178, sections 4.1 and A), for eight processes; on one GPU, --grad-accum-steps 8."""

RECIPES: dict[str, Recipe] = {
    **{
        f"imagenet_{model}": Recipe(
            about=f"The paper's {model} on ImageNet-1k, from scratch, sizes 160 to 320: 300 epochs, 8 x 128 pictures a "
            f"step. Published: {top1} % top-1.",
            settings=_IMAGENET | {"model": model},
        )
        for model, top1 in (("mobilevit_xxs", 69.0), ("mobilevit_xs", 74.8), ("mobilevit_s", 78.4))
    },
    "coco-detection": Recipe(
        about="The paper's SSDLite on COCO at 320 pixels from an ImageNet backbone: 200 epochs, 128 pictures a step.",
        settings=_PUBLISHED_HEADS | {"task": "detection", "epochs": 200, "warmup_fraction": 500 / (200 * 917)},
    ),
    "voc-segmentation": Recipe(
        about="The paper's DeepLabv3 on VOC and SBD, without its COCO part, at 512 pixels: 50 epochs, 128 a step.",
        settings=_PUBLISHED_HEADS | {"task": "segmentation", "epochs": 50, "warmup_fraction": 500 / (50 * 83)},
    ),
    "small-detection": Recipe(
        about="Some hundred pictures with boxes, from an ImageNet backbone.",
        settings={"task": "detection", "weights": "pretrained", "epochs": 60, "batch_size": 16, "learning_rate": 5e-4},
    ),
    "small-segmentation": Recipe(
        about="Some hundred pictures with masks, from an ImageNet backbone.",
        settings={
            "task": "segmentation",
            "weights": "pretrained",
            "epochs": 60,
            "batch_size": 16,
            "learning_rate": 2e-4,
        },
    ),
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: no such recipe; the nearest name is suggested.
    """
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown recipe {name!r}; {hint}There are {', '.join(RECIPES)}")
    return RECIPES[name]
