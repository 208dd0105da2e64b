from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.card import card_of
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.ssdlite import SSDLiteConfig


def make(name: str = "mobilevit_xxs", **options: Any) -> Any:
    return fill_with_golden_weights(mobilevit.create_model(name, **options))


def test_a_checkpoint_needs_nothing_remembered(tmp_path: Path) -> None:
    model = make(num_classes=3, patch_size=(8, 4, 2), output_stride=16)
    preprocessing = mobilevit.Preprocessing(size=(96, 128), crop_fraction=0.9, mean=(0.5, 0.4, 0.3))
    path = tmp_path / "m.safetensors"
    mobilevit.save(
        model, path, classes=["猫", "dog", "a,b"], preprocessing=preprocessing, metrics={"top1": 0.5},
        provenance={"data": "pets"},
    )  # fmt: skip
    loaded = mobilevit.load(path)
    assert loaded.config == model.config
    card = card_of(loaded)
    assert card.name == "mobilevit_xxs"
    assert card.classes == ("猫", "dog", "a,b")
    assert card.preprocessing == preprocessing
    assert card.metrics == {"top1": 0.5}
    assert card.provenance["data"] == "pets"
    assert card.provenance["mobilevit"] == mobilevit.__version__
    x = torch.rand(1, 3, 96, 128)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_saving_a_loaded_model_again_changes_no_weight(name: str, tmp_path: Path) -> None:
    model = make(name, num_classes=4)
    first = mobilevit.save(model, tmp_path / "a.safetensors")
    loaded = mobilevit.load(first)
    assert (type(loaded), loaded.config) == (type(model), model.config)
    second = mobilevit.save(loaded, tmp_path / "b.safetensors")
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_wrong_uses_are_refused(tmp_path: Path) -> None:
    model = make(num_classes=3)
    with pytest.raises(ValueError, match=r"name it m\.safetensors"):
        mobilevit.save(model, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="2 class names for a model of 3"):
        mobilevit.save(model, tmp_path / "m.safetensors", classes=["a", "b"])
    with pytest.raises(ValueError, match="describe themselves"):
        mobilevit.save(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="has no card"):
        card_of(torch.nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint"):
        mobilevit.load(tmp_path / "none.safetensors")
    whole = mobilevit.save(make(num_classes=3), tmp_path / "m.safetensors").read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\x01" * 100}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.safetensors: damaged") as raised:
            mobilevit.load(path)
        assert "\n" not in str(raised.value)
    torch.save(make(num_classes=3).state_dict(), tmp_path / "m.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes((tmp_path / "m.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pt: damaged"):
        mobilevit.load(cut)


class Explodes:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("__import__('pathlib').Path('/tmp/mobilevit-test-was-here').touch()",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = Path("/tmp/mobilevit-test-was-here")
    victim.unlink(missing_ok=True)
    torch.save({"state_dict": Explodes()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Explodes()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match=r"may run code when opened, so it is refused|damaged"):
            mobilevit.load(tmp_path / name)
    assert not victim.exists()


def test_not_a_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        mobilevit.load(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "newer"),
        ({"task": "pose"}, "newer"),
        ({"task": "detection"}, r"header and weights do not fit \(backbone\.stem\.conv\.weight is missing\)"),
        ({"classes": ["a", "b"]}, r"do not fit \(classifier\.weight is \(3, 320\), not \(2, 320\)\)"),
    ],
)
def test_headers_that_do_not_fit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = mobilevit.save(make(num_classes=3), tmp_path / "m.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mobilevit"])
    save_file(load_file(path), path, {"mobilevit": json.dumps(header | change)})
    with pytest.raises(ValueError, match=message):
        mobilevit.load(path)


def test_card_fields_survive_replacing() -> None:
    card = card_of(make(num_classes=2))
    assert dataclasses.replace(card, metrics={"top1": 1.0}).classes == ("class_0", "class_1")


def test_headers_of_the_first_version_are_read(tmp_path: Path) -> None:
    path = mobilevit.save(make(num_classes=3), tmp_path / "m.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mobilevit"])
    assert header.pop("head") is None
    assert header.pop("score_threshold") is None
    save_file(load_file(path), path, {"mobilevit": json.dumps(header)})
    card = card_of(mobilevit.load(path))
    assert (card.task, card.score_threshold, len(card.classes)) == ("classification", None, 3)


HEADS = {
    "detection": SSDLiteConfig(min_scale=0.05, pool_channels=32),
    "segmentation": DeepLabv3Config(aspp_channels=64, atrous_rates=(2, 4), aux_head=True, aux_channels=32),
}


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
@pytest.mark.parametrize("task", HEADS)
def test_every_task_and_head_survives(task: str, name: str, tmp_path: Path) -> None:
    model = make(name, task=task, classes=["cat", "dog", "bird"], head=HEADS[task])
    path = mobilevit.save(model, tmp_path / "m.safetensors", score_threshold=0.37, metrics={"map": 0.2})
    loaded = mobilevit.load(path)
    assert type(loaded) is type(model)
    assert loaded.head_config == HEADS[task]
    assert loaded.config == model.config
    card = card_of(loaded)
    assert (card.task, card.classes, card.metrics) == (task, ("cat", "dog", "bird"), {"map": 0.2})
    assert card.score_threshold == 0.37
    assert card.preprocessing == card_of(model).preprocessing
    x = torch.rand(1, 3, 96, 128)
    assert torch.equal(loaded(x)[0], model(x)[0])
    again = mobilevit.save(loaded, tmp_path / "again.safetensors")
    assert card_of(mobilevit.load(again)).score_threshold == 0.37


def test_a_detectors_classes_are_without_the_background(tmp_path: Path) -> None:
    model = make(task="detection", num_classes=3)
    with pytest.raises(ValueError, match="4 class names for a model of 3"):
        mobilevit.save(model, tmp_path / "m.safetensors", classes=["background", "a", "b", "c"])
