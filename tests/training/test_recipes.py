import math
import re
from pathlib import Path

import pytest

from mobilevit.cli import main
from mobilevit.tasks.settings import ClassificationSettings, SegmentationSettings
from mobilevit.training.config import OptimizerSettings, TrainConfig
from mobilevit.training.learner import learning_rate
from mobilevit.training.recipes import RECIPES, describe_recipes, find_recipe
from mobilevit.weights.pretrained import list_pretrained


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings_that_hold(name: str) -> None:
    config = find_recipe(name).settings
    config.validate()
    assert config.task != "auto"
    config.resolve(config.task).validate()


def test_published_recipes() -> None:
    coco = find_recipe("coco_mobilevit_s").settings.resolve("detection", 4)
    assert (coco.peak_learning_rate, coco.epochs, 4 * coco.batch_size, coco.input_size) == (9e-4, 200, 128, (320, 320))
    voc = find_recipe("voc_mobilevit_s").settings.resolve("segmentation", 4)
    assert (voc.peak_learning_rate, voc.epochs, voc.input_size) == (9e-4, 50, (512, 512))
    assert voc.optimizer.head_lr_factor == 10
    assert coco.hardware.sync_batch_norm
    assert voc.hardware.sync_batch_norm
    imagenet = find_recipe("imagenet_mobilevit_s").settings
    assert (imagenet.model, imagenet.batch_size * 8, imagenet.optimizer.grad_accum_steps) == ("mobilevit_s", 1024, 1)
    sizes = imagenet.resolve("classification", 8).step_sizes()
    assert [size.batch_size for size in sizes] == [327, 227, 128, 101, 81]
    images_a_step = 8 * sum(size.batch_size for size in sizes) / len(sizes)
    updates = 300 * 1_281_167 / images_a_step
    assert imagenet.optimizer.warmup_fraction * updates == pytest.approx(3000, rel=0.01)
    assert (imagenet.epochs, imagenet.optimizer.weight_decay, imagenet.optimizer.ema_momentum) == (300, 0.01, 5e-4)


V2_WIDTHS = {
    "050": (0.0090, 0.004), "075": (0.0090, 0.008), "100": (0.0075, 0.013), "125": (0.0049, 0.020),
    "150": (0.0035, 0.029), "175": (0.0026, 0.039), "200": (0.0020, 0.050),
}  # fmt: skip


@pytest.mark.parametrize("width", V2_WIDTHS)
def test_imagenet_recipes_of_mobilevitv2(width: str) -> None:
    recipe = find_recipe(f"imagenet_mobilevitv2_{width}")
    config, (peak, decay) = recipe.settings.resolve("classification", recipe.num_processes), V2_WIDTHS[width]
    assert (config.model, config.peak_learning_rate) == (f"mobilevitv2_{width}", peak)
    assert (config.epochs, config.batch_size * recipe.num_processes, config.input_size) == (300, 1024, (256, 256))
    assert config.step_sizes() == ()
    assert config.optimizer == OptimizerSettings(
        optimizer="adamw", weight_decay=decay, decay_norm_and_bias=False, clip_grad_norm=10, ema_momentum=5e-4,
        warmup_fraction=config.optimizer.warmup_fraction, initial_lr_fraction=config.optimizer.initial_lr_fraction,
        final_lr_fraction=0.1, head_lr_factor=1,
    )  # fmt: skip
    updates = 300 * math.ceil(1_281_167 / 1024)
    assert config.optimizer.warmup_fraction * updates == pytest.approx(20_000)
    assert learning_rate(0.0, config, config.optimizer.warmup_fraction) == pytest.approx(1e-6)
    assert config.classification == ClassificationSettings(
        min_crop_area=0.08, randaugment=9, random_erasing=0.25, mixup=0.2, cutmix=1.0, label_smoothing=0.1
    )


