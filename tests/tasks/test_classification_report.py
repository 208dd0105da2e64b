import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.imaging.drawing import GREEN, RED
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.classification_report import ClassificationMeter, classification_report

torchmetrics = pytest.importorskip("torchmetrics.functional.classification")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_report_by_hand() -> None:
    probabilities = torch.tensor(
        [
            [0.70, 0.20, 0.10],  # a, right
            [0.60, 0.30, 0.10],  # a, right
            [0.25, 0.65, 0.10],  # a, called b
            [0.05, 0.90, 0.05],  # b, right
            [0.50, 0.45, 0.05],  # b, called a
            [0.96, 0.02, 0.02],  # b, called a
        ]
    )
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    report = classification_report(probabilities.log() + 3, labels, ["a", "b", "c"])
    assert report.num_images == 6
    assert report.top1 == pytest.approx(3 / 6)
    assert report.top5 is None
    assert report.confusion.tolist() == [[2, 1, 0], [2, 1, 0], [0, 0, 0]]
    a, b, c = report.per_class
    assert (a.name, a.precision, a.recall, a.support) == ("a", pytest.approx(2 / 4), pytest.approx(2 / 3), 3)
    assert a.f1 == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert (b.precision, b.recall, b.f1, b.support) == (
        pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(2 / 5), 3,
    )  # fmt: skip
    assert (c.name, c.precision, c.recall, c.f1, c.support) == ("c", 0, 0, 0, 0)
    of_the_truth = [0.70, 0.60, 0.25, 0.90, 0.45, 0.02]
    assert report.loss == pytest.approx(-np.log(of_the_truth).mean(), rel=1e-5)
    # 15 bins: 0.65 lies in bin 9 (0.6 to 0.667) as does 0.60; 0.50, 0.70, 0.90, 0.96 each in its own.
    gaps = [abs((0.60 + 0.65) - 1), 0.50, abs(0.70 - 1), abs(0.90 - 1), 0.96]
    assert report.calibration_error == pytest.approx(sum(gaps) / 6, abs=1e-6)


