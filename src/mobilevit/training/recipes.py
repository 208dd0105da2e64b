"""Settings by name: the published ones, and ones that suit little data. Flags change single values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mobilevit.errors import MobileViTError, did_you_mean
from mobilevit.tasks.settings import ClassificationSettings
from mobilevit.training.config import HardwareSettings, OptimizerSettings, SizeSettings, TrainConfig

_ON_8 = "torchrun --standalone --nproc-per-node 8 -m mobilevit"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings, and what a user wants to know before starting."""

    about: str
    """Purpose, in one line."""
    command: str
    """Command to type."""
    hardware: str
    """Hardware that it was made for."""
    time: str
    """How long it takes there, if that was measured."""
    result: str
    """Expected accuracy, and who measured it."""
    settings: TrainConfig
    """All settings but `data`, which the user names."""


_YOURS = Path("data")

_NOT_TIMED = "not measured; see --dry-run"

_IMAGENET = TrainConfig(
    data=_YOURS,
    task="classification",
    epochs=300,
    batch_size=128,
    learning_rate=2e-3,
    classification=ClassificationSettings(min_crop_area=0.08),
    optimizer=OptimizerSettings(warmup_fraction=3000 / (300 * 935), final_lr_fraction=0.1),
    sizes=SizeSettings(multi_scale="paper"),
)
"""All three sizes (arXiv:2110.02178, sections 4.1 and A), for eight processes; on one GPU, --grad-accum-steps 8.

An epoch has 935 updates, as sizes vary.
"""

_COCO = TrainConfig(
    data=_YOURS,
    task="detection",
    weights="pretrained",
    epochs=200,
    batch_size=32,
    learning_rate=9e-4,
    optimizer=OptimizerSettings(warmup_fraction=500 / (200 * 917), final_lr_fraction=0.1),
    hardware=HardwareSettings(sync_batch_norm=True),
)
"""128 images a step, on all GPUs together, as for segmentation (arXiv:2110.02178, sections 4.2 and A)."""

_VOC = replace(
    _COCO,
    task="segmentation",
    epochs=50,
    optimizer=OptimizerSettings(warmup_fraction=500 / (50 * 83), final_lr_fraction=0.1),
)