@pytest.mark.parametrize(
    ("name", "weights", "epochs", "batch", "rule", "peak", "last", "decay", "ema", "size"),
    [
        ("imagenet21k", "pretrained", 80, 4096, "adamw", 3e-4, 1e-6, 0.029, 5e-4, 256),
        ("imagenet21k_to_1k", "runs/imagenet21k/best.safetensors", 50, 256, "sgd", 1e-2, 1e-3, 4e-5, 5e-4, 256),
        ("imagenet21k_to_1k_384", "mobilevitv2_150.cvnets_in22k_ft_in1k", 10, 128, "sgd", 1e-3, 1e-3, 4e-5, 5e-5, 384),
        ("imagenet_384", "pretrained", 10, 128, "sgd", 1e-3, 1e-3, 4e-5, 5e-5, 384),
        ("coco", "pretrained", 200, 128, "adamw", 9e-4, 1e-6, 0.05, 5e-4, 320),
        ("voc", "pretrained", 50, 128, "adamw", 5e-4, 1e-6, 0.05, 5e-4, 512),
        ("ade20k", "pretrained", 120, 16, "sgd", 2e-2, 2e-4, 1e-4, 5e-4, 512),
    ],
)
def test_recipes_of_mobilevitv2_from_weights(
    name: str, weights: str, epochs: int, batch: int, rule: str, peak: float, last: float, decay: float, ema: float,
    size: int,
) -> None:  # fmt: skip
    recipe = find_recipe(f"{name}_mobilevitv2_150")
    config = recipe.settings.resolve(recipe.settings.task, recipe.num_processes)  # type: ignore[arg-type]
    optimizer = config.optimizer
    assert (config.weights, config.epochs, config.input_size) == (weights, epochs, (size, size))
    assert recipe.num_processes * config.batch_size * optimizer.grad_accum_steps == batch
    assert (optimizer.optimizer, optimizer.weight_decay, optimizer.ema_momentum) == (rule, decay, ema)
    assert (optimizer.head_lr_factor, optimizer.decay_norm_and_bias) == (1, name == "coco")
    warms_up = {"coco": 500 / (200 * 117_266 / 128), "voc": 500 / (50 * 10_582 / 128)}
    assert optimizer.warmup_fraction == pytest.approx(warms_up.get(name, 0), rel=0.01)
    rates = [learning_rate(step / 1000, config, optimizer.warmup_fraction) for step in range(1001)]
    assert rates[0] == pytest.approx(peak / 10 if name in warms_up else peak)
    assert max(rates) == pytest.approx(peak, rel=1e-4)
    assert rates[-1] == pytest.approx(last)
    assert (config.crop_fraction == 1) == (size == 384)
    if config.task == "classification":
        assert config.classification.randaugment == (0 if name == "imagenet_384" else 9)
    if config.task == "segmentation":
        assert config.segmentation == SegmentationSettings(
            short_side_range=(256, 768), max_long_side=1024, blur=0.5, rotation=10, aux_head=True,
            output_stride=8 if name == "ade20k" else None,
        )  # fmt: skip
    assert config.hardware.sync_batch_norm == (config.task != "classification")


def test_weights_of_recipes_are_public() -> None:
    """All but those that another recipe makes."""
    for recipe in RECIPES.values():
        weights, model = recipe.settings.weights, recipe.settings.model
        if weights is not None and not weights.startswith("runs/"):
            assert (f"{model}.cvnets_in1k" if weights == "pretrained" else weights) in list_pretrained()


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "small_detecton", "--data", "x"]) == 2
    assert "did you mean small_detection?" in capsys.readouterr().err


def test_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "list"]) == 0
    listed = []
    for text in capsys.readouterr().out.split("\n\n"):
        name, result = text.partition(":")[0], text.partition("    result ")[2]
        assert re.search(rf"\n    command .* train --data (\w+)/ --recipe {name} --out runs/\1\n", text)
        models = re.findall(r"(mobilevit\w+) \d", result) if "MODEL" in name else [""]
        listed += [name.replace("MODEL", model) for model in models]
    assert listed == list(RECIPES)


@pytest.mark.parametrize("model", ["mobilevit_xxs", "mobilevitv2_050"])
def test_flags_change_a_recipe(shapes: Path, tmp_path: Path, model: str) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(shapes), "--out", str(out), "--image-size", "32", "--epochs", "1", "--batch-size", "20"]
    recipe = f"imagenet_{model}"
    assert main(["train", "--recipe", recipe, *arguments]) == 0
    config = TrainConfig.from_json(out / "config.json")
    assert (config.epochs, config.batch_size, config.model) == (1, 20, model)
    assert config.learning_rate == find_recipe(recipe).settings.learning_rate


def test_recipe_and_config_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(TrainConfig(data=Path("x")).to_json())
    assert main(["train", "--config", str(tmp_path / "config.json"), "--recipe", "imagenet_mobilevit_xxs"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_the_docs_show_all() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert describe_recipes() in page.read_text(encoding="utf-8")