def test_report_against_numpy_on_random_data() -> None:
    random = np.random.default_rng(1)
    num_classes, count = 8, 600
    logits = random.normal(size=(count, num_classes)).astype(np.float32) * 2
    logits[:, 6] = -50  # never predicted
    labels = random.integers(0, num_classes - 1, count)  # class 7 does not occur
    logits[range(count), labels] += 1.5
    report = classification_report(torch.from_numpy(logits), torch.from_numpy(labels), [f"c{i}" for i in range(8)])

    probabilities = np.exp(log_softmax(logits))
    predicted = logits.argmax(axis=1)
    confusion = np.zeros((8, 8), int)
    np.add.at(confusion, (labels, predicted), 1)
    assert report.confusion.dtype == np.int64
    assert np.array_equal(report.confusion, confusion)
    assert report.confusion.sum() == report.num_images == count
    assert report.top1 == pytest.approx((predicted == labels).mean())
    assert report.top5 == pytest.approx((np.argsort(-logits, axis=1)[:, :5] == labels[:, None]).any(axis=1).mean())
    assert report.loss == pytest.approx(-np.log(probabilities[range(count), labels]).mean(), rel=1e-5)
    for k, scores in enumerate(report.per_class):
        hits = ((predicted == k) & (labels == k)).sum()
        precision = hits / max((predicted == k).sum(), 1)
        recall = hits / max((labels == k).sum(), 1)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert (scores.name, scores.support) == (f"c{k}", (labels == k).sum())
        assert (scores.precision, scores.recall, scores.f1) == pytest.approx((precision, recall, f1))
    confidence = probabilities.max(axis=1)
    bins = np.ceil(confidence * 15).astype(int)
    gap = sum(
        abs((predicted == labels)[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in set(bins)
    )
    assert report.calibration_error == pytest.approx(gap, abs=1e-5)


def test_top5_needs_six_classes() -> None:
    logits = -torch.arange(6.0).repeat(6, 1)  # class 0 first, class 5 last
    report = classification_report(logits, torch.arange(6), list("abcdef"))
    assert report.top5 == pytest.approx(5 / 6)
    assert report.top1 == pytest.approx(1 / 6)
    assert classification_report(logits[:5, :5], torch.arange(5), list("abcde")).top5 is None


@pytest.mark.parametrize("sureness", [0.5, 3, 50])
def test_calibration_error_is_that_of_torchmetrics(sureness: float) -> None:
    logits, labels = torch.randn(500, 7) * sureness, torch.randint(7, (500,))
    report = classification_report(logits, labels, list("abcdefg"))
    theirs = torchmetrics.multiclass_calibration_error(logits.softmax(dim=1), labels, 7, n_bins=15)
    assert report.calibration_error == pytest.approx(float(theirs), abs=1e-6)


def test_a_model_that_answers_nan_is_reported() -> None:
    report = classification_report(torch.full((4, 3), torch.nan), torch.tensor([0, 1, 2, 0]), list("abc"))
    assert math.isnan(report.calibration_error)
    assert report.num_images == 4


def test_a_perfect_model() -> None:
    report = classification_report(torch.eye(4) * 100, torch.arange(4), list("abcd"))
    assert (report.top1, report.calibration_error) == (1.0, pytest.approx(0, abs=1e-6))
    assert report.loss == pytest.approx(0, abs=1e-6)
    assert [(c.precision, c.recall, c.f1, c.support) for c in report.per_class] == [(1.0, 1.0, 1.0, 1)] * 4


def test_report_as_json() -> None:
    report = classification_report(torch.randn(40, 6), torch.randint(6, (40,)), list("abcdef"))
    values = json.loads(json.dumps(report.to_dict()))
    assert values["num_images"] == 40
    assert values["confusion"] == report.confusion.tolist()
    assert {name: values[name] for name in report.summary} == report.summary
    assert list(report.summary) == ["top1", "top5", "loss", "calibration_error"]
    assert report.summary["loss"] == round(report.loss, 6)
    assert values["per_class"][2] == {
        "name": "c",
        "precision": round(report.per_class[2].precision, 6),
        "recall": round(report.per_class[2].recall, 6),
        "f1": round(report.per_class[2].f1, 6),
        "support": report.per_class[2].support,
    }
    without = classification_report(torch.randn(9, 3), torch.randint(3, (9,)), list("abc"))
    assert list(without.summary) == ["top1", "loss", "calibration_error"]
    assert "top5" not in without.to_dict()


# -- meter ------------------------------------------------------------------------------------------------------------


PLACEMENT = Preprocessing().placement((300, 400))


def meter_of(logits: torch.Tensor, labels: list[int], classes: str, indices: list[int]) -> ClassificationMeter:
    meter = ClassificationMeter(classes)
    for index in indices:
        meter.add(index, {"logits": logits[index].numpy()}, labels[index], PLACEMENT)
    return meter


def test_meter_counts_each_image_once() -> None:
    meter = ClassificationMeter(["a", "b"])
    assert meter.indices == []
    for index, logits, label in ((7, [3.0, 0.0], 1), (2, [0.0, 1.0], 0), (2, [5.0, 0.0], 0), (4, [2.0, 1.0], 0)):
        meter.add(index, {"logits": np.array(logits, np.float32)}, label, PLACEMENT)
    assert meter.indices == [2, 4, 7]
    assert meter.report().confusion.tolist() == [[2, 0], [1, 0]]  # of image 2, what came last


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_meter_keeps_its_own_logits(dtype: type[np.generic]) -> None:
    logits = np.array([1.0, 3.0], dtype)
    meter = ClassificationMeter("ab")
    meter.add(0, {"logits": logits}, 1, PLACEMENT)
    logits[:] = (9, 0)
    assert meter.report().top1 == 1
    assert meter.images[0][0].dtype == np.float32


def test_the_report_does_not_depend_on_how_images_are_divided() -> None:
    logits, labels, classes = torch.randn(40, 7), torch.randint(7, (40,)), "abcdefg"
    expected = classification_report(logits, labels, classes).to_dict()
    shuffled = torch.randperm(40).tolist()
    whole = meter_of(logits, labels.tolist(), classes, shuffled)
    assert whole.report().to_dict() == expected
    parts = [shuffled[:15], shuffled[12:30], shuffled[30:], []]  # three images are seen by two
    meters = [meter_of(logits, labels.tolist(), classes, part) for part in parts]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1], [1, 3, 2, 0]):
        first, *others = (pickle.loads(pickle.dumps(meters[part])) for part in order)
        for other in others:
            first.merge(other)
        assert first.indices == list(range(40))
        assert first.report().to_dict() == expected
        assert first.worst(9) == whole.worst(9)


