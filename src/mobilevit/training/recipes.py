"""Settings by name: the published ones, and ones that suit little data. Flags change single values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mobilevit.errors import unknown
from mobilevit.tasks.settings import ClassificationSettings
from mobilevit.training.config import HardwareSettings, OptimizerSettings, SizeSettings, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings, and what a user wants to know before starting."""

    about: str
    """Purpose, in one line."""
    folder: str
    """Name of the folders of data and run in the command to type."""
    num_processes: int = 1
    hardware: str = "a laptop, or 1 GPU"
    time: str = "not measured; see --dry-run"
    result: str = "depends on the images; not measured"
    """Expected accuracy, and who measured it."""
    settings: TrainConfig
    """All but `data`, which the user names."""


def _for_all_models(recipe: Recipe, results: Mapping[str, float]) -> dict[str, Recipe]:
    """Fill in the name and the published result of each model."""
    return {
        f"{recipe.folder}_{model}": replace(
            recipe,
            about=recipe.about.format(model=model),
            result=recipe.result.format(result),
            settings=replace(recipe.settings, model=model),
        )
        for model, result in results.items()
    }


_IMAGENET = Recipe(
    about="The paper's {model} on ImageNet-1k, from scratch, sizes 160 to 320.",
    folder="imagenet",
    num_processes=8,
    hardware="8 GPUs, 128 images at 256 pixels on each",
    result="{} % top-1 (arXiv:2110.02178, table 4)",
    # arXiv:2110.02178, sections 4.1 and A; on one GPU, --grad-accum-steps 8. An epoch has 935 updates, as sizes vary.
    settings=TrainConfig(
        data="",
        task="classification",
        epochs=300,
        batch_size=128,
        learning_rate=2e-3,
        classification=ClassificationSettings(min_crop_area=0.08),
        optimizer=OptimizerSettings(warmup_fraction=3000 / (300 * 935), final_lr_fraction=0.1),
        sizes=SizeSettings(multi_scale="paper"),
    ),
)
_COCO = Recipe(
    about="The paper's SSDLite on COCO at 320 pixels, from {model}'s ImageNet weights.",
    folder="coco",
    num_processes=4,
    hardware="4 GPUs, 32 images on each; on one, --batch-size 128",
    result="AP {} (arXiv:2110.02178, table 1)",
    # 128 images a step, on all GPUs together, as for segmentation (arXiv:2110.02178, sections 4.2 and A).
    settings=TrainConfig(
        data="",
        task="detection",
        weights="pretrained",
        epochs=200,
        batch_size=32,
        learning_rate=9e-4,
        optimizer=OptimizerSettings(warmup_fraction=500 / (200 * 917), final_lr_fraction=0.1),
        hardware=HardwareSettings(sync_batch_norm=True),
    ),
)
_VOC = replace(
    _COCO,
    about="The paper's DeepLabv3 on VOC and SBD at 512 pixels, from {model}'s ImageNet weights.",
    folder="voc",
    result="mean IoU {} with COCO's images added (arXiv:2110.02178, table 2); less without",
    settings=replace(
        _COCO.settings,
        task="segmentation",
        epochs=50,
        optimizer=OptimizerSettings(warmup_fraction=500 / (50 * 83), final_lr_fraction=0.1),
    ),
)

RECIPES: dict[str, Recipe] = {
    **_for_all_models(_IMAGENET, {"mobilevit_xxs": 69.0, "mobilevit_xs": 74.8, "mobilevit_s": 78.4}),
    **_for_all_models(_COCO, {"mobilevit_xxs": 19.9, "mobilevit_xs": 24.8, "mobilevit_s": 27.7}),
    **_for_all_models(_VOC, {"mobilevit_xxs": 73.6, "mobilevit_xs": 77.1, "mobilevit_s": 79.1}),
    "cifar10": Recipe(
        about="mobilevit_xxs on CIFAR-10's 32-pixel images, enlarged to 160, from scratch.",
        folder="cifar10",
        hardware="1 GPU, 16 cores",
        result="not measured; others report 93.99 % top-1 at 256 pixels in 100 epochs",
        settings=TrainConfig(
            data="",
            task="classification",
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
        folder="flowers",
        hardware="2 cores",
        time="25 minutes for 4,300 images (benchmarks/results/flowers-mobilevit.json)",
        result="72.6 % top-1 on 4,300 flowers of 5 classes (same file)",
        settings=TrainConfig(
            data="",
            task="classification",
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
        folder="images",
        settings=TrainConfig(
            data="",
            task="classification",
            weights="pretrained",
            learning_rate=4e-4,
            early_stopping=8,
            optimizer=OptimizerSettings(layer_decay=0.8),
            classification=ClassificationSettings(mixup=0.2),
        ),
    ),
    "small_detection": Recipe(
        about="Some hundred images with boxes, from ImageNet weights.",
        folder="cells",
        settings=TrainConfig(
            data="", task="detection", weights="pretrained", epochs=60, batch_size=16, learning_rate=5e-4
        ),
    ),
    "small_segmentation": Recipe(
        about="Some hundred images with masks, from ImageNet weights.",
        folder="streets",
        settings=TrainConfig(
            data="", task="segmentation", weights="pretrained", epochs=60, batch_size=16, learning_rate=2e-4
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """Find a recipe by its name; raise a `MobileViTError` that suggests the nearest if there is none."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def describe_recipes() -> str:
    """List all recipes as text."""
    lines = []
    for name, recipe in RECIPES.items():
        launcher = "mobilevit"
        if recipe.num_processes > 1:
            launcher = f"torchrun --standalone --nproc-per-node {recipe.num_processes} -m mobilevit"
        lines += [
            f"{name}: {recipe.about}",
            f"    command   {launcher} train --data {recipe.folder}/ --recipe {name} --out runs/{recipe.folder}",
            f"    hardware  {recipe.hardware}",
            f"    time      {recipe.time}",
            f"    result    {recipe.result}",
            "",
        ]
    return "\n".join(lines[:-1])
