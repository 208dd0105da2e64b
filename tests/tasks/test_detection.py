import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, box_iou, nms

from golden_weights import golden_images, golden_manifest, golden_outputs, golden_weights
from mobilevit.factory import create_model
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.ssdlite import DetectionOutput, SSDLiteConfig, decode_boxes, encode_boxes, make_anchors
from mobilevit.tasks.detection import (
    NO_OBJECT,
    DetectionResult,
    Detections,
    detection_loss,
    match_anchors,
    postprocess,
    to_pixels,
)
from mobilevit.weights.convert import convert_state_dict

ANCHORS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
NOTHING = [0.5, 0.5, 1.0, 1.0]


def test_an_anchor_finds_the_object_it_overlaps_most():
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.7, 0.5, 0.5]]])
    targets, matched = match_anchors(boxes, torch.tensor([[4, 7]]), ANCHORS)
    assert targets.tolist() == [[5, 0, 0, 8]]
    assert matched[0, 0].tolist() == boxes[0, 0].tolist()
    assert matched[0, 3].tolist() == boxes[0, 1].tolist()


def test_every_object_gets_an_anchor_whatever_the_overlap():
    boxes = torch.tensor([[[0.1, 0.1, 0.02, 0.02]]])
    targets, matched = match_anchors(boxes, torch.tensor([[0]]), ANCHORS)
    assert targets.tolist() == [[1, 0, 0, 0]]
    assert matched[0, 0].tolist() == pytest.approx([0.1, 0.1, 0.02, 0.02])


def test_an_object_too_small_for_the_threshold_takes_its_anchor_from_a_larger_one():
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]])
    targets, _ = match_anchors(boxes, torch.tensor([[0, 1]]), ANCHORS)
    assert targets.tolist() == [[2, 0, 0, 0]]  # as in the official code


def test_rows_that_fill_up_change_nothing():
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])
    alone = match_anchors(boxes, torch.tensor([[3]]), ANCHORS)
    filled = match_anchors(
        torch.cat([boxes, torch.tensor([[NOTHING]])], dim=1), torch.tensor([[3, NO_OBJECT]]), ANCHORS
    )
    assert torch.equal(alone[0], filled[0])
    assert match_anchors(torch.tensor([[NOTHING]]), torch.tensor([[NO_OBJECT]]), ANCHORS)[0].tolist() == [[0] * 4]


def _output(class_logits, box_regression=None):
    logits = torch.tensor(class_logits).float()
    regression = torch.zeros(*logits.shape[:2], 4) if box_regression is None else torch.tensor(box_regression)
    return DetectionOutput(logits, regression, ANCHORS)


def test_loss_by_hand():
    # One object on anchor 0; three negatives, all of them counted. Uniform logits: log 3 each. Boxes: smooth L1.
    box = [[[0.3, 0.25, 0.5, 0.5]]]
    loss = detection_loss(_output([[[0.0, 0.0, 0.0]] * 4]), torch.tensor(box), torch.tensor([[1]]))
    wanted = 0.05 / (0.1 * 0.5)  # regression of the center, exactly one: where smooth L1 turns from square to line
    assert loss.item() == pytest.approx(4 * math.log(3) + 0.5 * wanted**2, rel=1e-5)


def test_only_the_worst_negatives_count():
    logits = torch.zeros(1, 8, 2)
    logits[0, :, 0] = torch.tensor([0.0, 5, 5, 5, 5, -1, -2, -3])  # anchors 5 to 7 mistake the background
    anchors = make_anchors([(1, 1)] * 6, SSDLiteConfig())[:8]
    boxes, labels = anchors[None, :1].clone(), torch.tensor([[0]])
    regression = encode_boxes(boxes[0, :1], anchors)[None]
    targets, _ = match_anchors(boxes, labels, anchors)
    positive = (targets > 0)[0]
    loss = detection_loss(DetectionOutput(logits, regression, anchors), boxes, labels)
    ce = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")
    worst = ce[~positive].sort(descending=True).values[: 3 * int(positive.sum())]
    assert loss.item() == pytest.approx(((ce[positive].sum() + worst.sum()) / positive.sum()).item(), rel=1e-5)


def test_a_image_without_objects_teaches_the_background():
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    output = DetectionOutput(logits, torch.zeros(1, 4, 4), ANCHORS)
    loss = detection_loss(output, torch.tensor([[NOTHING]]), torch.tensor([[NO_OBJECT]]))
    assert loss.item() == pytest.approx(3 * math.log(3), rel=1e-5)
    loss.backward()
    assert (logits.grad[0, :, 0] <= 0).all()
    assert (logits.grad[0, :, 0] < 0).sum() == 3


