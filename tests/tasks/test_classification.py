import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.tasks.classification import (
    ClassificationReport,
    ClassificationResult,
    balanced_class_weights,
    classification_loss,
    classification_report,
    prediction_sheet,
    save_confusion_matrix,
    worst_mistakes,
)
from mobilevit.tasks.drawing import GREEN, RED

pytest.importorskip("torchmetrics.functional.classification")  # here, so that no test's time is that of its import

# -- loss -------------------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 4.0, 2.0, 1.0)])
def test_loss_by_hand(smoothing: float, weights: tuple[float, ...] | None) -> None:
    logits, labels = torch.randn(7, 5) * 3, torch.tensor([0, 4, 2, 2, 1, 0, 3])
    loss = classification_loss(
        logits,
        labels,
        label_smoothing=smoothing,
        class_weights=None if weights is None else torch.tensor(weights),
    )
    share = np.full((7, 5), smoothing / 5) + (1 - smoothing) * np.eye(5)[labels.numpy()]
    weight = np.ones(5) if weights is None else np.array(weights)
    expected = -(share * weight * log_softmax(logits.numpy())).sum() / weight[labels.numpy()].sum()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_mixed_labels() -> None:
    logits, shares = torch.randn(6, 4), torch.rand(6, 4).softmax(dim=1)
    expected = -(shares.numpy() * log_softmax(logits.numpy())).sum(axis=1).mean()
    assert classification_loss(logits, shares).item() == pytest.approx(expected, rel=1e-5)
    smoothed = 0.8 * shares.numpy() + 0.2 / 4
    expected = -(smoothed * log_softmax(logits.numpy())).sum(axis=1).mean()
    assert classification_loss(logits, shares, label_smoothing=0.2).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    logits, labels = (torch.randn(9, 30) * 5).to(dtype), torch.arange(9)
    loss = classification_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-log_softmax(logits.float().numpy())[range(9), range(9)].mean(), rel=1e-5)


def test_balanced_class_weights() -> None:
    labels = [0] * 6 + [1] * 3 + [3] * 1
    weights = balanced_class_weights(labels, 4)
    assert weights.tolist() == pytest.approx([10 / 24, 10 / 12, 10 / 4, 10 / 4])  # class 2 has none
    totals = [weights[label].item() * labels.count(label) for label in (0, 1, 3)]
    assert totals == pytest.approx([2.5, 2.5, 2.5])


# -- report -----------------------------------------------------------------------------------------------------------


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


def test_a_perfect_model() -> None:
    report = classification_report(torch.eye(4) * 100, torch.arange(4), list("abcd"))
    assert (report.top1, report.calibration_error) == (1.0, pytest.approx(0, abs=1e-6))
    assert report.loss == pytest.approx(0, abs=1e-6)
    assert [(c.precision, c.recall, c.f1, c.support) for c in report.per_class] == [(1.0, 1.0, 1.0, 1)] * 4


def test_report_of_half_precision_logits() -> None:
    logits, labels = torch.randn(50, 7).bfloat16(), torch.randint(7, (50,))
    half, full = (classification_report(x, labels, list("abcdefg")) for x in (logits, logits.float()))
    assert half.to_dict() == full.to_dict()


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


def test_worst_mistakes() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.01, 0.99], [0.45, 0.55], [0.6, 0.4]])
    labels = torch.tensor([1, 0, 0, 0, 0, 1])  # picture 1 is right
    assert worst_mistakes(probabilities.log(), labels) == [3, 0, 2, 5, 4]
    assert worst_mistakes(probabilities.log(), labels, count=2) == [3, 0]
    assert worst_mistakes(probabilities.log(), probabilities.argmax(dim=1)) == []


# -- files ------------------------------------------------------------------------------------------------------------


def report_of(names: list[str], count: int = 200) -> ClassificationReport:
    return classification_report(torch.randn(count, len(names)), torch.randint(len(names), (count,)), names)


