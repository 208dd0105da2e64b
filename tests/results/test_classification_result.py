import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.errors import MobileViTError
from mobilevit.results import check_options
from mobilevit.results.base import ImageInfo
from mobilevit.results.classification import ClassificationResult, softmax


def test_softmax_by_hand_and_of_large_logits() -> None:
    assert np.allclose(softmax(np.log(np.array([[1, 3, 4]], np.float32))), [[0.125, 0.375, 0.5]])
    assert softmax(np.array([1000, 1000, -1000], np.float32)).tolist() == [0.5, 0.5, 0.0]


def a_result() -> ClassificationResult:
    return ClassificationResult(
        info=ImageInfo(source="photos/x.jpg", size=(60, 90), image=Image.new("RGB", (90, 60), (20, 90, 200))),
        classes=("ant", "bee", "cat", "dog"),
        probabilities=np.array([0.125, 0.5, 0.125, 0.25], np.float32),
    )


def test_result() -> None:
    result = a_result()
    assert (result.label, result.probability) == ("bee", 0.5)
    assert result.top() == [("bee", 0.5), ("dog", 0.25), ("ant", 0.125), ("cat", 0.125)]
    assert result.top(2) == [("bee", 0.5), ("dog", 0.25)]
    assert result.top(99) == result.top(4)
    assert all(type(probability) is float for _, probability in result.top())


def test_result_as_json() -> None:
    values = json.loads(json.dumps(a_result().to_dict(top=2)))
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
    heights = [result.draw(top=k).height for k in (1, 2, 3, 4, 5)]
    line = heights[1] - heights[0]
    assert line >= 11
    assert heights == [heights[0] + line * more for more in (0, 1, 2, 3, 3)]  # there are four classes
    assert drawn.height == heights[2]


def test_options_of_other_tasks_are_refused() -> None:
    check_options("detection", ["min_score", "coco", "device"])
    check_options("classification", ["top"])
    with pytest.raises(MobileViTError, match=r"^`min_score` is for detection; this model does classification$"):
        check_options("classification", ["top", "min_score"])
    with pytest.raises(MobileViTError, match=r"^`masks` is for segmentation; this model does detection$"):
        check_options("detection", iter(["masks"]))
