import contextlib
import csv
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit.imaging.drawing import GREEN, RED, class_colors
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.results.detection import Detections
from mobilevit.tasks.detection_report import (
    NOT_COUNTED,
    RECALLS,
    RIGHT,
    WRONG,
    DetectionImage,
    DetectionMeter,
    DetectionReport,
)
from mobilevit.tasks.targets import Boxes

pytest.importorskip("torchmetrics.detection")  # here, so that no test's time is that of its import
pytest.importorskip("matplotlib.figure")
coco = pytest.importorskip("pycocotools.coco")
cocoeval = pytest.importorskip("pycocotools.cocoeval")

Entry = dict[str, Any]
"""Detections and true objects of an image; see `image_of`."""

NOTHING: Entry = {"boxes_xyxy": [], "scores": [], "labels": [], "true_xyxy": [], "true_labels": []}
A, B, C = (10, 10, 60, 50), (100, 20, 180, 90), (30, 120, 90, 190)
"""Boxes that do not touch, of medium size."""


def entry(found: list[tuple[Any, ...]] = [], true: list[tuple[Any, ...]] = [], **more: Any) -> Entry:  # noqa: B006
    """Of (box, score, class) and (box, class)."""
    return {
        "boxes_xyxy": [box for box, _, _ in found],
        "scores": [score for _, score, _ in found],
        "labels": [label for _, _, label in found],
        "true_xyxy": [box for box, _ in true],
        "true_labels": [label for _, label in true],
        **more,
    }


def image_of(each: Entry) -> DetectionImage:
    found, true = (np.array(each[name], np.float32).reshape(-1, 4) for name in ("boxes_xyxy", "true_xyxy"))
    labels, true_labels = (np.array(each[name], np.int64) for name in ("labels", "true_labels"))
    areas = (true[:, 2:] - true[:, :2]).prod(axis=1)
    stated = np.array(each.get("true_areas", areas), np.float32)
    truth = Boxes(
        xyxy=true,
        labels=true_labels,
        crowd=np.array(each.get("true_crowd", np.zeros(len(true))), np.bool_),
        areas=np.where(stated > 0, stated, areas),
    )
    return DetectionImage(Detections(found, np.array(each["scores"], np.float32), labels), truth)


def meter_of(*images: Entry, classes: str = "ab") -> DetectionMeter:
    meter = DetectionMeter(list(classes))
    for index, each in enumerate(images):
        meter.images[index] = image_of(each)
    return meter


def report_of(*images: Entry, classes: str = "ab") -> DetectionReport:
    return meter_of(*images, classes=classes).report()


def random_images(seed: int, num_classes: int = 4, num_images: int = 12) -> list[Entry]:
    """Of all sizes, some crowds, some without anything; the last class has no object, and no score comes twice.

    Coordinates are quarters of pixels, so that sums of them are exact.
    """
    random = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        sides = np.exp(random.uniform(np.log(6), np.log(200), (count, 2)))
        corners = random.uniform(0, 320, (count, 2))
        return np.round(np.concatenate([corners, corners + sides], axis=1) * 4) / 4

    images = []
    for number in range(num_images):
        num_objects = 0 if number in (3, 7) else int(random.integers(0, 9))
        true, true_labels = boxes(num_objects), random.integers(0, num_classes - 1, num_objects)
        copies = random.integers(0, 3, num_objects)  # of each object: missed, found, found twice
        near = true.repeat(copies, axis=0)
        sides = np.tile(near[:, 2:] - near[:, :2], 2)
        near = np.round((near + sides * random.normal(0, 0.06, near.shape)) * 4) / 4
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        false = boxes(0 if number == 7 else int(random.integers(0, 6)))
        labels = true_labels.repeat(copies)
        labels = np.where(random.random(len(labels)) < 0.9, labels, random.integers(0, num_classes, len(labels)))
        areas = (true[:, 2:] - true[:, :2]).prod(axis=1)
        each: Entry = {
            "boxes_xyxy": np.concatenate([near, false]),
            "labels": np.concatenate([labels, random.integers(0, num_classes, len(false))]),
            "true_xyxy": true,
            "true_labels": true_labels,
        }
        if random.random() < 0.7:
            each["true_crowd"] = random.random(num_objects) < 0.2
        if random.random() < 0.5:  # as of masks: smaller than the box; or not known
            shares = random.uniform(0.3, 1, num_objects) * (random.random(num_objects) < 0.8)
            each["true_areas"] = np.floor(areas * shares)
        images.append(each)
    counts = [len(each["labels"]) for each in images]
    scores = (random.permutation(sum(counts)) + 1) / (sum(counts) + 1)
    for each, part in zip(images, np.split(scores, np.cumsum(counts)[:-1]), strict=True):
        each["scores"] = part
    return images


