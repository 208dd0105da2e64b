import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.results.base import ImageInfo
from mobilevit.results.segmentation import SegmentationResult, decode_label_map


@pytest.mark.parametrize("image", [(48, 64), (300, 200), (33, 511), (20, 31)])
def test_label_map_is_that_of_the_enlarged_logits(image):
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(1, 5, 6, 8), size=(48, 64), mode="bilinear")[0]
    placement = Preprocessing(size=(48, 64), resize_mode="stretch").placement(image)
    expected = F.interpolate(logits[None], size=image, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    label_map = decode_label_map({"logits": logits.numpy()}, placement)
    assert label_map.dtype == np.uint8
    assert label_map.shape == image
    assert (label_map == expected.numpy()).mean() > 0.9999


def test_label_map_in_many_parts():
    """So many pixels between classes that they are interpolated part by part."""
    torch.manual_seed(0)
    logits = torch.randn(40, 32, 32)
    placement = Preprocessing(size=(32, 32), resize_mode="stretch").placement((700, 1000))
    expected = F.interpolate(logits[None], size=(700, 1000), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert (decode_label_map({"logits": logits.numpy()}, placement) == expected.numpy()).mean() > 0.9999


def test_margins_are_left_out():
    preprocessing = Preprocessing(size=(64, 64), resize_mode="pad")
    placement = preprocessing.placement((100, 200))  # becomes 32 x 64, above 32 rows of margin
    logits = torch.zeros(2, 64, 64)
    logits[1, 32:] = 9  # what the model says of the margin
    logits[1, :, 32:] = 5  # the right half
    label_map = decode_label_map({"logits": logits.numpy()}, placement)
    assert label_map.shape == (100, 200)
    assert (label_map[:, :99] == 0).mean() > 0.97
    assert (label_map[:, 101:] == 1).all()


def test_result_says_what_covers_how_much(tmp_path):
    label_map = np.zeros((40, 50), np.uint8)
    label_map[:, 40:] = 2
    result = SegmentationResult(
        info=ImageInfo(source="road.jpg", size=(40, 50), image=Image.new("RGB", (50, 40), "gray")),
        classes=("ground", "sky", "car"),
        label_map=label_map,
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
    assert result.draw().height > 40 + 12  # a legend
    hidden = dataclasses.replace(result, classes=("background", "sky", "background"))
    assert hidden.draw().tobytes() == result.image.tobytes()
    drawn = np.asarray(result.draw(tmp_path / "drawn.png").convert("RGB"))
    assert (drawn[20, 10] != drawn[20, 46]).any()
    original = np.asarray(result.image)[20, 10].astype(int)
    pale = np.asarray(result.draw(opacity=0.1).convert("RGB"))[20, 10]
    assert 0 < abs(pale - original).sum() < abs(drawn[20, 10] - original).sum() / 2