def test_worst_are_the_surest_mistakes() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.01, 0.99], [0.45, 0.55], [0.6, 0.4]])
    labels = [1, 0, 0, 0, 0, 1]  # image 1 is right
    meter = meter_of(probabilities.log(), labels, "ab", [4, 2, 5, 0, 1, 3])
    assert meter.worst() == [3, 0, 2, 5, 4]
    assert meter.worst(2) == [3, 0]
    assert meter_of(probabilities.log(), probabilities.argmax(dim=1).tolist(), "ab", [0, 1, 2]).worst() == []


def test_texts() -> None:
    report = classification_report(torch.eye(6)[[0, 0, 1, 5]] * 3, torch.tensor([0, 1, 1, 5]), ["ant", *"bcdef"])
    assert [name for name, _ in report.headline()] == ["top-1", "top-5", "loss", "calibration error"]
    assert dict(report.headline())["top-1"] == "75.00%"
    assert dict(report.headline())["loss"] == f"{report.loss:.4f}"
    heading, rows = report.table()
    assert heading == ["class", "precision", "recall", "F1", "images"]
    assert rows[0] == ["ant", "0.500", "1.000", "0.667", "1"]
    assert rows[1] == ["b", "1.000", "0.500", "0.667", "2"]
    few = classification_report(torch.eye(2), torch.tensor([0, 1]), ["a", "b"])
    assert [name for name, _ in few.headline()] == ["top-1", "loss", "calibration error"]
    assert (few.score_name, few.score) == ("top1", 1.0)


@pytest.mark.parametrize(("count", "files"), [(60, {".csv", ".png"}), (61, {".csv"})])
def test_save_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, files: set[str]) -> None:
    # What a plot of sixty classes looks like is no business of this test, and takes seconds.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).write_bytes(b"drawn"))
    names = [f"c{number}" for number in range(count)]
    labels = torch.randint(count, (90,))
    report = classification_report(torch.randn(90, count), labels, names)
    report.save_plots(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"confusion_matrix{suffix}" for suffix in files}
    heading, *rows = (tmp_path / "confusion_matrix.csv").read_text().splitlines()
    assert heading.split(",")[1:] == names
    assert [[int(value) for value in row.split(",")[1:]] for row in rows] == report.confusion.tolist()


# -- sheet ------------------------------------------------------------------------------------------------------------


def test_prediction_sheet_is_green_where_right_and_red_where_wrong() -> None:
    images = [Image.new("RGB", (40, 40), (200, 200, 255))] * 2
    meter = meter_of(torch.tensor([[4.0, 0.0], [4.0, 0.0]]), [0, 0], "ab", [0, 1])
    sheet = meter.draw([0, 1], images, [0, 1])
    assert sheet.width == 2 * 176 + 3 * 8
    halves = [slice(0, sheet.width // 2), slice(sheet.width // 2, None)]

    def inks(labels: list[int]) -> list[bool]:
        pixels = np.asarray(meter.draw([0, 1], images, labels))
        return [bool((pixels[:, half] == color).all(axis=2).any()) for half in halves for color in (GREEN, RED)]

    assert inks([0, 1]) == [True, False, False, True]
    assert inks([1, 0]) == [False, True, True, False]
    assert inks([0, 0]) == [True, False, True, False]
