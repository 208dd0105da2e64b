import csv
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.imaging.drawing import class_colors
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.segmentation_report import (
    SegmentationMeter,
    SegmentationReport,
)

classification = pytest.importorskip("torchmetrics.functional.classification")
pytest.importorskip("matplotlib.figure")  # here, so that no test's time is that of its import

TRUTH = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
LABEL_MAP = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)


def see(meter: SegmentationMeter, index: int, label_map: np.ndarray, truth: np.ndarray) -> None:
    preprocessing = Preprocessing(size=(64, 64), resize_mode="stretch")
    placement = dataclasses.replace(preprocessing.placement(truth.shape), filled=truth.shape, size=truth.shape)
    meter.add(index, {"label_map": label_map}, truth, placement)


def meter_of(*maps: tuple[np.ndarray, np.ndarray], classes: str = "abcd") -> SegmentationMeter:
    meter = SegmentationMeter(list(classes))
    for index, (label_map, truth) in enumerate(maps):
        see(meter, index, label_map, truth)
    return meter


def random_maps(seed: int, num_classes: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and truths of different sizes; each has some of the classes, the last is in none."""
    random = np.random.default_rng(seed)
    maps = []
    for _ in range(count):
        size = random.integers(5, 40, 2)
        some = random.permutation(num_classes - 1)[: random.integers(1, num_classes)]
        truth = random.choice(some, size)
        label_map = np.where(random.random(size) < random.random(), truth, random.integers(0, num_classes - 1, size))
        truth = np.where(random.random(size) < 0.1, 255, truth)
        maps.append((label_map.astype(np.uint8), truth.astype(np.uint8)))
    return maps


# -- figures ----------------------------------------------------------------------------------------------------------


def test_report_by_hand() -> None:
    meter = meter_of((LABEL_MAP, TRUTH))
    report = meter.report()
    # Five pixels count. a: 2 are, 1 is called so, 1 both. b: 2 are, 4 are called so, 2 both. c: 1 is. d: none.
    assert report.confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert report.num_images == 1
    a, b, c, d = report.per_class
    assert (a.name, a.iou, a.accuracy, a.precision, a.share) == ("a", 1 / 2, 1 / 2, 1, 2 / 5)
    assert (b.name, b.iou, b.accuracy, b.precision, b.share) == ("b", 2 / 4, 1, 2 / 4, 2 / 5)
    assert (c.name, c.iou, c.accuracy, c.precision, c.share) == ("c", 0, 0, None, 1 / 5)
    assert (d.name, d.iou, d.accuracy, d.precision, d.share) == ("d", None, None, None, 0)
    assert report.miou == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert report.pixel_accuracy == pytest.approx(3 / 5)
    assert report.mean_class_accuracy == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert (report.score_name, report.score) == ("miou", report.miou)
    assert meter.images[0].miou == pytest.approx(1 / 3)


def test_pixels_of_all_images_count_together() -> None:
    large, small = np.zeros((10, 10), np.uint8), np.zeros((1, 1), np.uint8)
    meter = meter_of((large, large), (small + 1, small))
    report = meter.report()
    assert report.pixel_accuracy == pytest.approx(100 / 101)
    assert report.per_class[0].iou == pytest.approx(100 / 101)
    assert report.per_class[1].iou == 0  # predicted somewhere, but nowhere in the truth
    assert report.per_class[1].accuracy is None
    assert report.miou == pytest.approx(100 / 101 / 2)
    assert report.mean_class_accuracy == pytest.approx(100 / 101)
    assert (meter.images[0].miou, meter.images[1].miou) == (1, 0)


def test_all_right() -> None:
    report = meter_of((TRUTH, TRUTH)).report()  # whatever stands where nothing counts
    assert (report.miou, report.pixel_accuracy, report.mean_class_accuracy) == (1, 1, 1)


@pytest.mark.parametrize("maps", [[], [(LABEL_MAP, np.full_like(TRUTH, 255))]])
def test_no_pixel_that_counts(maps: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path) -> None:
    meter = meter_of(*maps)
    report = meter.report()
    assert report.num_images == len(meter.indices) == len(maps)
    assert (report.miou, report.pixel_accuracy, report.mean_class_accuracy) == (0, 0, 0)
    assert {scores.iou for scores in report.per_class} == {None}
    assert meter.worst() == []
    assert [meter.images[index].miou for index in meter.indices] == [1] * len(maps)
    json.dumps(report.to_dict(), allow_nan=False)
    report.save_plots(tmp_path)


@pytest.mark.parametrize("num_classes", [2, 5, 21, 150])
def test_figures_are_those_of_torchmetrics(num_classes: int) -> None:
    maps = random_maps(num_classes, num_classes, 8)
    meter = meter_of(*maps, classes="x" * num_classes)
    report = meter.report()
    predicted, truth = (torch.from_numpy(np.concatenate([pair[n].ravel() for pair in maps])).long() for n in (0, 1))
    confusion = classification.multiclass_confusion_matrix(predicted, truth, num_classes, ignore_index=255)
    assert report.confusion.dtype == np.int64
    assert report.confusion.tolist() == confusion.tolist()

    def ious(predicted: torch.Tensor, truth: torch.Tensor, average: str) -> list[float]:
        values = classification.multiclass_jaccard_index(
            predicted.double(), truth, num_classes, average=average, ignore_index=255
        )
        return values.reshape(-1).tolist()

    predicted, counted = predicted[truth != 255], truth[truth != 255]
    assert report.miou == pytest.approx(ious(predicted, counted, "macro")[0], abs=1e-6)
    theirs = ious(predicted, counted, "none")
    assert [scores.iou or 0 for scores in report.per_class] == pytest.approx(theirs, abs=1e-6)
    assert report.per_class[-1].iou is None
    assert report.pixel_accuracy == pytest.approx((predicted == counted).double().mean().item(), abs=1e-6)
    accuracies = [(predicted[counted == k] == k).double().mean().item() for k in counted.unique().tolist()]
    assert report.mean_class_accuracy == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert sum(scores.share for scores in report.per_class) == pytest.approx(1)
    for index, (label_map, true) in enumerate(maps):
        one = torch.from_numpy(label_map[true != 255]).long(), torch.from_numpy(true[true != 255]).long()
        assert meter.images[index].miou == pytest.approx(ious(*one, "macro")[0], abs=1e-6)


# -- meter ------------------------------------------------------------------------------------------------------------


def image_with_errors(errors: int) -> tuple[np.ndarray, np.ndarray]:
    truth = np.zeros((10, 10), np.uint8)
    label_map = truth.copy()
    label_map.ravel()[:errors] = 1
    return label_map, truth


def test_worst_are_the_images_with_the_lowest_iou() -> None:
    meter = SegmentationMeter("ab")
    errors = np.random.default_rng(0).permutation(60)  # image by image; one is all right
    for index, number in enumerate(errors.tolist()):
        see(meter, index, *image_with_errors(number))
    worst = np.argsort(-errors).tolist()
    assert meter.worst() == worst[:24]
    assert meter.worst(60) == worst[:59]  # not what is all right


def test_images_equally_bad_come_in_order() -> None:
    meter = SegmentationMeter("ab")
    for index, errors in ((9, 5), (2, 5), (4, 7), (1, 0)):
        see(meter, index, *image_with_errors(errors))
    assert meter.worst() == [4, 2, 9]
    assert meter.worst(1) == [4]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_report_does_not_depend_on_how_images_are_divided(order: tuple[int, ...]) -> None:
    maps = random_maps(1, 6, 60)
    whole = SegmentationMeter("abcdef")
    for index in np.random.default_rng(0).permutation(60).tolist():
        see(whole, index, *maps[index])
    parts = []
    for indices in (range(22), range(50, 18, -1), range(50, 60)):  # some images are seen by two
        part = SegmentationMeter("abcdef")
        for index in indices:
            see(part, index, *maps[index])
        parts.append(pickle.loads(pickle.dumps(part)))
    merged = parts[order[0]]
    for part in order[1:]:
        merged.merge(parts[part])
    assert merged.classes == whole.classes
    assert merged.indices == whole.indices == list(range(60))
    assert merged.report().to_dict() == whole.report().to_dict()
    assert merged.worst() == whole.worst()
    assert all(merged.images[index].label_map == whole.images[index].label_map for index in range(60))


# -- texts and files --------------------------------------------------------------------------------------------------


def a_report(classes: str | list[str] = "abcd") -> SegmentationReport:
    meter = SegmentationMeter(classes)
    see(meter, 0, LABEL_MAP, TRUTH)
    return meter.report()


def test_report_as_json() -> None:
    report = a_report()
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["num_images"] == 1
    assert report.summary == {"miou": 0.333333, "pixel_accuracy": 0.6, "mean_class_accuracy": 0.5}
    assert {name: values[name] for name in report.summary} == report.summary
    assert values["confusion"] == report.confusion.tolist()
    assert values["per_class"][1:] == [
        {"name": "b", "iou": 0.5, "accuracy": 1, "precision": 0.5, "share": 0.4},
        {"name": "c", "iou": 0, "accuracy": 0, "precision": None, "share": 0.2},
        {"name": "d", "iou": None, "accuracy": None, "precision": None, "share": 0},
    ]


def test_texts() -> None:
    report = a_report()
    assert report.headline() == [
        ("mean IoU", "33.33%"), ("pixel accuracy", "60.00%"), ("mean class accuracy", "50.00%"),
    ]  # fmt: skip
    heading, rows = report.table()
    assert heading == ["class", "IoU", "accuracy", "precision", "pixels"]
    assert rows == [
        ["a", "0.500", "0.500", "1.000", "40.00%"],
        ["b", "0.500", "1.000", "0.500", "40.00%"],
        ["c", "0.000", "0.000", "-", "20.00%"],
        ["d", "-", "-", "-", "0.00%"],
    ]


def test_save_plots(tmp_path: Path) -> None:
    a_report().save_plots(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "confusion_matrix.csv", "confusion_matrix.png", "per_class.csv", "per_class_iou.png",
    ]  # fmt: skip
    with (tmp_path / "new" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["name", "iou", "accuracy", "precision", "share"],
            ["a", "0.5", "0.5", "1.0", "0.4"],
            ["b", "0.5", "1.0", "0.5", "0.4"],
            ["c", "0.0", "0.0", "", "0.2"],
            ["d", "", "", "", "0.0"],
        ]
    assert (tmp_path / "new" / "confusion_matrix.csv").read_text().splitlines()[1:3] == ["a,1,1,0,0", "b,0,2,0,0"]
    pixels = {}
    for name in ("per_class_iou", "confusion_matrix"):
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            pixels[name] = {color: count for count, color in image.convert("RGB").getcolors(1 << 20)}
        assert len(pixels[name]) > 30
    a, b, *none = class_colors(4)
    assert pixels["per_class_iou"][a] == pytest.approx(pixels["per_class_iou"][b], rel=0.05)  # bars of one length
    assert pixels["per_class_iou"][a] > 1000
    assert all(pixels["per_class_iou"].get(color, 0) < 100 for color in none)  # of no length


def test_plots_of_many_classes_and_of_odd_names(tmp_path: Path) -> None:
    a_report(["US$ 5 and $6", r"$\frac$", "a\udcffb", "x" * 200]).save_plots(tmp_path / "odd")
    names = [f"c{number}" for number in range(61)]
    meter = SegmentationMeter(names)
    see(meter, 0, *np.random.default_rng(0).integers(0, 61, (2, 90, 90), np.uint8))
    meter.report().save_plots(tmp_path / "many")
    assert not (tmp_path / "many" / "confusion_matrix.png").exists()
    for folder in ("odd", "many"):
        with Image.open(tmp_path / folder / "per_class_iou.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50


# -- sheet ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "across", "down"), [(1, 3, 1), (2, 6, 1), (3, 6, 2)])
def test_sheet(count: int, across: int, down: int) -> None:
    cell, gap = 240, 8
    ground = (200, 200, 255)
    images = [Image.new("RGB", (60, 60), ground)] * count
    predicted, truth = np.zeros((60, 60), np.uint8), np.ones((60, 60), np.uint8)
    truth[:30] = 255
    sheet = meter_of(*[(predicted, truth)] * count, classes="abc").draw(range(count), images, [truth] * count)
    assert sheet.width == across * (cell + gap) + gap
    captioned = cell + 17 + 2 * 5
    cells = down * (captioned + gap) + gap
    assert cells + 12 < sheet.height < cells + 80  # a line of legend
    a, b, c = class_colors(3)
    blended = [tuple(round(0.3 * x + 0.7 * y) for x, y in zip(ground, color, strict=True)) for color in (a, b)]
    pixels = np.asarray(sheet)
    for number in range(3 * count):
        left, top = gap + number % across * (cell + gap), gap + number // across * (captioned + gap)
        above, below = (tuple(pixels[top + y, left + cell // 2].tolist()) for y in (cell // 4, 3 * cell // 4))
        expected = [(ground, ground), (blended[0], blended[0]), (ground, blended[1])][number % 3]
        assert (above, below) == expected
    legend = pixels[cells:]
    assert [(legend == color).all(axis=2).any() for color in (a, b, c)] == [True, True, False]


def test_sheet_of_nothing_and_of_images_that_are_not_square() -> None:
    assert SegmentationMeter("a").draw([], [], []).height > 0
    label_map = np.zeros((90, 30), np.uint8)
    assert meter_of((label_map, label_map)).draw([0], [Image.new("RGB", (30, 90))], [label_map]).width == 3 * 248 + 8
