import numpy as np
import pytest
import torch

from mobilevit.tasks.classification import balanced_class_weights, classification_loss

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
