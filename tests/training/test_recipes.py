import re
from pathlib import Path

import pytest

from mobilevit.cli import main
from mobilevit.training.config import TrainConfig
from mobilevit.training.recipes import RECIPES, describe_recipes, find_recipe


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


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "small_detecton", "--data", "x"]) == 2
    assert "did you mean small_detection?" in capsys.readouterr().err


def test_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line and not line.startswith(" ")] == list(RECIPES)
    commands = [line.split(None, 1)[1] for line in lines if line.startswith("    command")]
    assert [re.search(r"--recipe (\S+)", command)[1] for command in commands] == list(RECIPES)


def test_flags_change_a_recipe(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(shapes), "--out", str(out), "--image-size", "32", "--epochs", "1", "--batch-size", "20"]
    assert main(["train", "--recipe", "imagenet_mobilevit_xxs", *arguments]) == 0
    config = TrainConfig.from_json(out / "config.json")
    assert (config.epochs, config.batch_size, config.learning_rate) == (1, 20, 2e-3)


def test_recipe_and_config_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(TrainConfig(data=Path("x")).to_json())
    assert main(["train", "--config", str(tmp_path / "config.json"), "--recipe", "imagenet_mobilevit_xxs"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_the_docs_show_all() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert describe_recipes() in page.read_text(encoding="utf-8")
