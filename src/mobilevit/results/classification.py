"""Results of classification.

Letters used in shapes: K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import ModelCard
from mobilevit.files import Json
from mobilevit.imaging.drawing import with_caption
from mobilevit.results.base import ImageInfo, Outputs, Result, float32


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn logits into probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return shares


@dataclass(frozen=True, kw_only=True)
class ClassificationResult(Result):
    """The probability of every class for one image."""

    probabilities: NDArray[np.float32]
    """(K,), with sum 1."""

    options: ClassVar[frozenset[str]] = frozenset({"top"})

    @classmethod
    def from_outputs(cls, outputs: Outputs, card: ModelCard, info: ImageInfo) -> Self:
        """Decode "logits" (K,)."""
        return cls(info=info, classes=card.classes, probabilities=softmax(float32(outputs["logits"])))

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """The probability of `label`."""
        return float(self.probabilities.max())

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes, best first, as (label, probability)."""
        best = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[i], float(self.probabilities[i])) for i in best]

    def _drawn(self, *, top: int, min_score: float | None, opacity: float) -> Image.Image:
        return with_caption(self.image, [f"{label}  {probability:.1%}" for label, probability in self.top(top)])

    def to_dict(self, *, top: int = 5, min_score: float | None = None) -> Json:
        """Return plain values for JSON; probabilities have six decimals."""
        best = [{"label": label, "probability": round(probability, 6)} for label, probability in self.top(top)]
        return {"source": self.source, "label": self.label, "probability": round(self.probability, 6), "top": best}

    def to_row(self, *, top: int = 3, min_score: float | None = None) -> Json:
        """Return the columns label, probability and top."""
        best = [{"label": label, "probability": probability} for label, probability in self.top(top)]
        return {"label": self.label, "probability": self.probability, "top": best}

    def describe(self, *, top: int = 3, min_score: float | None = None) -> str:
        """List the most probable classes in one line."""
        return "   ".join(f"{label} {probability:6.1%}" for label, probability in self.top(top))
