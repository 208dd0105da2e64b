import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.tasks.classification import ClassificationResult, balanced_class_weights, classification_loss

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
