from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError
from mobilevit.training.config import HardwareSettings, OptimizerSettings, SizeSettings, TrainConfig
from training_settings import with_settings


def test_json_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(
        data=Path("a"),
        patch_size=(8, 4, 2),
        learning_rate=1e-3,
        early_stopping=3,
        hardware=HardwareSettings(amp="bf16"),
        sizes=SizeSettings(multi_scale="paper", train_sizes=((32, 64), (64, 64))),
    )
    (tmp_path / "config.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the configuration"),
        ('{"data": "a", "epochs": "many"}', "epochs is 'many'"),
        ('{"data": "a", "epochs": true}', "epochs is True"),
        ('{"data": "a", "amp": "fp8"}', "amp is 'fp8'"),
        ('{"data": "a", "patch_size": [2, 2]}', "patch_size is"),
        ('{"data": "a", "color": 1}', "unknown setting color"),
        ('{"data": "a", "train_sizes": [[32, "64"]]}', "train_sizes is"),
        ('{"data": "a", "optimizer": {"ema": 1}}', "ema is 1"),
        ('{"data": "a", "optimizer": {"color": 1}}', "unknown setting color"),
        ('{"data": "a", "optimizer": 3}', "optimizer is 3; it is a group of settings"),
        ('{"data": "a", "decode": "device"}', "decode is device, which only version 0.1 had; remove it"),
        ("{}", "names no data"),
        ("[]", "names no data"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_json(tmp_path / "config.json")


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such configuration"):
        TrainConfig.from_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", -1e-3), ("learning_rate", 0.0), ("epochs", 0), ("batch_size", 1), ("image_size", 31),
        ("val_fraction", 1.0), ("label_smoothing", 1.5), ("min_crop_area", 0.0), ("crop_fraction", 1.1),
        ("grad_accum_steps", 0), ("weight_decay", -0.1), ("randaugment", 31), ("num_workers", -1),
        ("early_stopping", 0), ("clip_grad_norm", 0.0), ("patch_size", (0, 1, 1)), ("warmup_steps", -1),
        ("initial_lr_fraction", 1.1), ("scale_range", (1.0, 0.5)), ("short_side_range", (768, 256)),
        ("short_side_range", (0, 256)), ("max_long_side", 1024), ("blur", 1.5),
    ],
)  # fmt: skip
def test_impossible_settings_name_the_flag(setting: str, value: object) -> None:
    config = with_settings(TrainConfig(data=Path("a")), **{setting: value})
    with pytest.raises(MobileViTError, match=f"^`{setting}` is "):
        config.validate()


def test_the_default_learning_rate_is_not_for_sgd() -> None:
    config = with_settings(TrainConfig(data=Path("a")), optimizer="sgd")
    with pytest.raises(MobileViTError, match=r"^`learning_rate` is None; it must be given for `optimizer` sgd"):
        config.validate()
    dataclasses.replace(config, learning_rate=0.1).validate()


def test_the_smallest_image_size_works() -> None:
    TrainConfig(data=Path("a"), image_size=32).validate()


def test_the_published_learning_rate_belongs_to_the_published_batch() -> None:
    assert TrainConfig(data=Path("a"), batch_size=1024).peak_learning_rate == pytest.approx(2e-3)
    accumulated = with_settings(TrainConfig(data=Path("a")), batch_size=64, grad_accum_steps=4)
    assert accumulated.peak_learning_rate == pytest.approx(1e-3)
    assert TrainConfig(data=Path("a"), learning_rate=0.5).peak_learning_rate == 0.5


def test_every_setting_has_one_default_and_json_type() -> None:
    values = json.loads(TrainConfig(data=Path("a")).to_json())
    assert set(values) == {f.name for f in dataclasses.fields(TrainConfig)}
    names = [name for value in values.values() if isinstance(value, dict) for name in value]
    names += [name for name, value in values.items() if not isinstance(value, dict)]
    assert len(set(names)) == len(names), "flags need not say which group they belong to"
    assert set(TrainConfig(data=Path("a")).flat()) == set(names)


def test_places_may_be_strings() -> None:
    config = TrainConfig(data="flowers/", out="runs/flowers", epochs=20)
    assert (config.data, config.out) == (Path("flowers"), Path("runs/flowers"))


def test_changes_are_what_differs_from_the_defaults() -> None:
    config = TrainConfig(data=Path("a"), epochs=3, optimizer=OptimizerSettings(ema=False, weight_decay=0.01))
    assert config.changes() == {"data": Path("a"), "epochs": 3, "ema": False}


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_configurations_of_version_0_1(tmp_path: Path, task: TaskName) -> None:
    written = json.loads((Path(__file__).parent / f"v01_{task}.json").read_text())
    config = TrainConfig.from_json(Path(__file__).parent / f"v01_{task}.json")
    flat = json.loads(json.dumps(config.flat(), default=str))
    assert {name: flat.get(name, "cpu" if name == "decode" else None) for name in written} == written
    assert not config.changes().keys() - written.keys(), "what came later has its default"
    assert config.resolve(task) == config
    (tmp_path / "config.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("detection", {"mixup": 0.2}, "`mixup` is for classification; this is detection, so leave it out"),
        ("detection", {"multi_scale": "paper"}, "`multi_scale` is for classification; this is detection"),
        ("segmentation", {"teacher": "x"}, "`teacher` is for classification; this is segmentation"),
        ("classification", {"zoom_out": 0.0}, "`zoom_out` is for detection; this is classification"),
        ("segmentation", {"iou_crop": False}, "`iou_crop` is for detection; this is segmentation"),
        ("detection", {"output_stride": 16}, "`output_stride` is for segmentation; this is detection"),
        ("classification", {"photometric_distortion": False}, "is for detection and segmentation"),
    ],
)
def test_settings_of_another_task(task: TaskName, settings: dict[str, object], said: str) -> None:
    with pytest.raises(MobileViTError, match=said):
        with_settings(TrainConfig(data=Path("data")), **settings).resolve(task)


@pytest.mark.parametrize(
    ("task", "size", "mode"),
    [("classification", 256, "crop"), ("detection", 320, "stretch"), ("segmentation", 512, "pad")],
)
def test_what_depends_on_the_task(task: TaskName, size: int, mode: str) -> None:
    config = TrainConfig(data=Path("data"))
    resolved = config.resolve(task)
    assert (resolved.task, resolved.image_size, resolved.resize_mode) == (task, (size, size), mode)
    assert resolved.resolve(task) == resolved
    assert TrainConfig(data=Path("data"), image_size=(128, 160)).resolve(task).input_size == (128, 160)
    assert resolved.optimizer.head_lr_factor == 1
    trained = TrainConfig(data=Path("data"), weights="pretrained").resolve("segmentation")
    assert trained.optimizer.head_lr_factor == 10


def test_sizes_in_json(tmp_path: Path) -> None:
    for size in (96, (96, 128), None):
        config = with_settings(TrainConfig(data=Path("data")), image_size=size, crop_size=size)
        (tmp_path / "config.json").write_text(config.to_json())
        assert TrainConfig.from_json(tmp_path / "config.json") == config
