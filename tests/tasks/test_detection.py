import math

import pytest
import torch
from torchvision.ops import box_convert

from mobilevit.models.ssdlite import DetectionOutput, SSDLiteConfig, decode_boxes, encode_boxes, make_anchors
from mobilevit.tasks.detection import NO_OBJECT, detection_loss, match_anchors

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


def test_box_conversion_is_the_one_of_torchvision():
    boxes = torch.rand(5, 4) + 0.1
    anchors = torch.rand(5, 4) + 0.1
    regression = encode_boxes(boxes, anchors)
    assert torch.allclose(decode_boxes(regression, anchors), box_convert(boxes, "cxcywh", "xyxy"), atol=1e-5)