def test_loss_stays_finite_where_regression_is_not_asked_for():
    output = _output([[[0.0, 1.0]] * 4], [[[0.0] * 4, [1e30] * 4, [0.0] * 4, [0.0] * 4]])
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])
    assert math.isfinite(detection_loss(output, boxes, torch.tensor([[0]])).item())


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
def test_agrees_with_suppression_class_by_class(sharpness, max_candidates):
    torch.manual_seed(0)
    anchors = make_anchors([(10, 10), (5, 5), (3, 3), (2, 2), (1, 1), (1, 1)], SSDLiteConfig())
    output = DetectionOutput(
        sharpness * torch.randn(2, len(anchors), 6), 0.5 * torch.randn(2, len(anchors), 4), anchors
    )
    for ours, theirs in zip(
        postprocess(output, max_candidates=max_candidates, max_detections=60),
        _one_class_after_the_other(output, top_k=max_candidates, max_detections=60),
        strict=True,
    ):
        assert len(ours.scores) == len(theirs) > 10
        assert ours.scores.tolist() == pytest.approx([score for score, _, _ in theirs], abs=1e-6)
        assert ours.class_ids.tolist() == [label for _, label, _ in theirs]
        assert ours.boxes_xyxy.numpy() == pytest.approx(np.array([box for _, _, box in theirs]), abs=1e-6)


def test_nothing_above_the_threshold():
    output = _output([[[50.0, 0.0, 0.0]] * 4])
    (found,) = postprocess(output)
    assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("size", ["xxs", "xs", "s"])
def test_detections_of_the_official_code(size):
    """From images to boxes; as sets, for random weights give many nearly equal scores."""
    name = f"detection.ssdlite_mobilevit_{size}"
    shapes = golden_manifest("cvnets_detection_manifest.json")[name]
    weights = convert_state_dict(golden_weights(shapes), to="mobilevit", source_channel_order="rgb")
    model = create_model(f"mobilevit_{size}", task="detection", num_classes=80)
    model.load_state_dict(weights)
    with torch.inference_mode():
        (found,) = postprocess(model(golden_images(1, 320, 320)))
    golden = golden_outputs("detection")
    boxes, scores, labels = (golden[f"{name}.detections.{w}.320x320"].squeeze(0) for w in ("boxes", "scores", "labels"))
    assert len(found.scores) == len(scores)
    assert found.scores.numpy() == pytest.approx(scores.sort(descending=True).values.numpy(), rel=1e-4)
    overlap = box_iou(found.boxes_xyxy, boxes)
    same = found.class_ids[:, None] + 1 == labels
    assert (overlap * same > 0.999).any(dim=1).float().mean() >= 0.995
    assert (overlap * same > 0.999).any(dim=0).float().mean() >= 0.995


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop"])
def test_boxes_find_their_way_back_to_the_image(mode):
    preprocessing = Preprocessing(size=(320, 256), resize_mode=mode)
    placement = preprocessing.placement((480, 640))
    inside = np.array([[200.0, 150.0, 400.0, 300.0]])
    found = Detections(torch.tensor(placement.to_input(inside)), torch.tensor([0.5]), torch.tensor([2]))
    boxes, scores, class_ids = to_pixels(found, placement)
    assert boxes == pytest.approx(inside, abs=1e-3)
    assert (scores.tolist(), class_ids.tolist()) == ([0.5], [2])
    beyond = Detections(torch.tensor([[-1.0, -1.0, 2.0, 2.0]]), torch.tensor([0.5]), torch.tensor([2]))
    assert to_pixels(beyond, placement)[0].tolist() == [[0.0, 0.0, 640.0, 480.0]]


def _result():
    return DetectionResult(
        source="street.jpg",
        classes=("bus", "cat"),
        boxes_xyxy=np.array([[10, 20, 60, 80], [5, 5, 15, 25]], np.float32),
        scores=np.array([0.9, 0.2], np.float32),
        class_ids=np.array([1, 0]),
        score_threshold=0.5,
        image=Image.new("RGB", (100, 90), "white"),
    )


def test_result_says_what_is_where(tmp_path):
    result = _result()
    assert len(result) == 2
    assert result.labels == ["cat", "bus"]
    assert result.above().labels == ["cat"]
    assert result.above(0.1).labels == ["cat", "bus"]
    assert result.describe() == "1 cat"
    assert result.describe(0.95) == "nothing found"
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


def test_box_conversion_is_the_one_of_torchvision():
    boxes = torch.rand(5, 4) + 0.1
    anchors = torch.rand(5, 4) + 0.1
    regression = encode_boxes(boxes, anchors)
    assert torch.allclose(decode_boxes(regression, anchors), box_convert(boxes, "cxcywh", "xyxy"), atol=1e-5)
