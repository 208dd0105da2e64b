import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, nms

from golden_weights import golden_images, golden_manifest, golden_name, golden_outputs, golden_weights
from mobilevit.factory import create_model
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.ssdlite import DetectionOutput, SSDLiteConfig, decode_boxes, make_anchors
from mobilevit.results import detection
from mobilevit.results.base import ImageInfo
from mobilevit.results.detection import DetectionResult, Detections, decode_detections, find_objects, to_pixels
from mobilevit.weights.convert import convert_state_dict


def _anchors(output):
    named = output.named()
    return list(zip(named["boxes_xyxy"].numpy(), named["scores"].numpy(), strict=True))


def _one_class_after_the_other(output, score_threshold=0.01, iou_threshold=0.5, top_k=400, max_detections=200):
    """The official postprocessing, as slow as it is plain."""
    results = []
    for logits, regression in zip(output.class_logits, output.box_regression, strict=True):
        boxes = decode_boxes(regression, output.anchors_cxcywh)
        probabilities = logits.softmax(dim=1)
        found = []
        for label in range(1, probabilities.shape[1]):
            scores, order = probabilities[:, label].sort(descending=True)
            order = order[scores > score_threshold][:top_k]
            scores = probabilities[order, label]
            kept_ones = nms(boxes[order], scores, iou_threshold).tolist()
            found += [(scores[kept].item(), label - 1, boxes[order[kept]].tolist()) for kept in kept_ones]
        results.append(sorted(found, reverse=True)[:max_detections])
    return results


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("max_candidates", [20, 400])
def test_agrees_with_suppression_class_by_class(sharpness, max_candidates, monkeypatch):
    monkeypatch.setattr(detection, "MAX_CANDIDATES", max_candidates)
    monkeypatch.setattr(detection, "MAX_DETECTIONS", 60)
    torch.manual_seed(0)
    anchors = make_anchors([(10, 10), (5, 5), (3, 3), (2, 2), (1, 1), (1, 1)], SSDLiteConfig())
    output = DetectionOutput(
        sharpness * torch.randn(2, len(anchors), 6), 0.5 * torch.randn(2, len(anchors), 4), anchors
    )
    for ours, theirs in zip(
        [find_objects(*each) for each in _anchors(output)],
        _one_class_after_the_other(output, top_k=max_candidates, max_detections=60),
        strict=True,
    ):
        assert len(ours.scores) == len(theirs) > 10
        assert ours.scores.tolist() == pytest.approx([score for score, _, _ in theirs], abs=1e-6)
        assert ours.class_ids.tolist() == [label for _, label, _ in theirs]
        assert ours.boxes_xyxy == pytest.approx(np.array([box for _, _, box in theirs]), abs=1e-6)


