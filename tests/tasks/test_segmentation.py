import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mobilevit.class_names import IGNORE
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.deeplabv3 import SegmentationOutput
from mobilevit.tasks.segmentation import SegmentationResult, segmentation_loss, to_label_map


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


@pytest.mark.parametrize("image", [(48, 64), (300, 200), (33, 511), (20, 31)])
def test_label_map_is_that_of_the_enlarged_logits(image, monkeypatch):
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(1, 5, 6, 8), size=(48, 64), mode="bilinear")[0]
    placement = Preprocessing(size=(48, 64), resize_mode="stretch").placement(image)
    expected = F.interpolate(logits[None], size=image, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    label_map = to_label_map(logits, placement)
    assert label_map.dtype == np.uint8
    assert label_map.shape == image
    assert (label_map == expected.numpy()).mean() > 0.9999


def test_label_map_in_many_bands(monkeypatch):
    """An image so large that its rows are done band by band."""
    torch.manual_seed(0)
    logits = torch.randn(40, 32, 32)
    placement = Preprocessing(size=(32, 32), resize_mode="stretch").placement((700, 1000))
    expected = F.interpolate(logits[None], size=(700, 1000), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert (to_label_map(logits, placement) == expected.numpy()).mean() > 0.9999


def test_margins_are_left_out():
    preprocessing = Preprocessing(size=(64, 64), resize_mode="pad")
    placement = preprocessing.placement((100, 200))  # becomes 32 x 64, above 32 rows of margin
    logits = torch.zeros(2, 64, 64)
    logits[1, 32:] = 9  # what the model says of the margin
    logits[1, :, 32:] = 5  # the right half
    label_map = to_label_map(logits, placement)
    assert label_map.shape == (100, 200)
    assert (label_map[:, :99] == 0).mean() > 0.97
    assert (label_map[:, 101:] == 1).all()


def test_result_says_what_covers_how_much(tmp_path):
    label_map = np.zeros((40, 50), np.uint8)
    label_map[:, 40:] = 2
    result = SegmentationResult(
        source="road.jpg",
        classes=("ground", "sky", "car"),
        label_map=label_map,
        image=Image.new("RGB", (50, 40), "gray"),
    )
    assert result.shares == {"ground": 0.8, "car": 0.2}
    assert list(result.shares) == ["ground", "car"]
    assert result.describe() == "ground 80.0%  car 20.0%"
    assert json.loads(json.dumps(result.to_dict())) == {
        "source": "road.jpg",
        "width": 50,
        "height": 40,
        "shares": {"ground": 0.8, "car": 0.2},
    }
    result.save_mask(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        assert (np.asarray(mask) == label_map).all()
    drawn = np.asarray(result.draw(tmp_path / "drawn.png").convert("RGB"))
    assert (drawn[20, 10] != drawn[20, 46]).any()
