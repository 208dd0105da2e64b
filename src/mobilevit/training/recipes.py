"""Settings by name: the published ones, and ones that suit little data. Flags change single values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mobilevit.errors import unknown
from mobilevit.tasks.settings import ClassificationSettings, SegmentationSettings
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
    figures: Mapping[str, float] = field(default_factory=dict)
    """Where several models have the recipe: the published accuracy of each, which `result` has the unit of."""
    settings: TrainConfig
    """All but `data`, which the user names."""


def _for_models(
    name: str, recipe: Recipe, figures: Mapping[str, float], own: Callable[[str], TrainConfig] | None = None
) -> dict[str, Recipe]:
    """Make the recipe of each model that has a published figure; `own` has the settings that differ by model."""
    return {
        f"{name}_{model}": replace(
            recipe, figures=figures, settings=replace(recipe.settings if own is None else own(model), model=model)
        )
        for model in figures
    }


# -- MobileViT --------------------------------------------------------------------------------------------------------

_IMAGENET = Recipe(
    about="MobileViT's paper on ImageNet-1k, from scratch, sizes 160 to 320.",
    folder="imagenet",
    num_processes=8,
    hardware="8 GPUs, 128 images at 256 pixels on each",
    result="% top-1 (arXiv:2110.02178, table 4)",
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
    about="MobileViT's paper on COCO: SSDLite at 320 pixels, from ImageNet weights.",
    folder="coco",
    num_processes=4,
    hardware="4 GPUs, 32 images on each; on one, --batch-size 128",
    result="AP (arXiv:2110.02178, table 1)",
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
    about="MobileViT's paper on VOC and SBD: DeepLabv3 at 512 pixels, from ImageNet weights.",
    folder="voc",
    result="mean IoU with COCO's images added (arXiv:2110.02178, table 2); less without",
    settings=replace(
        _COCO.settings,
        task="segmentation",
        epochs=50,
        optimizer=OptimizerSettings(warmup_fraction=500 / (50 * 83), final_lr_fraction=0.1),
    ),
)

# -- MobileViTv2: arXiv:2206.02680, tables 8 to 10, and the settings published with ml-cvnets -------------------------

_V2_PEAK_AND_DECAY = {
    "mobilevitv2_050": (0.0090, 0.004),
    "mobilevitv2_075": (0.0090, 0.008),
    "mobilevitv2_100": (0.0075, 0.013),
    "mobilevitv2_125": (0.0049, 0.020),
    "mobilevitv2_150": (0.0035, 0.029),
    "mobilevitv2_175": (0.0026, 0.039),
    "mobilevitv2_200": (0.0020, 0.050),
}
"""Peak learning rate and weight decay on ImageNet-1k; the smaller the model, the less it is held back."""

_CROP = ClassificationSettings(min_crop_area=0.08)
_STRONG = replace(_CROP, randaugment=9, mixup=0.2, cutmix=1.0, random_erasing=0.25)
_ADAMW = OptimizerSettings(decay_norm_and_bias=False, clip_grad_norm=10.0, head_lr_factor=1.0)
_SGD = replace(_ADAMW, optimizer="sgd", warmup_fraction=0.0)


def _imagenet_v2(model: str) -> TrainConfig:
    peak, decay = _V2_PEAK_AND_DECAY[model]
    # 20,000 updates of warm-up from 1e-6; an epoch has 1,252 updates.
    optimizer = replace(
        _ADAMW,
        warmup_fraction=20_000 / (300 * 1252),
        initial_lr_fraction=1e-6 / peak,
        final_lr_fraction=0.1,
        weight_decay=decay,
    )
    return TrainConfig(
        data="",
        task="classification",
        epochs=300,
        batch_size=128,
        learning_rate=peak,
        classification=_STRONG,
        optimizer=optimizer,
    )


def _imagenet21k_v2(model: str) -> TrainConfig:
    optimizer = replace(
        _ADAMW,
        grad_accum_steps=4,
        warmup_fraction=0.0,
        final_lr_fraction=1e-6 / 3e-4,
        weight_decay=_V2_PEAK_AND_DECAY[model][1],
    )
    return replace(_imagenet_v2(model), weights="pretrained", epochs=80, learning_rate=3e-4, optimizer=optimizer)


_IMAGENET_V2 = replace(
    _IMAGENET,
    about="MobileViTv2's paper on ImageNet-1k, from scratch, at 256 pixels.",
    hardware="8 GPUs, 128 images on each; on one, --grad-accum-steps 8",
    result="% top-1 (ml-cvnets)",
)
_IMAGENET21K_V2 = replace(
    _IMAGENET_V2,
    about="MobileViTv2's paper on ImageNet-21k-P, from ImageNet-1k weights.",
    folder="imagenet21k",
    hardware="8 GPUs, 128 images on each, four times for an update",
    result="% top-1 on ImageNet-1k after imagenet21k_to_1k (ml-cvnets)",
)
_IMAGENET21K_TO_1K = replace(
    _IMAGENET_V2,
    about="MobileViTv2's paper on ImageNet-1k, from the weights of imagenet21k, at 256 pixels.",
    num_processes=4,
    hardware="4 GPUs, 64 images on each",
    settings=TrainConfig(
        data="",
        task="classification",
        weights="runs/imagenet21k/best.safetensors",
        epochs=50,
        batch_size=64,
        learning_rate=1e-2,
        classification=_STRONG,
        optimizer=replace(_SGD, final_lr_fraction=0.1, weight_decay=4e-5),
    ),
)
_IMAGENET_384 = replace(
    _IMAGENET21K_TO_1K,
    about="MobileViTv2's paper on ImageNet-1k at 384 pixels, from the weights for 256.",
    hardware="4 GPUs, 32 images on each",
    settings=replace(
        _IMAGENET21K_TO_1K.settings,
        weights="pretrained",
        image_size=384,
        crop_fraction=1.0,
        epochs=10,
        batch_size=32,
        learning_rate=1e-3,
        classification=_CROP,
        optimizer=replace(_SGD, final_lr_fraction=1.0, weight_decay=4e-5, ema_momentum=5e-5),
    ),
)
_IMAGENET21K_384 = replace(
    _IMAGENET_384, about="MobileViTv2's paper on ImageNet-1k at 384 pixels, from weights of ImageNet-21k for 256."
)
_COCO_V2 = replace(
    _COCO,
    about="MobileViTv2's paper on COCO: SSDLite at 320 pixels, from ImageNet weights.",
    result="AP (ml-cvnets)",
    settings=replace(
        _COCO.settings,
        optimizer=OptimizerSettings(
            warmup_fraction=500 / (200 * 917), final_lr_fraction=1e-6 / 9e-4, weight_decay=0.05
        ),
    ),
)
_VOC_V2 = replace(
    _VOC,
    about="MobileViTv2's paper on VOC and SBD: DeepLabv3 at 512 pixels, from ImageNet weights.",
    result="mean IoU with COCO's images added (ml-cvnets); less without",
    settings=replace(
        _VOC.settings,
        learning_rate=5e-4,
        segmentation=SegmentationSettings(short_side_range=(256, 768), max_long_side=1024, blur=0.5, aux_head=True),
        optimizer=replace(_ADAMW, warmup_fraction=500 / (50 * 83), final_lr_fraction=1e-6 / 5e-4, weight_decay=0.05),
    ),
)
_ADE20K_V2 = replace(
    _VOC_V2,
    about="MobileViTv2's paper on ADE20k: DeepLabv3 at 512 pixels, from ImageNet weights.",
    folder="ade20k",
    hardware="4 GPUs, 4 images on each; on one, --batch-size 16",
    result="mean IoU (ml-cvnets)",
    settings=replace(
        _VOC_V2.settings,
        epochs=120,
        batch_size=4,
        learning_rate=2e-2,
        segmentation=replace(_VOC_V2.settings.segmentation, output_stride=8),
        optimizer=replace(_SGD, final_lr_fraction=0.01, weight_decay=1e-4),
    ),
)


def _by_width(*figures: float) -> dict[str, float]:
    """Published figures of the widths, up to the largest."""
    return dict(zip([*_V2_PEAK_AND_DECAY][-len(figures) :], figures, strict=True))


_VOC_FIGURES = {"mobilevitv2_050": 75.07, "mobilevitv2_100": 78.94, "mobilevitv2_125": 79.68, "mobilevitv2_150": 80.30}

RECIPES: dict[str, Recipe] = {
    **_for_models("imagenet", _IMAGENET, {"mobilevit_xxs": 69.0, "mobilevit_xs": 74.8, "mobilevit_s": 78.4}),
    **_for_models("coco", _COCO, {"mobilevit_xxs": 19.9, "mobilevit_xs": 24.8, "mobilevit_s": 27.7}),
    **_for_models("voc", _VOC, {"mobilevit_xxs": 73.6, "mobilevit_xs": 77.1, "mobilevit_s": 79.1}),
    **_for_models("imagenet", _IMAGENET_V2, _by_width(70.18, 75.56, 78.09, 79.65, 80.38, 80.84, 81.17), _imagenet_v2),
    **_for_models("imagenet_384", _IMAGENET_384, _by_width(72.14, 76.98, 79.68, 80.94, 81.50, 82.04, 82.17)),
    **_for_models("imagenet21k", _IMAGENET21K_V2, _by_width(81.46, 81.94, 82.36), _imagenet21k_v2),
    **_for_models("imagenet21k_to_1k", _IMAGENET21K_TO_1K, _by_width(81.46, 81.94, 82.36)),
    **_for_models(
        "imagenet21k_to_1k_384",
        _IMAGENET21K_384,
        _by_width(82.60, 82.93, 83.41),
        lambda model: replace(_IMAGENET_384.settings, weights=f"{model}.cvnets_in22k_ft_in1k", classification=_STRONG),
    ),
    **_for_models("coco", _COCO_V2, _by_width(21.24, 24.57, 26.47, 27.85, 28.83, 29.52, 30.21)),
    **_for_models("voc", _VOC_V2, _VOC_FIGURES),
    **_for_models("ade20k", _ADE20K_V2, _by_width(31.93, 34.70, 37.06, 38.42, 38.91, 39.53, 40.94)),
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
        result, model = recipe.result, recipe.settings.model
        if recipe.figures:
            if model != next(iter(recipe.figures)):  # described with the first
                continue
            name = name.replace(model, "MODEL")
            result = f"{', '.join(f'{one} {figure}' for one, figure in recipe.figures.items())} {recipe.result}"
        launcher = "mobilevit"
        if recipe.num_processes > 1:
            launcher = f"torchrun --standalone --nproc-per-node {recipe.num_processes} -m mobilevit"
        lines += [
            f"{name}: {recipe.about}",
            f"    command   {launcher} train --data {recipe.folder}/ --recipe {name} --out runs/{recipe.folder}",
            f"    hardware  {recipe.hardware}",
            f"    time      {recipe.time}",
            f"    result    {result}",
            "",
        ]
    return "\n".join(lines[:-1])
