"""Results of segmentation: from logits at the size of the model's input to a class for every pixel of the image.

Letters used in shapes: K classes; H, W height and width of the image; h, w of the model's input.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import ModelCard
from mobilevit.files import Json
from mobilevit.imaging.drawing import class_colors, draw_label_map, save_image
from mobilevit.imaging.preprocessing import Placement
from mobilevit.results.base import ImageInfo, Outputs, Result, float32

_LOGITS_AT_ONCE = 2**22
"""How many are interpolated at a time: 16 MB of float32, for images of any size."""


def decode_label_map(outputs: Outputs, placement: Placement) -> NDArray[np.uint8]:
    """Find the class of every pixel of the original image.

    Args:
        outputs: "logits" (K, h, w), or "label_map" (h, w) if the model returns classes itself.
        placement: where the image is in the input.

    Shape: -> (H, W).
    """
    rows, columns = placement.filled  # without padding
    if "label_map" in outputs:
        small = Image.fromarray(outputs["label_map"][:rows, :columns].astype(np.uint8))
        return np.asarray(small.resize(placement.image[::-1], Image.Resampling.NEAREST))
    return _enlarge(float32(outputs["logits"])[:, :rows, :columns], placement.image)


def _enlarge(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Compute the best class after bilinear interpolation to (height, width).

    Interpolated logits are a weighted mean of those at four corners. A class that is the best at all four is the best
    in between, so only pixels between different classes have to be interpolated.
    """
    best = _best_class(logits)
    if size == best.shape:
        return best
    y, x = _taps(size[0], best.shape[0]), _taps(size[1], best.shape[1])
    label_map: NDArray[np.uint8] = best[y.before][:, x.before]
    differs_across = best[:, x.before] != best[:, x.after]  # (h, W)
    differs_down = best[y.before] != best[y.after]  # (H, w)
    row, column = np.nonzero(differs_across[y.before] | differs_across[y.after] | differs_down[:, x.before])
    flat, width = logits.reshape(len(logits), -1), best.shape[1]
    step = max(1, _LOGITS_AT_ONCE // len(logits))
    for start in range(0, len(row), step):
        i, j = row[start : start + step], column[start : start + step]
        upper, lower, left, right = y.before[i] * width, y.after[i] * width, x.before[j], x.after[j]
        above = _mix(flat[:, upper + left], flat[:, upper + right], x.weight[j])
        below = _mix(flat[:, lower + left], flat[:, lower + right], x.weight[j])
        label_map[i, j] = _best_class(_mix(above, below, y.weight[i]))
    return label_map


class _Taps(NamedTuple):
    """For each output pixel along an axis: the two input pixels around its center, and the weight of the second."""

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    weight: NDArray[np.float32]


def _taps(length: int, input_length: int) -> _Taps:
    """Compute taps with half-pixel centers, as `torch.nn.functional.interpolate` does with align_corners=False."""
    place = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(input_length / length)
    place = (place - np.float32(0.5)).clip(0, input_length - 1)
    before = place.astype(np.int64)
    return _Taps(before, np.minimum(before + 1, input_length - 1), (place - before).astype(np.float32))


def _mix(first: NDArray[np.float32], second: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = first + (second - first) * weight
    return mixed


def _best_class(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Compute the argmax over the first axis, several times faster than numpy. Shape: (K, ...) -> (...)."""
    highest = logits[0].copy()
    best = np.zeros(highest.shape, np.uint8)
    for number in range(1, len(logits)):
        best[logits[number] > highest] = number
        np.maximum(highest, logits[number], out=highest)
    return best


@dataclass(frozen=True, kw_only=True)
class SegmentationResult(Result):
    """The class of every pixel of one image."""

    label_map: NDArray[np.uint8] = field(repr=False)
    """(H, W): index into `classes`."""

    covers_image: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset({"masks"})

    @classmethod
    def elements_per_image(cls, card: ModelCard) -> int:
        """Count the logits of one image: classes times pixels of the input."""
        height, width = card.preprocessing.size
        return len(card.classes) * height * width

    @classmethod
    def from_outputs(cls, outputs: Outputs, card: ModelCard, info: ImageInfo) -> Self:
        """Decode "logits" (K, h, w) or "label_map" (h, w)."""
        label_map = decode_label_map(outputs, card.preprocessing.placement(info.size))
        return cls(info=info, classes=card.classes, label_map=label_map)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that occurs, largest first."""
        counts = np.bincount(self.label_map.ravel(), minlength=len(self.classes)) / self.label_map.size
        return {self.classes[i]: float(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]}

    def _drawn(self, *, top: int, min_score: float | None, opacity: float) -> Image.Image:
        return draw_label_map(self.image, self.label_map, self.classes, opacity=opacity)

    def mask(self) -> Image.Image:
        """Make a palette image of the label map: values are class indices, colors those of `draw`."""
        mask = Image.fromarray(self.label_map).convert("P")
        mask.putpalette([channel for color in class_colors(len(self.classes)) for channel in color])
        return mask

    def save_mask(self, path: str | os.PathLike[str]) -> None:
        """Write `mask` as a PNG."""
        save_image(self.mask(), path)

    def to_dict(self, *, top: int = 5, min_score: float | None = None) -> Json:
        """Return plain values for JSON, without the label map; `save_mask` writes that."""
        shares = {label: round(share, 6) for label, share in self.shares.items()}
        height, width = self.info.size
        return {"source": self.source, "width": width, "height": height, "shares": shares}

    def to_row(self, *, top: int = 3, min_score: float | None = None) -> Json:
        """Return the column shares: the label and share of each class that occurs."""
        return {"shares": [{"label": label, "share": share} for label, share in self.shares.items()]}

    def describe(self, *, top: int = 3, min_score: float | None = None) -> str:
        """List the share of each class in one line."""
        return "  ".join(f"{label} {share:.1%}" for label, share in self.shares.items())
