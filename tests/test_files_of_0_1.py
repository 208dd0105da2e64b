"""Files that version 0.1 wrote are still read, and give the answers that version 0.1 gave.

`files_of_0_1/write.py` says what they are and how they came to be.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mobilevit
from mobilevit.card import ModelCard, card_of
from mobilevit.data.datasets import find_splits
from mobilevit.imaging.decode import read_image
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import this_machine, versions
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.runtime.artifact import read_sidecar
from mobilevit.runtime.tuned import RUNTIME_PACKAGES, find_tuned

HERE = Path(__file__).parent / "files_of_0_1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((HERE / "expected.json").read_text())
ENGINES = {".onnx": "onnxruntime", ".xml": "openvino", ".pte": "executorch", ".pt2": "torch"}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of the files; a test that changes one copies it."""
    folder = tmp_path_factory.mktemp("files_of_0_1")
    for archive in sorted(HERE.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def image_in(old: Path) -> Path:
    return old / "images" / "image.png"


def assert_same_answer(model: Any, image: Path, expected: dict[str, Any], **options: Any) -> None:
    result = mobilevit.Predictor(model, device="cpu", **options)(image)
    if "probabilities" in expected:
        names = dict(result.top(3))
        found = [names[label] for label in ("cat", "dog", "猫") if label in names]
        found = found or [names["dark"], names["light"]]
        assert found == pytest.approx(expected["probabilities"], abs=1e-5)
    elif "boxes_xyxy" in expected:
        kept = result.above(None)
        assert len(kept.labels) == expected["count"]
        assert list(kept.labels[:20]) == expected["labels"]
        np.testing.assert_allclose(kept.scores[:20], expected["scores"], atol=1e-5)
        np.testing.assert_allclose(kept.boxes_xyxy[:20], expected["boxes_xyxy"], atol=0.01)
    else:
        assert result.label_map[::8, ::8].tolist() == expected["label_map"]
        assert result.shares == pytest.approx(expected["shares"], abs=2e-3)


CARDS = {
    "classifier": ModelCard(
        name="mobilevit_xxs",
        task="classification",
        classes=("cat", "dog", "猫"),
        preprocessing=Preprocessing(size=(64, 128), crop_fraction=0.9, mean=(0.5, 0.4, 0.3), std=(0.25, 0.25, 0.25)),
        metrics={"top1": 0.75},
    ),
    "detector": ModelCard(
        name="mobilevit_xxs",
        task="detection",
        classes=("car", "person"),
        preprocessing=Preprocessing(size=(128, 128), resize_mode="stretch", interpolation="bilinear"),
        metrics={"ap": 0.25},
        score_threshold=0.37,
    ),
    "segmenter": ModelCard(
        name="mobilevit_xxs",
        task="segmentation",
        classes=("background", "road", "sky"),
        preprocessing=Preprocessing(size=(64, 64), resize_mode="pad", interpolation="bilinear"),
        metrics={"miou": 0.5},
    ),
}


def assert_card(card: ModelCard, name: str) -> None:
    assert dataclasses.replace(card, provenance={}) == CARDS[name]
    assert card.provenance["trained_on"] == "nothing"
    assert card.provenance["license"] == "Apache-2.0"  # "licence" in the file
    assert "licence" not in card.provenance


@pytest.mark.parametrize("name", CARDS)
def test_checkpoints(name: str, old: Path, tmp_path: Path) -> None:
    file = f"checkpoints/{name}.safetensors"
    model = mobilevit.load(old / file)
    assert_card(card_of(model), name)
    assert_same_answer(old / file, image_in(old), EXPECTED[file])
    if name == "classifier":
        assert model.config.patch_size == (8, 4, 2)
    if name == "segmenter":
        head = DeepLabv3Config(aspp_channels=64, atrous_rates=(2, 4, 6), aux_head=True, aux_channels=128)
        assert model.head_config == head

    again = mobilevit.save(model, tmp_path / "again.safetensors")
    assert_card(card_of(mobilevit.load(again)), name)
    before, after = load_file(old / file), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    finer = mobilevit.create_model("mobilevit_xxs", task=CARDS[name].task, classes=["car", "dog"], weights=old / file)
    assert card_of(finer).classes == ("car", "dog")
    assert card_of(finer).provenance["license"] == "Apache-2.0"


@pytest.mark.parametrize("file", [name for name in EXPECTED if name.startswith("artifacts/")])
def test_artifacts(file: str, old: Path) -> None:
    pytest.importorskip(ENGINES[Path(file).suffix])
    assert_card(read_sidecar(old / file).card, Path(file).stem.replace("baked", "classifier").partition("-")[0])
    if file.endswith(".pt2"):
        with pytest.raises(mobilevit.MobileViTError, match="can run code that came with it"):
            mobilevit.Predictor(old / file)
    assert_same_answer(old / file, image_in(old), EXPECTED[file], trust_pt2=file.endswith(".pt2"))


def test_a_tuned_result(old: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = old / "tuned" / "classifier.safetensors"
    result = checkpoint.with_name("classifier.tuned.json")
    values = json.loads(result.read_text())
    assert values["artefact"] == "classifier.tuned/classifier.onnx"
    # As if this machine had written it: a result of another one is not used.
    here = {"machine": dataclasses.asdict(this_machine()), "packages": versions(RUNTIME_PACKAGES["onnx"])}
    result.write_text(json.dumps(values | here))
    artifact = checkpoint.with_name("classifier.tuned") / "classifier.onnx"
    assert find_tuned(checkpoint) == (artifact, 1)
    predictor = mobilevit.Predictor(checkpoint, engine="auto")
    assert predictor.engine == "onnx fp32"
    assert_same_answer(checkpoint, image_in(old), EXPECTED["checkpoints/classifier.safetensors"], engine="auto")


def test_a_run_folder_goes_on(old: Path) -> None:
    run = old / "run"
    best = run / "best.safetensors"
    assert card_of(mobilevit.load(best)).classes == ("dark", "light")
    assert_same_answer(best, image_in(old), EXPECTED["run/best.safetensors"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0]

    config = mobilevit.TrainConfig.from_json(run / "config.json")
    config = dataclasses.replace(config, data=old / "images" / "classes", out=run)
    result = mobilevit.train(config, resume=True)
    assert result.epochs == 3
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert after[0] == rows[0]
    assert [row["epoch"] for row in after] == [0, 1, 2]
    position = torch.load(run / "last.pt", weights_only=True)["position"]
    assert (position["epoch"], position["step"]) == (3, 0)


def test_shards(old: Path) -> None:
    splits = find_splits(old / "shards")
    seen = []
    for part, count in (("train", 12), ("val", 4)):
        data = splits[part]
        assert (data.task.name, data.classes, len(data)) == ("classification", ("dark", "light"), count)
        for index, target in enumerate(data.targets):
            image = read_image(data.open(index))
            red, green, blue = image.getpixel((0, 0))
            assert (image.size, blue) == ((40, 32), 7)
            assert green == 200 * target + red
            seen.append((target, red))
    assert sorted(seen) == [(label, number) for label in (0, 1) for number in range(8)]
    # As version 0.1 computed it, and wrote it into checkpoints.
    assert splits["train"].fingerprint() == "336899f91abc9275"