RECIPES: dict[str, Recipe] = {
    **{
        f"imagenet_{model}": Recipe(
            about=f"The paper's {model} on ImageNet-1k, from scratch, sizes 160 to 320.",
            command=f"{_ON_8} train --data imagenet/ --recipe imagenet_{model} --out runs/imagenet",
            hardware="8 GPUs, 128 images at 256 pixels on each",
            time=_NOT_TIMED,
            result=f"{top1} % top-1 (arXiv:2110.02178, table 4)",
            settings=replace(_IMAGENET, model=model),
        )
        for model, top1 in (("mobilevit_xxs", 69.0), ("mobilevit_xs", 74.8), ("mobilevit_s", 78.4))
    },
    **{
        f"coco_{model}": Recipe(
            about=f"The paper's SSDLite on COCO at 320 pixels, from {model}'s ImageNet weights.",
            command=f"{_ON_8.replace('8', '4')} train --data coco/ --recipe coco_{model} --out runs/coco",
            hardware="4 GPUs, 32 images on each; on one, --batch-size 128",
            time=_NOT_TIMED,
            result=f"AP {ap} (arXiv:2110.02178, table 1)",
            settings=replace(_COCO, model=model),
        )
        for model, ap in (("mobilevit_xxs", 19.9), ("mobilevit_xs", 24.8), ("mobilevit_s", 27.7))
    },
    **{
        f"voc_{model}": Recipe(
            about=f"The paper's DeepLabv3 on VOC and SBD at 512 pixels, from {model}'s ImageNet weights.",
            command=f"{_ON_8.replace('8', '4')} train --data voc/ --recipe voc_{model} --out runs/voc",
            hardware="4 GPUs, 32 images on each; on one, --batch-size 128",
            time=_NOT_TIMED,
            result=f"mean IoU {miou} with COCO's images added (arXiv:2110.02178, table 2); less without",
            settings=replace(_VOC, model=model),
        )
        for model, miou in (("mobilevit_xxs", 73.6), ("mobilevit_xs", 77.1), ("mobilevit_s", 79.1))
    },
    "cifar10": Recipe(
        about="mobilevit_xxs on CIFAR-10's 32-pixel images, enlarged to 160, from scratch.",
        command="mobilevit train --data cifar10/ --recipe cifar10 --out runs/cifar10",
        hardware="1 GPU, 16 cores",
        time=_NOT_TIMED,
        result="not measured; others report 93.99 % top-1 at 256 pixels in 100 epochs",
        settings=TrainConfig(
            data=_YOURS,
            task="classification",
            model="mobilevit_xxs",
            image_size=160,
            crop_fraction=1.0,
            epochs=80,
            batch_size=256,
            learning_rate=2e-3,
            classification=ClassificationSettings(min_crop_area=0.4, cutmix=1.0),
            optimizer=OptimizerSettings(weight_decay=0.05),
            hardware=HardwareSettings(compile=True),
        ),
    ),
    "flowers": Recipe(
        about="mobilevit_xxs on some thousand small photographs, at 128 pixels, from scratch.",
        command="mobilevit train --data flowers/ --recipe flowers --out runs/flowers",
        hardware="2 cores",
        time="25 minutes for 4,300 images (benchmarks/results/flowers-mobilevit.json)",
        result="72.6 % top-1 on 4,300 flowers of 5 classes (same file)",
        settings=TrainConfig(
            data=_YOURS,
            task="classification",
            model="mobilevit_xxs",
            image_size=128,
            epochs=25,
            batch_size=16,
            learning_rate=8e-4,
            classification=ClassificationSettings(min_crop_area=0.3, mixup=0.1),
            optimizer=OptimizerSettings(clip_grad_norm=1.0),
        ),
    ),
    "small_classification": Recipe(
        about="Some hundred to some thousand images, from ImageNet weights.",
        command="mobilevit train --data images/ --recipe small_classification --out runs/images",
        hardware="a laptop, or 1 GPU",
        time=_NOT_TIMED,
        result="depends on the images; not measured",
        settings=TrainConfig(
            data=_YOURS,
            task="classification",
            weights="pretrained",
            epochs=20,
            batch_size=32,
            learning_rate=4e-4,
            early_stopping=8,
            optimizer=OptimizerSettings(layer_decay=0.8),
            classification=ClassificationSettings(mixup=0.2),
        ),
    ),
    "small_detection": Recipe(
        about="Some hundred images with boxes, from ImageNet weights.",
        command="mobilevit train --data cells/ --recipe small_detection --out runs/cells",
        hardware="a laptop, or 1 GPU",
        time=_NOT_TIMED,
        result="depends on the images; not measured",
        settings=TrainConfig(
            data=_YOURS,
            task="detection",
            weights="pretrained",
            epochs=60,
            batch_size=16,
            learning_rate=5e-4,
        ),
    ),
    "small_segmentation": Recipe(
        about="Some hundred images with masks, from ImageNet weights.",
        command="mobilevit train --data streets/ --recipe small_segmentation --out runs/streets",
        hardware="a laptop, or 1 GPU",
        time=_NOT_TIMED,
        result="depends on the images; not measured",
        settings=TrainConfig(
            data=_YOURS,
            task="segmentation",
            weights="pretrained",
            epochs=60,
            batch_size=16,
            learning_rate=2e-4,
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """Find a recipe by its name.

    Raises:
        MobileViTError: no such recipe; the nearest name is suggested.
    """
    if name not in RECIPES:
        raise MobileViTError(f"unknown recipe {name!r}; {did_you_mean(name, RECIPES)}there are {', '.join(RECIPES)}")
    return RECIPES[name]


def describe_recipes() -> str:
    """List all recipes as text."""
    rows = ("command", "hardware", "time", "result")
    parts = []
    for name, recipe in RECIPES.items():
        told = [f"    {row:<9} {getattr(recipe, row)}" for row in rows]
        parts.append("\n".join([f"{name}: {recipe.about}", *told]))
    return "\n\n".join(parts)
