import math

import pytest
import torch

from mobilevit.class_names import IGNORE
from mobilevit.models.segmenter import SegmentationOutput
from mobilevit.tasks.segmentation import segmentation_loss


def test_loss_by_hand():
    logits = torch.zeros(1, 4, 2, 2)
    maps = torch.tensor([[[0, 3], [IGNORE, 1]]], dtype=torch.uint8)
    assert segmentation_loss(SegmentationOutput(logits, None), maps).item() == pytest.approx(math.log(4))


def test_the_auxiliary_head_adds_its_share():
    logits, aux = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    maps = torch.zeros(1, 2, 2, dtype=torch.uint8)
    loss = segmentation_loss(SegmentationOutput(logits, aux), maps, aux_weight=0.4)
    assert loss.item() == pytest.approx(1.4 * math.log(4))


def test_ignored_pixels_teach_nothing():
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    maps = torch.tensor([[[0, IGNORE], [IGNORE, IGNORE]]], dtype=torch.uint8)
    segmentation_loss(SegmentationOutput(logits, None), maps).backward()
    assert (logits.grad[0, :, 0, 0] != 0).all()
    assert (logits.grad[0, :, 1] == 0).all()


def test_a_batch_of_ignored_pixels_has_no_loss():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = segmentation_loss(SegmentationOutput(logits, None), torch.full((1, 2, 2), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()