def test_nothing_above_the_threshold():
    found = find_objects(np.zeros((4, 4), np.float32), np.full((4, 2), 1e-20, np.float32))
    assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("model_name", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s", "mobilevitv2_050"])
def test_detections_of_the_official_code(model_name):
    """From images to boxes; as sets, for random weights give many nearly equal scores."""
    name = f"detection.ssdlite_{golden_name(model_name)}"
    shapes = golden_manifest("detection")[name]["state"]
    weights = convert_state_dict(golden_weights(shapes), to="mobilevit", source_channel_order="rgb")
    model = create_model(model_name, task="detection", num_classes=80)
    model.load_state_dict(weights)
    with torch.inference_mode():
        (boxes_and_scores,) = _anchors(model(golden_images(1, 320, 320)))
    found = find_objects(*boxes_and_scores)
    golden = golden_outputs("detection")
    boxes, scores, labels = (golden[f"{name}.detections.{w}.320x320"].squeeze(0) for w in ("boxes", "scores", "labels"))
    assert len(found.scores) == len(scores)
    assert found.scores == pytest.approx(scores.sort(descending=True).values.numpy(), rel=1e-4)
    overlap = box_iou(torch.from_numpy(found.boxes_xyxy), boxes)
    same = torch.from_numpy(found.class_ids)[:, None] + 1 == labels
    assert (overlap * same > 0.999).any(dim=1).float().mean() >= 0.995
    assert (overlap * same > 0.999).any(dim=0).float().mean() >= 0.995


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop"])
def test_boxes_find_their_way_back_to_the_image(mode):
    preprocessing = Preprocessing(size=(320, 256), resize_mode=mode)
    placement = preprocessing.placement((480, 640))
    inside = np.array([[200.0, 150.0, 400.0, 300.0]])
    found = Detections(placement.to_input(inside).astype(np.float32), np.array([0.5], np.float32), np.array([2]))
    boxes, scores, class_ids = to_pixels(found, placement)
    assert boxes == pytest.approx(inside, abs=1e-3)
    assert (scores.tolist(), class_ids.tolist()) == ([0.5], [2])
    beyond = Detections(np.array([[-1.0, -1.0, 2.0, 2.0]], np.float32), np.array([0.5], np.float32), np.array([2]))
    assert to_pixels(beyond, placement)[0].tolist() == [[0.0, 0.0, 640.0, 480.0]]


def _result():
    return DetectionResult(
        info=ImageInfo(source="street.jpg", size=(90, 100), image=Image.new("RGB", (100, 90), "white")),
        classes=("bus", "cat"),
        boxes_xyxy=np.array([[10, 20, 60, 80], [5, 5, 15, 25]], np.float32),
        scores=np.array([0.9, 0.2], np.float32),
        class_ids=np.array([1, 0]),
        score_threshold=0.5,
    )


def test_result_says_what_is_where(tmp_path):
    result = _result()
    assert len(result) == 2
    assert result.labels == ["cat", "bus"]
    assert result.above().labels == ["cat"]
    assert result.above(0.1).labels == ["cat", "bus"]
    assert result.describe() == "1 cat"
    assert result.describe(min_score=0.95) == "nothing found"
    told = json.loads(json.dumps(result.to_dict()))
    assert told == {
        "source": "street.jpg",
        "width": 100,
        "height": 90,
        "detections": [{"label": "cat", "score": 0.9, "box_xyxy": [10.0, 20.0, 60.0, 80.0]}],
    }
    assert result.to_coco(7, category_ids=[3, 17]) == [
        {"image_id": 7, "category_id": 17, "bbox": [10.0, 20.0, 50.0, 60.0], "score": 0.9},
        {"image_id": 7, "category_id": 3, "bbox": [5.0, 5.0, 10.0, 20.0], "score": 0.2},
    ]
    drawn = result.draw(tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == drawn.size
    pixels = np.asarray(drawn.convert("RGB"))[: result.image.height]
    assert (pixels[20:80, 9:13] != 255).any()  # the left side of the box
    assert (pixels[30:70, 25:50] == 255).all()  # its inside


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_many_more_candidates_than_are_looked_at_together(level, monkeypatch):
    """Nearly all anchors of all classes are candidates, and most of them overlap."""
    for name, limit in {"MAX_CANDIDATES": 50, "MAX_DETECTIONS": 100, "_AT_ONCE": 40}.items():
        monkeypatch.setattr(detection, name, limit)
    generator = np.random.default_rng(0)
    centers = generator.random((600, 2)) * (1 - level) + 0.5 * level
    sides = 0.05 + 0.2 * generator.random((600, 2))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1).astype(np.float32)
    scores = generator.random((600, 7)).astype(np.float32) * 0.9 + 0.05
    found = find_objects(boxes, scores)
    expected = []
    for label in range(7):
        order = np.argsort(-scores[:, label])[:50]
        kept = nms(torch.from_numpy(boxes[order]).double(), torch.from_numpy(scores[order, label]).double(), 0.5)
        expected += [(scores[order[k], label], label, tuple(boxes[order[k]])) for k in kept.tolist()]
    expected = sorted(expected, reverse=True)[:100]
    assert found.scores.tolist() == [score for score, _, _ in expected]
    assert found.class_ids.tolist() == [label for _, label, _ in expected]
    assert [tuple(box) for box in found.boxes_xyxy] == [box for _, _, box in expected]


def test_boxes_that_the_model_has_selected_itself():
    outputs = {
        "boxes_xyxy": np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4),
        "scores": np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 3, 2),
        "selected": np.array([[0, 1, 2], [1, 0, 0], [0, 0, 1]]),  # image, class, anchor
    }
    first, second = (decode_detections(each) for each in DetectionResult.split(outputs))
    assert (first.class_ids.tolist(), second.class_ids.tolist()) == ([1, 0], [0])
    assert first.scores.tolist() == outputs["scores"][0, [2, 1], [1, 0]].tolist()
    assert first.boxes_xyxy.tolist() == outputs["boxes_xyxy"][0, [2, 1]].tolist()
    assert second.boxes_xyxy.tolist() == outputs["boxes_xyxy"][1, [0]].tolist()