@pytest.mark.parametrize("names", [["cat", "dog", "owl"], ['a "b"', "c, d", "größer 猫"], ["US$ 5 and $6", r"$\frac$"]])
def test_confusion_matrix_files(tmp_path: Path, names: list[str]) -> None:
    report = report_of(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks
        save_confusion_matrix(report, tmp_path)
    with (tmp_path / "confusion_matrix.csv").open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["true \\ predicted", *names]
    assert [row[0] for row in rows] == names
    assert [[int(count) for count in row[1:]] for row in rows] == report.confusion.tolist()
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        assert image.width == image.height == round(120 * (2.2 + 0.5 * len(names)))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # shades of blue and black text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion_matrix.csv", "confusion_matrix.png"]


def test_confusion_matrix_shades(tmp_path: Path) -> None:
    logits = torch.eye(2)[[0] * 10 + [1] * 10]
    save_confusion_matrix(classification_report(logits, torch.tensor([0] * 10 + [1] * 10), ["a", "b"]), tmp_path)
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    dark_blue = sum(count for count, colour in colours if colour == (8, 48, 107))  # the end of the scale
    pale_blue = sum(count for count, colour in colours if colour == (247, 251, 255))
    assert 0.8 < dark_blue / pale_blue < 1.1  # the diagonal and the rest; the digits stand on the dark squares


def test_no_picture_of_too_many_classes(tmp_path: Path) -> None:
    save_confusion_matrix(report_of([f"c{i}" for i in range(7)]), tmp_path, most_classes=6)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion_matrix.csv"]


# -- a prediction -----------------------------------------------------------------------------------------------------


def a_result() -> ClassificationResult:
    return ClassificationResult(
        source="photos/x.jpg",
        classes=("ant", "bee", "cat", "dog"),
        probabilities=np.array([0.125, 0.5, 0.125, 0.25], np.float32),
        image=Image.new("RGB", (90, 60), (20, 90, 200)),
    )


def test_result() -> None:
    result = a_result()
    assert (result.label, result.probability) == ("bee", 0.5)
    assert result.top() == [("bee", 0.5), ("dog", 0.25), ("ant", 0.125), ("cat", 0.125)]
    assert result.top(2) == [("bee", 0.5), ("dog", 0.25)]
    assert result.top(99) == result.top(4)
    assert all(type(probability) is float for _, probability in result.top())


def test_result_as_json() -> None:
    values = json.loads(json.dumps(a_result().to_dict(2)))
    assert values == {
        "source": "photos/x.jpg",
        "label": "bee",
        "probability": 0.5,
        "top": [{"label": "bee", "probability": 0.5}, {"label": "dog", "probability": 0.25}],
    }


def test_drawing_a_result(tmp_path: Path) -> None:
    result = a_result()
    drawn = result.draw(tmp_path / "new" / "x.png")
    with Image.open(tmp_path / "new" / "x.png") as saved:
        assert saved.tobytes() == drawn.tobytes()
    assert drawn.crop((0, 0, 90, 60)).tobytes() == result.image.tobytes()
    heights = [result.draw(k=k).height for k in (1, 2, 3, 4, 5)]
    line = heights[1] - heights[0]
    assert line >= 11
    assert heights == [heights[0] + line * more for more in (0, 1, 2, 3, 3)]  # there are four classes
    assert drawn.height == heights[2]


def test_prediction_sheet_is_green_where_right_and_red_where_wrong() -> None:
    images = [Image.new("RGB", (40, 40), (200, 200, 255))] * 2
    logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]])

    def inks(labels: list[int]) -> list[bool]:
        pixels = np.asarray(prediction_sheet(images, logits, labels, ["cat", "dog"]))
        return [bool((pixels[:, half] == colour).all(axis=2).any()) for half in halves for colour in (GREEN, RED)]

    width = prediction_sheet(images, logits, [0, 1], ["cat", "dog"]).width
    halves = [slice(0, width // 2), slice(width // 2, None)]
    assert inks([0, 1]) == [True, False, False, True]
    assert inks([1, 0]) == [False, True, True, False]
    assert inks([0, 0]) == [True, False, True, False]
    assert width == 2 * 176 + 3 * 8