def coco_evaluation(images: list[Entry], num_classes: int) -> Any:
    """What COCO's own code says."""
    truth: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": [],
    }
    found: list[dict[str, Any]] = []
    for index, each in enumerate(images):
        true = np.asarray(each["true_xyxy"], float).reshape(-1, 4)
        crowd, areas = each.get("true_crowd"), each.get("true_areas")
        for row, (left, top, right, bottom) in enumerate(true.tolist()):
            width, height = right - left, bottom - top
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": index,
                    "category_id": int(each["true_labels"][row]),
                    "bbox": [left, top, width, height],
                    "iscrowd": int(crowd[row]) if crowd is not None else 0,
                    "area": (float(areas[row]) if areas is not None else 0) or width * height,
                }
            )
        boxes = np.asarray(each["boxes_xyxy"], float).reshape(-1, 4).tolist()
        for (left, top, right, bottom), score, label in zip(boxes, each["scores"], each["labels"], strict=True):
            box = [left, top, right - left, bottom - top]
            found.append({"image_id": index, "category_id": int(label), "bbox": box, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        data.dataset = truth
        data.createIndex()
        evaluation = cocoeval.COCOeval(data, data.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def or_missing(value: float | None) -> float:
    return -1 if value is None else value


def mean_of(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else -1


# -- the same as COCO -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_those_of_coco(seed: int) -> None:
    images = random_images(seed)
    report = report_of(*images, classes="abcd")
    evaluation = coco_evaluation(images, 4)
    ours = (report.ap, report.ap50, report.ap75, report.ap_small, report.ap_medium, report.ap_large)
    assert 0.05 < report.ap < 0.95
    assert [or_missing(value) for value in ours] == pytest.approx(evaluation.stats[:6].tolist(), abs=1e-6)
    assert report.ar100 == pytest.approx(evaluation.stats[8], abs=1e-6)
    precisions = evaluation.eval["precision"][:, :, :, 0, 2]
    for label, scores in enumerate(report.per_class):
        assert or_missing(scores.ap) == pytest.approx(mean_of(precisions[:, :, label]), abs=1e-6)
        assert or_missing(scores.ap50) == pytest.approx(mean_of(precisions[0, :, label]), abs=1e-6)
        if scores.curve is None:
            assert (precisions[0, :, label] == -1).all()
        else:
            assert scores.curve == pytest.approx(precisions[0, :, label], abs=1e-6)
    last = report.per_class[-1]
    assert (last.ap, last.ap50, last.recall, last.num_objects, last.curve) == (None, None, None, 0, None)


@pytest.mark.parametrize("seed", range(5))
def test_outcomes_are_those_of_coco(seed: int) -> None:
    images = random_images(seed)
    # A box without a surface lies in no crowd.
    images.append(entry([((50, 50, 50, 80), 0.5, 0)], [((200, 200, 300, 300), 0)], true_crowd=[True]))
    meter = meter_of(*images, classes="abcd")
    seen = set()
    for result in coco_evaluation(images, 4).evalImgs:
        if result is None or result["aRng"] != [0, 1e10]:
            continue
        ours = meter.images[result["image_id"]]
        mine = ours.found.class_ids == result["category_id"]
        order = np.argsort(-ours.found.scores[mine], kind="stable")
        matched, ignored = result["dtMatches"][0] > 0, result["dtIgnore"][0]
        expected = np.where(ignored, NOT_COUNTED, np.where(matched, RIGHT, WRONG))
        assert ours.outcome[mine][order].tolist() == expected.tolist()
        seen.update(expected.tolist())
    assert seen == {RIGHT, WRONG, NOT_COUNTED}


def test_no_more_than_a_hundred_detections_a_class_and_image() -> None:
    places = [(12 * (n % 16), 12 * (n // 16), 12 * (n % 16) + 10, 12 * (n // 16) + 10) for n in range(130)]
    many = entry([(box, 0.99 - n / 200, n % 13 == 0) for n, box in enumerate(places)], [(box, 0) for box in places])
    report, evaluation = report_of(many), coco_evaluation([many], 2)
    assert report.ap == pytest.approx(evaluation.stats[0], abs=1e-6)
    assert report.ar100 == pytest.approx(evaluation.stats[8], abs=1e-6)
    assert report.ar100 == pytest.approx(100 / 130)
    assert report.recall == pytest.approx(120 / 130)  # at the best threshold, all detections count


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_all_found() -> None:
    report = report_of(entry([(A, 0.9, 0), (B, 0.8, 1)], [(A, 0), (B, 1)]), entry([(C, 0.7, 0)], [(C, 0)]))
    assert (report.num_images, report.num_objects) == (2, 3)
    assert (report.ap, report.ap50, report.ap75, report.ar100) == (1, 1, 1, 1)
    assert (report.ap_small, report.ap_medium, report.ap_large) == (None, 1, None)
    assert (report.precision, report.recall, report.f1) == (1, 1, 1)
    assert report.score_threshold == pytest.approx(0.7, abs=2e-6)
    assert [(c.name, c.ap, c.ap50, c.precision, c.recall, c.num_objects) for c in report.per_class] == [
        ("a", 1, 1, 1, 1, 2), ("b", 1, 1, 1, 1, 1),
    ]  # fmt: skip
    for scores in report.per_class:
        assert scores.curve is not None
        assert scores.curve.tolist() == [1] * 101
    assert (report.score_name, report.score) == ("ap", report.ap)


def test_sizes() -> None:
    boxes = [(0, 0, 31, 31), (50, 50, 120, 120), (150, 100, 350, 300)]
    true = [(box, 0) for box in boxes]
    report = report_of(entry([(boxes[0], 0.9, 0), (boxes[2], 0.8, 0)], true))
    assert (report.ap_small, report.ap_medium, report.ap_large) == (1, 0, 1)
    # The areas that are given count, not those of the boxes, except where they are zero.
    report = report_of(entry([(boxes[0], 0.9, 0), (boxes[2], 0.8, 0)], true, true_areas=[0, 900, 5000]))
    assert report.ap_medium == 1
    assert report.ap_large is None
    assert report.ap_small == pytest.approx(51 / 101)


def test_nothing_found() -> None:
    report = report_of(entry(true=[(A, 0), (B, 1)]), NOTHING)
    assert (report.num_images, report.num_objects) == (2, 2)
    assert (report.ap, report.ap50, report.ap75, report.ap_medium, report.ar100) == (0, 0, 0, 0, 0)
    assert (report.score_threshold, report.precision, report.recall, report.f1) == (0.5, 0, 0, 0)
    assert [(c.ap, c.precision, c.recall) for c in report.per_class] == [(0, None, 0), (0, None, 0)]


def test_one_of_two_found() -> None:
    report = report_of(entry([(A, 0.9, 0)], [(A, 0), (B, 0)]))
    # Precision is 1 up to recall 0.5 and 0 above, so 1 at 51 of the 101 recalls 0.00, 0.01, ... 1.00.
    assert report.ap == pytest.approx(51 / 101)
    assert report.ar100 == 0.5
    curve = report.per_class[0].curve
    assert curve is not None
    assert curve.tolist() == [1.0] * 51 + [0.0] * 50
    assert RECALLS[50] == 0.5
    assert (report.precision, report.recall, report.f1) == (1, 0.5, pytest.approx(2 / 3))


def test_a_box_that_fits_badly_is_found_at_low_thresholds_only() -> None:
    # IoU 0.72: found at 0.50, 0.55, 0.60, 0.65 and 0.70 of the ten thresholds.
    report = report_of(entry([((0, 0, 72, 100), 0.9, 0)], [((0, 0, 100, 100), 0)]))
    assert (report.ap, report.ap50, report.ap75) == (pytest.approx(0.5), 1, 0)
    assert report.ar100 == pytest.approx(0.5)
    badly = report_of(entry([((0, 0, 49, 100), 0.9, 0)], [((0, 0, 100, 100), 0)]))
    assert (badly.ap, badly.precision, badly.recall) == (0, 0, 0)
    just = report_of(entry([((0, 0, 50, 100), 0.9, 0)], [((0, 0, 100, 100), 0)]))
    assert (just.ap, just.precision, just.recall) == (pytest.approx(0.1), 1, 1)


@pytest.mark.parametrize(
    ("score", "ap"),
    [
        (0.95, 0.5),  # wrong, right: precision is 1/2 where recall reaches 1, and no better before
        (0.85, 1.0),  # right, wrong: recall is 1 already
    ],
)
def test_a_wrong_detection_above_and_below_the_right_one(score: float, ap: float) -> None:
    here = report_of(entry([(A, 0.9, 0), (B, score, 0)], [(A, 0)]))
    in_an_empty_image = report_of(entry([(A, 0.9, 0)], [(A, 0)]), entry([(B, score, 0)]))
    of_another_class = report_of(entry([(A, 0.9, 0), (A, score, 1)], [(A, 0)]))
    assert (here.ap, in_an_empty_image.ap) == (pytest.approx(ap), pytest.approx(ap))
    assert of_another_class.ap == 1
    assert of_another_class.per_class[1].ap is None
    for report in (here, in_an_empty_image, of_another_class):
        assert (report.precision, report.recall) == ((0.5, 1) if ap < 1 else (1, 1))


def test_a_second_detection_of_an_object_is_wrong() -> None:
    meter = meter_of(entry([(A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0)], [(A, 0), (B, 0)]))
    assert meter.images[0].outcome.tolist() == [RIGHT, WRONG, RIGHT]
    # Precision 1 at recall 0.5, which is 51 recalls, and 2/3 at recall 1, which is the other 50.
    assert meter.report().ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert meter.report().precision == pytest.approx(2 / 3)


def test_the_surest_detection_chooses_first() -> None:
    left, right = (0, 0, 100, 100), (20, 0, 120, 100)
    between = (8, 0, 108, 100)  # nearer to the left one
    meter = meter_of(entry([(left, 0.5, 0), (between, 0.9, 0)], [(left, 0), (right, 0)]))
    assert meter.images[0].outcome.tolist() == [RIGHT, RIGHT]  # at IoU 0.50 the second finds what is left: 100/120
    meter = meter_of(entry([(left, 0.5, 0), (between, 0.9, 0)], [(left, 0)]))
    assert meter.images[0].outcome.tolist() == [WRONG, RIGHT]


def test_crowds_are_neither_missed_nor_found() -> None:
    crowd = (100, 100, 300, 300)
    inside, outside = (120, 120, 160, 160), (280, 280, 360, 360)
    found = [(A, 0.6, 0), (inside, 0.9, 0), (crowd, 0.8, 0)]
    meter = meter_of(entry(found, [(crowd, 0), (A, 0)], true_crowd=[True, False]))
    assert meter.images[0].outcome.tolist() == [RIGHT, NOT_COUNTED, NOT_COUNTED]
    assert meter.images[0].count(0.5) == (1, 0, 0)
    assert meter.worst() == []
    report = meter.report()
    assert (report.ap, report.ar100, report.num_objects) == (1, 1, 1)
    assert (report.precision, report.recall) == (1, 1)
    assert report.per_class[0].num_objects == 1
    assert report.score_threshold == pytest.approx(0.6, abs=2e-6)
    # Not those of another class, nor those that are mostly beside it.
    others = [(A, 0.6, 0), (inside, 0.9, 1), (outside, 0.8, 0)]
    meter = meter_of(entry(others, [(crowd, 0), (A, 0)], true_crowd=[True, False]))
    assert meter.images[0].outcome.tolist() == [RIGHT, WRONG, WRONG]
    assert meter.report().ap == pytest.approx(0.5)


@pytest.mark.parametrize(
    "images",
    [
        [],
        [NOTHING],
        [NOTHING, entry([(A, 0.9, 0), (B, 0.1, 1)])],
        [entry([(A, 0.9, 0)], [(A, 0)], true_crowd=[True])],
    ],
)
def test_no_object_at_all(images: list[Entry], tmp_path: Path) -> None:
    meter = meter_of(*images)
    report = meter.report()
    assert (report.num_images, report.num_objects) == (len(images), 0)
    assert (report.ap, report.ap50, report.ap75, report.ar100) == (0, 0, 0, 0)
    assert (report.ap_small, report.ap_medium, report.ap_large) == (None, None, None)
    assert (report.score_threshold, report.recall, report.f1) == (0.5, 0, 0)
    nothing = (None, None, None, 0, None)
    assert [(c.ap, c.ap50, c.recall, c.num_objects, c.curve) for c in report.per_class] == [nothing] * 2
    assert list(report.summary) == ["ap", "ap50", "ap75", "ar100", "f1"]
    assert [name for name, _ in report.headline()][:4] == ["AP", "AP50", "AP75", "AR100"]
    json.loads(json.dumps(report.to_dict(), allow_nan=False))
    report.save_plots(tmp_path)
    for name in ("pr_curves.png", "per_class.png"):
        with Image.open(tmp_path / name) as image:
            image.load()
    assert report.table()[1][0][:3] == ["a", "-", "-"]


# -- the best threshold -----------------------------------------------------------------------------------------------


def test_best_threshold_by_hand() -> None:
    far = [(600 + 50 * n, 0, 640 + 50 * n, 40) for n in range(3)]
    found = [(A, 0.875, 0), (far[0], 0.75, 0), (B, 0.625, 1), (far[1], 0.5, 1), (far[2], 0.375, 1)]
    meter = meter_of(entry(found, [(A, 0), (B, 1), (C, 1)]))
    # F1 = 2 * right / (detections + 3 objects): 2/4, 2/5, 4/6, 4/7, 4/8.
    assert meter.best_threshold() == 0.625
    report = meter.report()
    assert report.score_threshold == 0.625
    assert (report.precision, report.recall, report.f1) == (2 / 3, 2 / 3, pytest.approx(2 / 3))
    a, b = report.per_class
    assert (a.precision, a.recall) == (0.5, 1)
    assert (b.precision, b.recall) == (1, 0.5)
    assert [meter.images[0].count(score) for score in (0.9, 0.625, 0.626, 0)] == [
        (0, 3, 0), (2, 1, 1), (1, 2, 1), (2, 1, 3),
    ]  # fmt: skip


def test_detections_of_one_score_are_not_parted() -> None:
    far = [(600 + 50 * n, 0, 640 + 50 * n, 40) for n in range(6)]
    tied = [(B, 0.5, 0), *((box, 0.5, 0) for box in far)]
    meter = meter_of(entry([(A, 0.75, 0), *tied], [(A, 0), (B, 0)]))
    # With B alone F1 would be 4/4, but the six others come along: 4/10, and 2/3 without any of them.
    assert meter.best_threshold() == 0.75
    assert meter.report().f1 == pytest.approx(2 / 3)


def test_detections_in_crowds_do_not_move_the_threshold() -> None:
    crowd = (300, 300, 400, 400)
    found = [(A, 0.75, 0), *((crowd, 0.625, 0),) * 5, (B, 0.5, 0)]
    meter = meter_of(entry(found, [(A, 0), (B, 0), (crowd, 0)], true_crowd=[False, False, True]))
    assert meter.best_threshold() == 0.5
    assert meter.report().f1 == 1


@pytest.mark.parametrize("seed", range(6))
def test_best_threshold_is_the_best_of_all(seed: int) -> None:
    meter = meter_of(*random_images(seed), classes="abcd")
    seen = list(meter.images.values())

    def figures(threshold: float) -> tuple[float, float, float]:
        found, missed, wrong = np.sum([each.count(threshold) for each in seen], axis=0)
        return found / max(found + wrong, 1), found / (found + missed), 2 * found / (2 * found + missed + wrong)

    report = meter.report()
    assert (report.precision, report.recall, report.f1) == pytest.approx(figures(report.score_threshold))
    scores = np.concatenate([each.found.scores for each in seen])
    assert report.f1 == pytest.approx(max(figures(score)[2] for score in scores))


@pytest.mark.parametrize("score", [0.1, 1 / 3, 0.7, 0.9999999, 1.0, 1e-9])
def test_the_threshold_survives_a_file_and_keeps_its_detection(score: float) -> None:
    meter = meter_of(entry([(A, score, 0)], [(A, 0)]))
    threshold = json.loads(json.dumps(meter.report().to_dict()))["score_threshold"]
    assert threshold == meter.best_threshold() == round(threshold, 6)
    assert threshold == pytest.approx(score, abs=2e-6)
    assert meter.images[0].count(threshold) == (1, 0, 0)


# -- meter ------------------------------------------------------------------------------------------------------------


def test_a_meter_decodes_the_outputs_of_a_model() -> None:
    boxes = np.array([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32)
    outputs = {"boxes_xyxy": boxes, "scores": np.array([[0, 0.9], [0.6, 0]], np.float32)}
    true = Boxes(
        xyxy=np.array([[100, 50, 200, 100]], np.float32),
        labels=np.array([1]),
        crowd=np.array([False]),
        areas=np.array([5000], np.float32),
    )
    meter = DetectionMeter("ab")
    meter.add(3, outputs, true, Preprocessing(resize_mode="stretch").placement((200, 400)))
    assert meter.indices == [3]
    assert meter.images[3].found.boxes_xyxy.tolist() == [[100, 50, 200, 100], [200, 100, 400, 200]]
    assert meter.images[3].outcome.tolist() == [RIGHT, WRONG]
    assert meter.report().ap == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_report_does_not_depend_on_how_images_are_divided(order: tuple[int, ...]) -> None:
    images = random_images(3)
    whole = meter_of(*images, classes="abcd")
    parts = []
    for indices in ([11, 0, 4, 2], [2, 1, 3, 4, 5], [10, 9, 8, 7, 6]):  # two images are seen by two
        part = DetectionMeter("abcd")
        for index in indices:
            part.images[index] = image_of(images[index])
        parts.append(pickle.loads(pickle.dumps(part)))
    merged = parts[order[0]]
    for part in order[1:]:
        merged.merge(parts[part])
    assert merged.classes == whole.classes
    assert merged.indices == whole.indices == list(range(12))
    assert merged.report().to_dict() == whole.report().to_dict()
    assert merged.worst(5) == whole.worst(5)


def test_worst() -> None:
    meter = DetectionMeter("a")
    meter.images[8] = image_of(entry([(A, 0.9, 0)], [(A, 0)]))  # flawless
    meter.images[5] = image_of(entry([(A, 0.9, 0)], [(A, 0), (B, 0)]))  # one missed
    meter.images[3] = image_of(entry([(A, 0.9, 0), (B, 0.9, 0)], [(A, 0)]))  # one of none
    meter.images[9] = image_of(entry([(A, 0.9, 0)], [(B, 0), (C, 0)]))  # two missed, one of none
    meter.images[1] = image_of(entry([(A, 0.9, 0), (B, 0.1, 0)], [(A, 0)]))  # flawless above the threshold
    assert meter.best_threshold() == pytest.approx(0.9, abs=2e-6)
    assert meter.worst() == [9, 3, 5]
    assert meter.worst(2) == [9, 3]
    assert DetectionMeter("a").worst() == []


# -- texts and files --------------------------------------------------------------------------------------------------


def a_report() -> DetectionReport:
    """Class a: one of two found. Class b: found, and a wrong one below. Class c: no object."""
    first = entry([(A, 0.75, 0), (B, 0.5, 1)], [(A, 0), (C, 0), (B, 1)])
    return report_of(first, entry([(C, 0.25, 1), (A, 0.125, 2)]), classes="abc")


def test_report_as_json() -> None:
    report = a_report()
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    ap = (51 / 101 + 1) / 2
    assert (values["num_images"], values["num_objects"]) == (2, 3)
    assert values["ap"] == round(ap, 6) == report.summary["ap"]
    assert (values["ap_small"], values["score_threshold"]) == (None, 0.5)
    assert (values["precision"], values["recall"], values["f1"]) == (1, 0.666667, 0.8)
    assert {name: values[name] for name in report.summary} == report.summary
    assert list(report.summary) == ["ap", "ap50", "ap75", "ap_medium", "ar100", "f1"]
    a, b, c = values["per_class"]
    assert a == {
        "name": "a", "ap": 0.50495, "ap50": 0.50495, "precision": 1, "recall": 0.5, "num_objects": 2,
        "curve": [1] * 51 + [0] * 50,
    }  # fmt: skip
    assert (b["ap"], b["precision"], b["recall"], b["curve"]) == (1, 1, 1, [1] * 101)
    assert c == {
        "name": "c", "ap": None, "ap50": None, "precision": None, "recall": None, "num_objects": 0, "curve": None,
    }  # fmt: skip


def test_texts() -> None:
    report = a_report()
    assert report.headline() == [
        ("AP", "0.752"),
        ("AP50", "0.752"),
        ("AP75", "0.752"),
        ("AP medium", "0.752"),
        ("AR100", "0.750"),
        ("best score threshold", "0.500"),
        ("precision there", "1.000"),
        ("recall there", "0.667"),
    ]
    heading, rows = report.table()
    assert heading == ["class", "AP", "AP50", "precision", "recall", "objects"]
    assert rows == [
        ["a", "0.505", "0.505", "1.000", "0.500", "2"],
        ["b", "1.000", "1.000", "1.000", "1.000", "1"],
        ["c", "-", "-", "-", "-", "0"],
    ]


def colors_of(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        return {color: count for count, color in image.convert("RGB").getcolors(1 << 20)}


def test_save_plots(tmp_path: Path) -> None:
    report = a_report()
    report.save_plots(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "per_class.csv", "per_class.png", "pr_curves.png",
    ]  # fmt: skip
    with (tmp_path / "new" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["name", "ap", "ap50", "precision", "recall", "num_objects"]
    assert [row[0] for row in rows] == ["a", "b", "c"]
    assert [float(value) for value in rows[0][1:]] == pytest.approx([51 / 101, 51 / 101, 1, 0.5, 2])
    assert [float(value) for value in rows[1][1:]] == [1, 1, 1, 1, 1]
    assert rows[2] == ["c", "", "", "", "", "0"]
    curves, bars = (colors_of(tmp_path / "new" / name) for name in ("pr_curves.png", "per_class.png"))
    a, b, c = class_colors(3)
    assert min(curves[a], curves[b]) > 50
    assert c not in curves  # no object, no curve
    # Bars of AP are dark, those of AP50 pale blue; here they are of the same length.
    assert bars[0, 114, 178] == pytest.approx(bars[86, 180, 233], rel=0.1)
    assert bars[0, 114, 178] > 1000


def test_plots_of_many_classes_and_of_odd_names(tmp_path: Path) -> None:
    names = ["US$ 5 and $6", r"$\frac$", "a\udcffb", "x" * 200, *(f"c{n}" for n in range(40))]
    meter = DetectionMeter(names)
    for index in range(len(names)):
        meter.images[index] = image_of(
            entry([(A, 0.9 - index / 100, index)], [(A, index), (B, index)][: 1 + index % 2])
        )
    few = DetectionMeter(names[:4])
    few.images = {index: meter.images[index] for index in range(4)}
    for number, each in enumerate((meter, few)):
        each.report().save_plots(tmp_path / str(number))
        assert len(colors_of(tmp_path / str(number) / "pr_curves.png")) > 50
        assert len(colors_of(tmp_path / str(number) / "per_class.png")) > 50


def test_sheet_is_green_where_all_is_right_and_red_elsewhere() -> None:
    image = Image.new("RGB", (200, 200), (200, 200, 255))
    good, bad = entry([(A, 0.9, 0), (B, 0.1, 0)], [(A, 0)]), entry([(B, 0.9, 1)], [(A, 0)])
    for each, ink, other in ((good, GREEN, RED), (bad, RED, GREEN)):
        meter = meter_of(each)
        sheet = meter.draw([0], [image], [meter.images[0].truth])
        pixels = np.asarray(sheet)
        assert (pixels == ink).all(axis=2).any()
        assert not (pixels == other).all(axis=2).any()
        own, absent = class_colors(2) if each is good else class_colors(2)[::-1]
        assert (pixels == own).all(axis=2).sum() > 100
        assert not (pixels == absent).all(axis=2).any()
    meter = meter_of(good, bad)
    both = meter.draw([0, 1], [image] * 2, [seen.truth for seen in meter.images.values()])
    assert math.isclose(both.width, 2 * sheet.width, rel_tol=0.05)
    assert DetectionMeter("ab").draw([], [], []).height > 0
